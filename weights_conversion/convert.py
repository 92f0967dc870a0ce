"""Converts any known checkpoint to a native folder: strictly mapped, checked, all or nothing."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import i2vgen
from i2vgen.files import checkpoint, records
from i2vgen.files.eight_bits import narrow
from i2vgen.files.safefile import Entry
from i2vgen.settings import config, merge
from i2vgen.settings.wording import counted
from weights_conversion import adapters, readers, rules, sources, unet_diffusers, unet_vgen
from weights_conversion import clip as clip_tables
from weights_conversion import vae as vae_tables
from weights_conversion.known import (
    CONVERTED_NOTE,
    KNOWN_FILES,
    LICENCE_NOTES,
    REFINER_SETTINGS,
    SR600_SETTINGS,
    V1_SETTINGS,
)
from weights_conversion.recognise import WORDS
from weights_conversion.sources import PartSource

CHECKING = "checking for NaN"
OnBytes = Callable[[str, int, int], None]  # (current task, done, total): bytes, or tensors for CHECKING


@dataclass
class Report:
    """What a conversion found, chose and wrote, for the user."""

    out: str
    parts: dict[str, str] = field(default_factory=dict)  # native part -> one line about it
    missing: list[str] = field(default_factory=list)  # parts that generation needs too
    notes: list[str] = field(default_factory=list)
    sources: list[dict[str, Any]] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    fresh: list[str] = field(default_factory=list)
    nonfinite: list[str] = field(default_factory=list)
    written: bool = False

    def text(self) -> str:
        lines = [f"{part:5} {line}" for part, line in self.parts.items()]
        lines += [f"note: {note}" for note in self.notes]
        if self.dropped:
            count = counted(len(self.dropped), "tensor")
            lines.append(f"dropped {count} of parts that are switched off: {_some(self.dropped)}")
        if self.fresh:
            lines.append(f"freshly initialised {counted(len(self.fresh), 'tensor')}: {_some(self.fresh)}")
        if self.nonfinite:
            count = counted(len(self.nonfinite), "tensor")
            lines.append(f"NaN or infinity in {count}: {_some(self.nonfinite)}")
        for source in self.sources:
            known = f", which is {source['known']}" if source.get("known") else ""
            lines.append(f"source {source['file']} sha256 {source['sha256']}{known}")
        if self.missing:
            lines.append(f"missing for generation: {', '.join(self.missing)}")
        lines.append(f"{'written to' if self.written else 'nothing written; the output would be'} {self.out}")
        return "\n".join(lines)


class LazyState(Mapping):
    """A state dict under our names whose tensors are read from their file on access."""

    def __init__(
        self, rows: Sequence[rules.Row], theirs: Mapping[str, Tensor], slices: Mapping[str, int] | None = None
    ):
        self.theirs, self.slices = theirs, slices or {}
        self.rows = {name: row for row in rows for name in row.ours}

    def __getitem__(self, name: str) -> Tensor:
        row = self.rows[name]
        tensor = row.to_ours(self.theirs[row.theirs])[name]
        return tensor[:, : self.slices[name]] if name in self.slices else tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)


def convert(
    names: Sequence[str | Path],
    out: str | Path,
    *,
    overrides: Sequence[str] = (),
    dtype: torch.dtype | None = None,
    eight_bits: bool = False,
    shard_bytes: int | None = None,
    dry_run: bool = False,
    partial: bool = False,
    allow_nonfinite: bool = False,
    spatial_init: bool = False,
    variant: str | None = None,
    compat: str | None = None,
    ema: bool = False,
    on_bytes: OnBytes | None = None,
) -> Report:
    """Convert sources to the native folder `out` -> report. ValueError for anything that does not fit.

    `overrides` are settings as on a command line (`unet.head_width=16`, `use.concat=false`). `partial`
    initialises missing tensors and ignores unexpected ones; otherwise both are errors. `dtype` None keeps the
    dtype of each tensor; `eight_bits` rounds them instead (files/eight_bits.py). `ema` takes averaged weights
    where a file holds both kinds. A single low-rank adapter becomes a folder for `adapter=`.
    """
    if len(names) == 1 and adapters.is_adapter(path := sources.located(str(names[0]))[0]):
        report = Report(str(out), written=not dry_run)
        cfg = settings_of([], overrides)
        report.parts["lora"] = adapters.convert(path, out, cfg, dry_run=dry_run)
        return report
    checkpoint.check_place(out)
    found = sources.gather(names, variant=variant, compat=compat, spatial_init=spatial_init, ema=ema)
    report = Report(str(out))
    cfg, states = read(found, overrides, report, partial=partial or spatial_init)
    if not allow_nonfinite:
        _refuse_nonfinite(states, report, on_bytes)
    report.sources = [_describe(path, on_bytes) for path in dict.fromkeys(f for p in found for f in p.files)]
    if dry_run:
        return report
    entries = {part: _entries(state, dtype) for part, state in states.items()}
    if eight_bits:
        entries = {part: {e.name: e for e in narrow([*held.values()])} for part, held in entries.items()}
    checkpoint.save(
        out,
        entries,
        cfg,
        origin=origin(found, report),
        shard_bytes=shard_bytes,
        on_bytes=None if on_bytes is None else lambda done, total: on_bytes("writing", done, total),
    )
    report.written = True
    return report


def read(
    found: Sequence[PartSource], overrides: Sequence[str], report: Report, *, partial: bool = False
) -> tuple[config.Config, dict[str, Mapping[str, Tensor]]]:
    """Parts that `sources.gather` found -> settings, and by part a state dict read on access.

    `report` is filled on the way. ValueError for parts that do not fit.
    """
    for part in found:
        report.notes += [note for note in part.notes if note not in report.notes]
    cfg = settings_of(found, overrides)
    report.notes += _guesses(found, cfg)
    states = {}
    for part, held in native_parts(found).items():
        states[part], line = STATES[part](held, cfg, partial, report)
        report.parts[part] = line
    report.missing = [part for part in checkpoint.PARTS if part not in states]
    _refuse_other_numbers(states)
    return cfg, states


def _entries(state: Mapping[str, Tensor], dtype: torch.dtype | None) -> dict[str, Entry]:
    """The tensors to write, each read when it is written; floats are cast to `dtype`."""
    entries = {}
    for name in state:
        tensor = state[name]
        kept = tensor.dtype if dtype is None or not tensor.is_floating_point() else dtype
        entries[name] = Entry(name, tuple(tensor.shape), kept, lambda name=name: state[name])
    return entries


def settings_of(found: Sequence[PartSource], overrides: Sequence[str]) -> config.Config:
    """The settings from the sources' configs or tensor shapes, changed by the user's overrides."""
    stated, literals = merge.parse_overrides(overrides)
    if literals:
        raise ValueError(
            f"{', '.join(literals)} is not a model setting; give settings of unet., vae., clip., use. ..."
        )
    merge.check_types(stated, "the command line")
    settings: dict[str, Any] = {}
    for part in found:
        if part.settings:
            merge.refuse_contradiction(part.settings, str(part.files[0].parent), stated, "the command line")
        _merge(settings, part.settings)
    cards = {part.part: part.card for part in found if part.part in ("text", "image") and part.card}
    if cards.keys() == {"text", "image"}:
        clip = clip_tables.settings_from_transformers(cards["text"], cards["image"])
        _merge(settings, {"clip": dataclasses.asdict(clip)})
    for part in found:
        name = "clip" if part.part in ("text", "image") else part.part
        if name not in settings:
            try:
                _merge(settings, _shown(part, stated))
            except (TypeError, ZeroDivisionError) as error:  # not numbers, or zero
                raise ValueError(f"{name} cannot have the settings {stated.get(name)} ({error})") from error
    _merge(settings, stated)
    _fit_missing(settings, {p.part for p in found})
    try:
        return merge.from_dict(settings)
    except ValueError as error:
        raise ValueError(f"the parts do not fit together: {error}") from error


def _guesses(found: Sequence[PartSource], cfg: config.Config) -> list[str]:
    """Notes on settings that neither shapes nor configs give, so that the user can correct them."""
    layouts = {(part.part, part.layout) for part in found}
    guesses = []
    if ("unet", "vgen") in layouts:
        guesses.append(f"unet.head_width={cfg.unet.head_width}, unet.norm_groups={cfg.unet.norm_groups}")
    if ("vae", "compvis") in layouts:
        guesses.append(f"vae.scale={cfg.vae.scale}, vae.norm_groups={cfg.vae.norm_groups}")
    if ("clip", "open_clip") in layouts:
        heads, width = cfg.clip.text["heads"], cfg.clip.vision["head_width"]
        guesses.append(f"clip.text.heads={heads}, clip.vision.head_width={width}")
    if any(p.layout == "vgen" and unet_vgen.lineage(p.tensors) == "refiner" for p in found):
        name, other = "MS-Vid2Vid-XL", "sr600 if it is SR600"
        if cfg.use.skip_filter == "sr600":
            name, other = "SR600", "none if it is MS-Vid2Vid-XL"
        guesses.append(f"that this refiner is {name} (use.skip_filter={other}; they have the same tensors)")
    return [f"assumed, because shapes do not show it: {guess}" for guess in guesses]


def _shown(part: PartSource, stated: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that follow from a part's shapes; the rest comes from `stated` or the defaults."""
    shapes = {name: tuple(tensor.shape) for name, tensor in part.tensors.items()}
    if part.part == "unet" and part.layout in ("vgen", "sd"):
        if part.layout == "sd":
            return {}
        unet, use = unet_vgen.settings_from_shapes(shapes, given=stated.get("unet", {}))
        if not use.concat and unet.in_channels != unet.out_channels:
            raise ValueError(
                f"{part.files[0]}: the input convolution reads {unet.in_channels} channels, as in the "
                "released UNet, but the local branch (local_image_concat) is missing; a v1 base without it "
                "reads 4"
            )
        shown = {"unet": dataclasses.asdict(unet), "use": dataclasses.asdict(use)}
        return shown | _of_lineage(unet_vgen.lineage(shapes), stated)
    if part.part == "vae" and part.layout == "compvis":
        return {"vae": dataclasses.asdict(vae_tables.settings_from_shapes(shapes, stated.get("vae", {})))}
    if part.part == "clip" and part.layout == "open_clip":
        given = stated.get("clip", {})
        clip = clip_tables.settings_from_open_clip(
            shapes,
            text_heads=given.get("text", {}).get("heads"),
            vision_head_width=given.get("vision", {}).get("head_width"),
        )
        return {"clip": dataclasses.asdict(clip)}
    raise ValueError(
        f"{part.files[0]} is a {part.layout} {WORDS[part.part]} without its config.json; give the folder "
        "that holds both"
    )


