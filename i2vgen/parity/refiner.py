"""Kinds `refiner_unet` and `i2v_v1`: the UNets of the preview cascade against ours, under their settings.

`i2v_v1` also holds a sampling run and the offset noise of the preview base. For sampling with the refiner,
see `refiner_flow.py`. Axes: b batch, f frames, n frames of all clips, c channels, h w rows and columns, k
context tokens, d width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor

from i2vgen.diffusion.sampler import Predict, ddim, guided
from i2vgen.diffusion.schedule import Schedule, make_betas
from i2vgen.model.conditioning import Conditions
from i2vgen.model.unet import UNet
from i2vgen.parity.report import Golden, Row, Settings, compare
from i2vgen.parity.unet import keep
from i2vgen.settings import config
from weights_conversion import rules, unet_vgen

# Bounds of the goldens' README on the outputs, tightened where rounding allows; the goldens themselves differ
# from float64 by 3.5e-6.
OUTPUT_ABS = {torch.float64: 1e-5, torch.float32: 2e-4, torch.float16: 5e-2, torch.bfloat16: 3e-1}
OUTPUT_L2 = {torch.float64: 1e-5, torch.float32: 1e-4, torch.float16: 1.5e-2, torch.bfloat16: 8e-2}
ACTIVATION_L2 = {torch.float64: 1e-5, torch.float32: 1e-5, torch.float16: 3e-2, torch.bfloat16: 2e-1}
GRADIENT = {torch.float64: 1e-5, torch.float32: 1e-4}
SAMPLING_ABS = 1e-4


def refiner_unet(golden: Golden, settings: Settings) -> Iterator[Row]:
    """Outputs and activations of both releases with the same weights, and gradients of the first."""
    inputs = {name: settings.cast(golden[f"in.{name}"]) for name in ("x", "y", "R")}
    t = golden["in.t"].to(settings.device)
    conditions = Conditions(inputs["y"], None, None, None)
    for out, mid, skip_filter in (("vid2vid", "mid.", "none"), ("sr600", "mid_sr600.", "sr600")):
        model, mapping = build(
            golden, settings, dataclasses.replace(config.REFINER_USE, skip_filter=skip_filter)
        )
        yield from forward(golden, settings, model, inputs["x"], t, conditions, mid, f"out.{out}")
        if out == "vid2vid" and settings.dtype in GRADIENT:
            yield from gradients(golden, settings, model, mapping, inputs, t)


def i2v_v1(golden: Golden, settings: Settings) -> Iterator[Row]:
    """The preview base: network, a DDIM run with its schedule and the closed-form model, offset noise."""
    model, _ = build(golden, settings, config.V1_USE)
    vector = settings.cast(golden["in.y"]).flatten(1)
    t, fps = (golden[f"in.{name}"].to(settings.device) for name in ("t", "fps"))
    conditions = Conditions(None, vector, None, fps)
    yield from forward(
        golden, settings, model, settings.cast(golden["in.x"]), t, conditions, "mid.", "out.v1"
    )

    wide = settings if not settings.half else dataclasses.replace(settings, dtype=torch.float32)
    noise, y, negative = (wide.cast(golden[f"ddim.{name}"]) for name in ("noise", "y", "y_neg"))
    visited = []

    def recorded(x: Tensor, t: Tensor) -> Tensor:
        visited.append(int(t[0]))
        return closed_form(y)(x, t)

    meta = golden.meta["ddim"]
    out = ddim(
        guided(recorded, closed_form(negative), meta["guide"]),
        noise,
        Schedule(v1_betas()),
        steps=meta["steps"],
        eta=float(meta["eta"]),
    )
    yield compare("ddim timesteps", torch.tensor(visited), golden["ddim.t"], exact=True)
    yield compare("ddim", out, golden["ddim.out"], max_abs=SAMPLING_ABS)
    base, offset = (wide.cast(golden[f"offset.{name}"]) for name in ("base", "offset"))
    yield compare("offset noise", base + 0.1 * offset, golden["offset.out"], max_abs=1e-6)


def v1_betas() -> Tensor:
    return make_betas(
        kind="linear_sd", num_timesteps=1000, zero_terminal_snr=False, init_beta=0.00085, last_beta=0.012
    )


def closed_form(y: Tensor) -> Predict:
    """The goldens' stand-in for a network with context y [b k d]; the formula is in their README."""
    mean = y.mean(dim=(1, 2)).view(-1, 1, 1, 1, 1)

    def predict(x: Tensor, t: Tensor) -> Tensor:
        t = t.to(x.dtype).view(-1, 1, 1, 1, 1)
        return (
            0.6 * torch.cos(t / 500) * x
            + 0.3 * torch.tanh(torch.roll(x, 1, dims=-1) + mean)
            + 0.1 * torch.sin(t / 100)
        )

    return predict


