"""Compares two sets of weights bit for bit, and optionally the outputs of our and diffusers' UNet."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from i2vgen.files import checkpoint
from i2vgen.model.conditioning import Conditions
from i2vgen.settings import config
from i2vgen.settings.wording import counted
from weights_conversion import clip as clip_tables
from weights_conversion import convert, diffusers_layout, rules, sources, unet_diffusers
from weights_conversion.recognise import WORDS

OUTPUT_BOUND = 1e-9  # relative L2 in float64, where only rounding remains


@dataclass
class Verdict:
    """The lines of the report, and whether everything agrees."""

    lines: list[str] = field(default_factory=list)
    passed: bool = True

    def add(self, passed: bool, line: str) -> None:
        self.passed &= passed
        self.lines.append(f"{'same' if passed else 'DIFFERENT'}: {line}")


def verify(
    a: str | Path,
    b: str | Path,
    *,
    reference: str | None = None,
    overrides: tuple[str, ...] = (),
    seed: int = 0,
    on_part: Callable[[str], None] | None = None,
) -> Verdict:
    """Map both to our names and compare every tensor bit for bit; with `reference`, also run both networks.

    `a` and `b` may be any sources that `convert` reads. `reference="diffusers"` runs `a` in our network and
    `b` in diffusers' class, in float64 on seeded random inputs, and names the first layer that differs.
    """
    if reference not in (None, "diffusers"):
        raise ValueError(f"there is no reference {reference!r}; give diffusers")
    sides = [_side(path, overrides) for path in (a, b)]
    verdict = Verdict()
    shared = [part for part in checkpoint.PARTS if all(part in side.states for side in sides)]
    for part in checkpoint.PARTS:
        if sum(part in side.states for side in sides) == 1:
            verdict.add(False, f"only one side holds the {WORDS[part]}")
    if not shared:
        raise ValueError(f"{a} and {b} have no part in common")
    lacking = _substituted(sides[0]) ^ _substituted(sides[1])
    for part in shared:
        if on_part is not None:
            on_part(part)
        left_out = lacking if part == "clip" else set()
        first, second = ({n: s.states[part][n] for n in s.states[part] if n not in left_out} for s in sides)
        _compare(part, first, second, verdict)
        _compare_settings(part, sides, verdict)
    if lacking and "clip" in shared:
        verdict.lines.append(
            f"not compared: {', '.join(sorted(lacking))}, absent in transformers' towers and not used here"
        )
    if "unet" in shared and (gains := {side.folded for side in sides}) != {1.0}:
        one, other = (f"{side.folded:g}" for side in sides)
        verdict.lines.append(
            "note: compared without the factors of the concat branch that diffusers' files hold in conv_in, "
            f"{one} and {other}"
            + ("" if len(gains) == 1 else "; diffusers itself computes differently with these two")
        )
    if reference is not None:
        if "unet" not in shared:
            raise ValueError("--reference diffusers compares UNets; both sides must hold one")
        _run_both(sides[0], sides[1], seed, verdict)
    return verdict


@dataclass(frozen=True)
class Side:
    """One set of weights under our names, read on access, and its settings."""

    states: Mapping[str, Mapping[str, Tensor]]
    config: config.Config
    layouts: frozenset[str]
    stated: frozenset[str]  # parts whose settings the source states; others are inferred from shapes
    folded: float  # factor by which the concat columns of a diffusers UNet were multiplied in its file


def _side(path: str | Path, overrides: tuple[str, ...]) -> Side:
    found = sources.gather([path])
    cfg = convert.settings_of(found, overrides)
    report = convert.Report("")
    held = convert.native_parts(found)
    states = {part: convert.STATES[part](parts, cfg, False, report)[0] for part, parts in held.items()}
    stated = frozenset(name for name, parts in held.items() if all(p.settings or p.card for p in parts))
    folded = next((p.extra["folded"] for p in found if "folded" in p.extra), 1.0)
    return Side(states, cfg, frozenset(part.layout for part in found), stated, folded)


def _substituted(side: Side) -> set[str]:
    """Tensors that transformers' towers lack, where this side holds what a conversion puts in their place."""
    held = side.states.get("clip", {})
    return {
        name
        for name, substitute in clip_tables.absent(side.config.clip).items()
        if name in held and torch.equal(held[name], substitute.to(held[name].dtype))
    }


def _compare_settings(part: str, sides: list[Side], verdict: Verdict) -> None:
    """Compare settings too: the same weights with other heads or another scale are another model."""
    a, b = (dict(dataclasses.asdict(getattr(side.config, part))) for side in sides)
    different = [f"{part}.{name} {a[name]} and {b[name]}" for name in a if a[name] != b[name]]
    if not different:
        return
    if all(part in side.stated for side in sides):
        verdict.add(False, f"settings: {', '.join(different)}")
    else:
        verdict.lines.append(f"note: one side's settings are inferred from shapes: {', '.join(different)}")