def _of_lineage(lineage: str | None, stated: Mapping[str, Any]) -> dict[str, Any]:
    """Schedule, sizes and texts of the earlier networks; those of the released one are the defaults."""
    if lineage == "v1":
        return dict(V1_SETTINGS)
    if lineage == "refiner":
        sr600 = stated.get("use", {}).get("skip_filter") == "sr600"
        return dict(SR600_SETTINGS if sr600 else REFINER_SETTINGS)
    return {}


def _fit_missing(settings: dict[str, Any], parts: set[str]) -> None:
    """Give missing parts settings that fit the others, so that a single part is a valid folder."""
    unet, vae, clip = (settings.setdefault(name, {}) for name in ("unet", "vae", "clip"))
    if "unet" not in parts:
        if "embed_dim" in vae:
            unet.setdefault("in_channels", vae["embed_dim"])
            unet.setdefault("image_channels", vae["embed_dim"])
        if "text" in clip:
            unet.setdefault("context_width", clip["text"]["width"])
            unet.setdefault("image_vector_width", clip["embed_dim"])
    if "vae" not in parts and "in_channels" in unet:
        vae.setdefault("embed_dim", unet["in_channels"])
    if not parts & {"clip", "text"} and "context_width" in unet:
        usual, width = config.Clip().text, unet["context_width"]
        fitting = {**usual, "width": width, "heads": math.gcd(usual["heads"], width)}
        clip["text"] = {**fitting, **clip.get("text", {})}
    if not parts & {"clip", "image"} and "image_vector_width" in unet:
        clip.setdefault("embed_dim", unet["image_vector_width"])
    sample = settings.setdefault("sample", {})
    try:
        multiple = config.VAE(**_tuples(vae)).factor * config.UNet(**_tuples(unet)).factor
    except ValueError:
        return  # the check of the whole configuration names the fields
    for name in ("width", "height"):  # the default size, rounded down to a valid multiple
        size = getattr(config.DEFAULTS.sample, name)
        sample.setdefault(name, max(multiple, size // multiple * multiple))


def _tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    return {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}


def native_parts(found: Sequence[PartSource]) -> dict[str, list[PartSource]]:
    """Group the sources by native part; transformers' two CLIP towers form one."""
    parts: dict[str, list[PartSource]] = {}
    for part in found:
        parts.setdefault("clip" if part.part in ("text", "image") else part.part, []).append(part)
    towers = {p.part for p in parts.get("clip", ())}
    if towers and towers != {"clip"} and towers != {"text", "image"}:
        have = WORDS[next(iter(towers))]
        raise ValueError(
            f"only the {have} was given; a native CLIP holds both towers, so give the other one too"
        )
    return parts


# ---------------------------------------------------------------------------------------------------
# One function per part: sources -> our state dict, read lazily, and a line for the report


def _unet(held: list[PartSource], cfg: config.Config, partial: bool, report: Report) -> tuple[Mapping, str]:
    source = held[0]
    full = config.Use()
    if source.layout == "native":
        stored = merge.from_dict(dict(source.settings)) if source.settings else cfg
        full_rows = [rules.Row(name, (name,)) for name in checkpoint.build("unet", stored).state_dict()]
        rows = full_rows
    elif source.layout == "diffusers":
        rows = unet_diffusers.rows(cfg.unet)
        full_rows = rows
    elif source.layout == "sd":
        rows = unet_vgen.sd_rows(cfg.unet)
        full_rows = rows
    else:
        rows, full_rows = unet_vgen.rows(cfg.unet, cfg.use), unet_vgen.rows(cfg.unet, full)
    wanted = checkpoint.build("unet", cfg).state_dict()
    ours = {name for row in rows for name in row.ours}
    rows = [row for row in rows if set(row.ours) <= wanted.keys()]
    # The switches of an ablated configuration determine what it drops; everything else must be mapped.
    declared = {row.theirs for row in full_rows} - {row.theirs for row in rows}
    missing, unexpected = rules.audit(rows, source.tensors)
    report.dropped += sorted(set(unexpected) & declared)
    unexpected = sorted(set(unexpected) - declared)
    if source.layout == "sd":
        unexpected = []  # its time embedding and other parts are not inherited
    _refuse(source, missing, unexpected, partial)
    rows = [row for row in rows if row.theirs in source.tensors]
    slices = {n: s for n, s in checkpoint.ablation(cfg.unet, cfg.use).slices if n in ours}
    state: Mapping[str, Tensor] = LazyState(rows, source.tensors, slices)
    if source.layout == "sd":
        widened = unet_vgen.widen_conv_in(state["conv_in.weight"], cfg.unet, cfg.use)
        state = {**{name: state[name] for name in state}, "conv_in.weight": widened}
    return _completed(source, state, wanted, report, cfg, "unet")


def _vae(held: list[PartSource], cfg: config.Config, partial: bool, report: Report) -> tuple[Mapping, str]:
    source = held[0]
    wanted = checkpoint.build("vae", cfg).state_dict()
    if source.layout == "native":
        rows = [rules.Row(name, (name,)) for name in wanted]
    else:
        rows = vae_tables.rows(cfg.vae) if source.layout == "compvis" else vae_tables.diffusers_rows(cfg.vae)
    return _strict(source, rows, wanted, partial, report, cfg, "vae")


def _clip(held: list[PartSource], cfg: config.Config, partial: bool, report: Report) -> tuple[Mapping, str]:
    wanted = checkpoint.inner(checkpoint.build("clip", cfg)).state_dict()
    if held[0].layout in ("native", "open_clip"):
        rows = [rules.Row(name, (name,)) for name in wanted]
        return _strict(held[0], rows, wanted, partial, report, cfg, "clip")
    state, notes = clip_tables.from_transformers({p.part: p.tensors for p in held}, cfg.clip)
    report.notes += notes
    _check_shapes(held[0], state, wanted)
    if absent := sorted(set(wanted) - set(state)):
        raise ValueError(f"{held[0].files[0]} lacks {counted(len(absent), 'tensor')}: {_some(absent)}")
    return state, " + ".join(_line(p, p.tensors) for p in held)


STATES = {"unet": _unet, "vae": _vae, "clip": _clip}


def _strict(
    source: PartSource,
    rows: list[rules.Row],
    wanted: Mapping[str, Tensor],
    partial: bool,
    report: Report,
    cfg: config.Config,
    part: str,
) -> tuple[Mapping, str]:
    """Map every tensor of a part; ValueError for missing or unexpected ones unless `partial`."""
    missing, unexpected = rules.audit(rows, source.tensors)
    _refuse(source, missing, unexpected, partial)
    state = LazyState([row for row in rows if row.theirs in source.tensors], source.tensors)
    return _completed(source, state, wanted, report, cfg, part)


def _completed(
    source: PartSource,
    state: Mapping[str, Tensor],
    wanted: Mapping[str, Tensor],
    report: Report,
    cfg: config.Config,
    part: str,
) -> tuple[Mapping, str]:
    """Check the shapes and initialise missing tensors -> state, and a line for the report."""
    _check_shapes(source, state, wanted)
    if absent := [name for name in wanted if name not in state]:
        report.fresh += absent
        return {**checkpoint.initial(part, cfg, absent), **{n: state[n] for n in state}}, _line(source, state)
    return state, _line(source, state)


def _refuse(source: PartSource, missing: list[str], unexpected: list[str], partial: bool) -> None:
    if not (missing or unexpected) or partial:
        return
    lines = [f"{source.files[0]}: the {WORDS[source.part]} does not fit its layout ({source.layout})"]
    if missing:
        lines.append(f"{counted(len(missing), 'tensor')} missing: {_grouped(missing)}")
    if unexpected:
        lines.append(f"{counted(len(unexpected), 'tensor')} unexpected: {_grouped(unexpected)}")
    if reason := likely_reason(missing, unexpected):
        lines.append(reason)
    lines.append("--partial takes what fits; use.NAME=false says that a part is not there")
    raise ValueError("; ".join(lines))


LOCAL_BRANCH = {"local_image_concat", "local_temporal_encoder", "local_image_embedding"}


def likely_reason(missing: list[str], unexpected: list[str]) -> str:
    """A guess at why the names do not fit, in words; empty if there is none."""
    prefixes = {name.split(".")[0] for name in missing}
    if prefixes and prefixes <= LOCAL_BRANCH:
        return "this looks like a v1 base (ModelScope Image-to-Video): it has no local branch"
    if prefixes and prefixes <= LOCAL_BRANCH | {"fps_embedding", "context_embedding"}:
        return "this looks like a refiner (Video-to-Video or SR600): it has no image conditions"
    if any("pose" in n or "dwpose" in n or "randomref" in n for n in unexpected):
        return "this looks like a person variant or another model of the same family, with a pose branch"
    if any(name.startswith("module.") for name in unexpected):
        return "the names carry the prefix of a DistributedDataParallel wrapper (module.)"
    if missing and len(missing) < 50 and not unexpected:
        return "this looks like a truncated or partially saved file"
    return ""


def _check_shapes(source: PartSource, state: Mapping, wanted: Mapping[str, Tensor]) -> None:
    wrong = []
    for name in state:
        have, want = tuple(state[name].shape), tuple(wanted[name].shape)
        if have != want:
            wrong.append(f"{name} has shape {have}, the settings say {want}")
    if wrong:
        count = counted(len(wrong), "tensor")
        raise ValueError(f"{source.files[0]}: {count} of a wrong shape: {_some(wrong, '; ')}")


def _refuse_other_numbers(states: Mapping[str, Mapping[str, Tensor]]) -> None:
    for part, state in states.items():
        kinds = {name: state[name].dtype for name in state}
        if wrong := [name for name, kind in kinds.items() if not kind.is_floating_point]:
            raise ValueError(
                f"{part}: {counted(len(wrong), 'tensor')} without floating-point numbers: {wrong[0]} is "
                f"{str(kinds[wrong[0]])[6:]}; quantised weights are not read, give those that "
                "they were made from"
            )


def _refuse_nonfinite(states: Mapping[str, Mapping], report: Report, on_bytes: OnBytes | None) -> None:
    for part, state in states.items():
        total = sum(1 for _ in state)
        done = 0

        def tick(name: str, total: int = total) -> None:
            nonlocal done
            done += 1
            if on_bytes is not None:
                on_bytes(CHECKING, done, total)

        report.nonfinite += [f"{part}: {name}" for name in readers.find_nonfinite(state, on_tensor=tick)]
    if report.nonfinite:
        raise ValueError(
            f"NaN or infinity in {counted(len(report.nonfinite), 'tensor')}: {_some(report.nonfinite)}; "
            "--allow-nonfinite converts anyway"
        )


def origin(found: Sequence[PartSource], report: Report) -> dict[str, Any]:
    """The record saved with the weights: source files, contents, licence terms, converter version."""
    lineages, before = set(), {}
    for part in found:
        if part.origin or part.layout == "native":  # our record says what shapes cannot show
            before[str(part.files[0].parent)] = dict(part.origin)
        elif part.part == "unet":
            lineages.add(unet_vgen.lineage(part.tensors) if part.layout in ("vgen", "sd") else "released")
        else:
            lineages.add("vae" if part.part == "vae" else "clip")
    notes = [LICENCE_NOTES[name] for name in sorted(x for x in lineages if x)]
    notes += [note for held in before.values() for note in held.get("licence", ()) if note not in notes]
    return {
        "sources": report.sources,
        "parts": report.parts,
        "licence": [*notes, CONVERTED_NOTE] if CONVERTED_NOTE not in notes else notes,
        "before": list(before.values()),
        "notes": report.notes,
        "dropped": report.dropped,
        "freshly_initialised": report.fresh,
        "extra": {str(p.files[0].name): dict(p.extra) for p in found if p.extra},
        "converter": f"i2vgen {i2vgen.__version__}",
    }


def _describe(path: Path, on_bytes: OnBytes | None) -> dict[str, Any]:
    size = path.stat().st_size
    done = 0

    def tick(count: int) -> None:
        nonlocal done
        done += count
        if on_bytes is not None:
            on_bytes(f"hashing {path.name}", done, size)

    digest = records.sha256(path, on_bytes=tick)
    known = KNOWN_FILES.get(digest)
    return {
        "file": path.name,
        "bytes": size,
        "sha256": digest,
        "known": f"{known.name}: {known.note}" if known else None,
    }


def _line(source: PartSource, state: Mapping[str, Tensor]) -> str:
    parameters = sum(tensor.numel() for tensor in state.values())
    files = source.files[0].name + (f" and {len(source.files) - 1} more" if len(source.files) > 1 else "")
    count = f"{counted(len(state), 'tensor')}, {parameters:,} parameters"
    return f"{WORDS[source.part]} from {files} ({source.layout}): {count}"


def _merge(into: dict[str, Any], other: Mapping[str, Any]) -> None:
    for key, value in other.items():
        if isinstance(value, Mapping) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = dict(value) if isinstance(value, Mapping) else value


def _grouped(names: list[str]) -> str:
    """Count names by their first component: `input_blocks (12), out (4): input_blocks.0.0.weight, ...`"""
    groups: dict[str, int] = {}
    for name in names:
        groups[name.split(".")[0]] = groups.get(name.split(".")[0], 0) + 1
    return f"{', '.join(f'{g} ({n})' for g, n in groups.items())}: {_some(names)}"


def _some(names: list[str], separator: str = ", ") -> str:
    return separator.join(names[:6]) + (f"{separator}..." if len(names) > 6 else "")