def build(golden: Golden, settings: Settings, use: config.Use) -> tuple[UNet, list[rules.Row]]:
    """-> our network with the golden's weights and the switches `use`, and the mapping used."""
    unet, _ = unet_vgen.settings({**golden.meta["config"], **golden.meta["fixed"]})
    with torch.device("meta"):
        model = UNet(unet, use)
    mapping = unet_vgen.rows(unet, use)
    theirs = {name.removeprefix("w."): golden[name].float() for name in golden if name.startswith("w.")}
    state = rules.to_ours(mapping, theirs)
    model.load_state_dict({name: settings.cast(tensor) for name, tensor in state.items()}, assign=True)
    return model.eval(), mapping


def forward(
    golden: Golden,
    settings: Settings,
    model: UNet,
    x: Tensor,
    t: Tensor,
    conditions: Conditions,
    mid: str,
    out: str,
) -> Iterator[Row]:
    """Compare every stored activation with the prefix `mid`, then the output named `out`."""
    seen: dict[str, Tensor] = {}
    handles = [m.register_forward_hook(keep(seen, name)) for name, m in model.named_modules()]
    with torch.no_grad():
        got = model(x, t, model.prepare(conditions, x.shape[2]))
    for handle in handles:
        handle.remove()
    places = entries(model)
    for name in sorted(name for name in golden if name.startswith(mid)):
        found = seen[places[name.removeprefix(mid)]]
        if found.ndim > 3:
            found = rearrange(found if found.ndim == 4 else found.flatten(0, 1), "n h w c -> n c h w")
        found = found.reshape(golden[name].shape) if found.ndim < 4 else found
        yield compare(name, found, golden[name], relative_l2=ACTIVATION_L2[settings.dtype])
    l2, worst = OUTPUT_L2[settings.dtype], OUTPUT_ABS[settings.dtype]
    yield compare(out, got, golden[out], relative_l2=l2, max_abs=worst)


def entries(model: UNet) -> dict[str, str]:
    """Official module path -> ours, for all modules that exist in both."""
    found = {"time_embed": "time", "fps_embedding": "stem.fps", "context_embedding": "stem.global_tokens.mlp"}
    found |= {"input_blocks.0.0": "conv_in", "input_blocks.0.1": "temporal_in"}

    def block(entry: str, ours: str, *, resample: str | None = None) -> None:
        parts = [
            name for name in ("spatial", "temporal") if getattr(model.get_submodule(ours), name) is not None
        ]
        found[f"{entry}.0"] = found[f"{entry}.0.temopral_conv"] = f"{ours}.temporal_conv"
        for i, part in enumerate(parts, start=1):
            found[f"{entry}.{i}"] = f"{ours}.{part}"
        if resample is not None:
            found[f"{entry}.{len(parts) + 1}"] = resample

    index = 1
    for level, stage in enumerate(model.down):
        for i in range(len(stage.blocks)):
            block(f"input_blocks.{index}", f"down.{level}.blocks.{i}")
            index += 1
        if stage.resample is not None:
            found[f"input_blocks.{index}"] = f"down.{level}.resample"
            index += 1
    block("middle_block", "mid1")
    found["middle_block.3"] = "mid2"
    index = 0
    for level in reversed(range(len(model.up))):
        stage = model.up[level]
        for i in range(len(stage.blocks)):
            last = i == len(stage.blocks) - 1 and stage.resample is not None
            resample = f"up.{level}.resample" if last else None
            block(f"output_blocks.{index}", f"up.{level}.blocks.{i}", resample=resample)
            index += 1
    return found


def gradients(
    golden: Golden,
    settings: Settings,
    model: UNet,
    mapping: list[rules.Row],
    inputs: dict[str, Tensor],
    t: Tensor,
) -> Iterator[Row]:
    """Gradients of mean(out.vid2vid * in.R) for x and for the parameters that the golden names."""
    x = inputs["x"].clone().requires_grad_()
    model.requires_grad_(True)
    prepared = model.prepare(Conditions(inputs["y"], None, None, None), x.shape[2])
    (model(x, t, prepared) * inputs["R"]).mean().backward()
    theirs = {row.theirs: row for row in mapping}
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    for name in sorted(name for name in golden if name.startswith("grad.")):
        key = name.removeprefix("grad.")
        got = x.grad if key == "x" else theirs[key].to_theirs(found)
        yield compare(name, got, golden[name], relative_l2=GRADIENT[settings.dtype])
    model.requires_grad_(False)


def sibling(golden: Golden, name: str) -> Golden:
    """Another golden file in the same folder."""
    return Golden(Path(golden.path).parent / name)