def _compare(part: str, a: Mapping[str, Tensor], b: Mapping[str, Tensor], verdict: Verdict) -> None:
    if only := sorted(set(a) ^ set(b)):
        verdict.add(False, f"{WORDS[part]}: {counted(len(only), 'tensor')} on one side only, first {only[0]}")
    names = [name for name in a if name in b]
    different = [name for name in names if not _equal(a[name], b[name])]
    if different:
        first = different[0]
        how = f"first {first}: {_how(a[first], b[first])}"
        verdict.add(False, f"{WORDS[part]}: {len(different)} of {len(names)} tensors differ, {how}")
    else:
        verdict.add(True, f"{WORDS[part]}: {counted(len(names), 'tensor')}, bit for bit")


def _equal(a: Tensor, b: Tensor) -> bool:
    """Compare bits, not values: NaN equals itself, 0.0 and -0.0 differ."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    a, b = (t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b))
    return torch.equal(a, b)


def _how(a: Tensor, b: Tensor) -> str:
    if a.shape != b.shape:
        return f"shape {tuple(a.shape)} and {tuple(b.shape)}"
    if a.dtype != b.dtype:
        return f"{a.dtype} and {b.dtype}"
    return f"largest difference {(a.double() - b.double()).abs().max().item():.3g}"


def _run_both(first: Side, second: Side, seed: int, verdict: Verdict) -> None:
    """Run our network on the first side and diffusers' on the second as stored in its file, in float64.

    diffusers adds the concat branch once, so the factor folded into its conv_in becomes our gain. Sinusoid
    and frame planes use diffusers' conventions, so that only rounding differs.
    """
    a, b, cfg, gain = first.states["unet"], second.states["unet"], first.config, second.folded
    if gain != cfg.use.concat_gain:
        verdict.lines.append(
            f"note: the first side has use.concat_gain={cfg.use.concat_gain}, but diffusers uses {gain} with "
            "the second; outputs are compared with the latter"
        )
    use = dataclasses.replace(cfg.use, concat_gain=gain, sinusoid="exp", frame_planes="network")
    ours = checkpoint.build("unet", dataclasses.replace(cfg, use=use))
    checkpoint.fill(ours, a, dtype=torch.float64)
    mapping = unet_diffusers.rows(cfg.unet)
    theirs = diffusers_layout.build_unet(cfg.unet)
    state = {k: v.double() for k, v in rules.to_theirs(mapping, b).items()}
    state["conv_in.weight"] = diffusers_layout.scale_concat(state["conv_in.weight"], gain)
    theirs.load_state_dict(state, assign=True)

    size = 2 * cfg.unet.factor
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    frames = 3
    x = normal(1, cfg.unet.in_channels, frames, size, size)
    latent = normal(1, cfg.unet.image_channels, size, size)
    text, vector = normal(1, 7, cfg.unet.context_width), normal(1, cfg.unet.image_vector_width)
    t, fps = torch.tensor([601]), torch.tensor([16])
    planes = torch.cat(
        [
            latent[:, :, None],
            *[torch.full_like(latent, k / (frames - 1))[:, :, None] for k in range(1, frames)],
        ],
        dim=2,
    )
    seen_ours, seen_theirs = _watch(ours), _watch(theirs)
    with torch.no_grad():
        conditions = Conditions(text, vector, latent, fps)
        got = ours.eval()(x, t, ours.prepare(conditions, frames))
        want = theirs.eval()(
            x, t, fps, image_latents=planes, image_embeddings=vector[:, None], encoder_hidden_states=text
        ).sample
    names = {row.theirs.removesuffix(".weight"): row.ours[0].removesuffix(".weight") for row in mapping}
    compared = 0
    for name in seen_theirs:  # in the order in which diffusers computes
        mine = names.get(name)
        if mine not in seen_ours:
            continue
        distance = _distance(seen_ours[mine], seen_theirs[name])
        if distance is None:
            continue
        compared += 1
        if distance > OUTPUT_BOUND:
            where = f"{mine} (diffusers: {name})"
            verdict.add(False, f"outputs: first divergence at {where}: relative L2 {distance:.2g}")
            return
    distance = ((got - want).norm() / want.norm()).item()
    passed = distance <= OUTPUT_BOUND
    figures = f"relative L2 {distance:.2g}, bound {OUTPUT_BOUND:g}"
    verdict.add(passed, f"outputs in float64 over {compared} layers; {figures}")


def _watch(model: nn.Module) -> dict[str, Tensor]:
    seen: dict[str, Tensor] = {}

    def keep(name: str):
        def hook(module: nn.Module, inputs, output) -> None:
            if isinstance(output, Tensor):
                seen.setdefault(name, output)

        return hook

    for name, module in model.named_modules():
        module.register_forward_hook(keep(name))
    return seen


def _distance(ours: Tensor, theirs: Tensor) -> float | None:
    """Relative L2 distance between the sorted values of two outputs, which is independent of their layouts.

    None if the sizes differ: diffusers repeats the embeddings per frame, so these cannot be compared.
    """
    if ours.numel() != theirs.numel():
        return None
    a, b = ours.flatten().sort().values, theirs.flatten().sort().values
    return ((a - b).norm() / b.norm().clamp_min(1e-300)).item()
