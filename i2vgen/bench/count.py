"""Case `count`: one guidance step of both implementations, counted on `meta`: no weights, no noise, no GPU.

Axes: b batch, f frames, c channels, h w latent rows and columns, k text tokens, d their width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import asdict

import torch
from torch import Tensor, nn

from i2vgen import pipeline
from i2vgen.bench.report import Report, Table
from i2vgen.fast import savings
from i2vgen.memory.meter import Meter, Operation
from i2vgen.model.conditioning import Conditions
from i2vgen.model.unet import UNet
from i2vgen.settings.config import SAVINGS, Config

META = torch.device("meta")
DTYPE = torch.bfloat16
FIGURES = {  # name -> (what one unit is, its size, decimals)
    "flops": ("TFLOP", 1e12, 3),
    "bytes": ("GB", 1e9, 1),
    "memory_bound_bytes": ("GB memory-bound", 1e9, 1),
    "operations": ("operations", 1, 0),
    "peak": ("peak GiB", 2**30, 2),
}
SHOWN = 12  # rows of the table per operation


# ---------------------------------------------------------------------------------------------------
# Ours


# Our ways to take a guidance step: settings of `runtime`.
PLANS = {
    "plain": {"savings": ("none",)},  # the plain networks, one call for each branch
    "fast": {},  # the default on a CPU
    "batched": {"batch_guidance": True},
    "low": {"token_chunk": 28_160},
    "fused": {"savings": tuple(SAVINGS)},  # the default on CUDA, kernels included
}

# Ratio, ours / theirs -> the figure and our plan; None as long as there is no such plan.
RATIOS = {
    "flops_ratio": ("flops", "fast"),
    "bytes_ratio": ("memory_bound_bytes", "fast"),
    "bytes_ratio_fused": ("memory_bound_bytes", "fused"),
    "peak_ratio": ("peak", "fast"),
    "peak_ratio_low": ("peak", "low"),
}


def count_ours(plan: Mapping[str, object], config: Config) -> Meter:
    config = dataclasses.replace(config, runtime=dataclasses.replace(config.runtime, **plan))
    with META:
        unet = UNet(config.unet, config.use)
    unet.to(DTYPE).eval().requires_grad_(False)
    savings.apply(unet, config.runtime)
    # The network of a guidance step is made of the UNet and the settings; nothing reads the other parts.
    model = pipeline.I2VGenXL(config, unet, None, None, META)
    with torch.no_grad(), Meter() as meter:
        x, t, cond = inputs(config, batch=1)
        predict = pipeline.network(model, cond, inputs(config, batch=1)[2])
        meter.restart()  # preparing is done once per video; what it leaves in memory stays counted
        predict(x.float(), t)
    return meter


def inputs(config: Config, batch: int) -> tuple[Tensor, Tensor, Conditions]:
    """Latent video [b c f h w], timestep [b] and what the encoders give."""
    unet, (h, w) = config.unet, config.latent_size

    def empty(*shape: int) -> Tensor:
        return torch.empty(batch, *shape, dtype=DTYPE, device=META)

    x, latent = empty(unet.in_channels, config.sample.frames, h, w), empty(unet.image_channels, h, w)
    text, vector = empty(config.clip.text_length, unet.context_width), empty(unet.image_vector_width)
    t = torch.empty(batch, dtype=torch.int64, device=META)
    return x, t, Conditions(text, vector, latent, torch.empty_like(t))


# ---------------------------------------------------------------------------------------------------
# Theirs


def count_theirs(network: type[nn.Module], config: Config) -> Meter:
    """diffusers' I2VGenXLUNet of the same shape, one call on the guidance pair as its pipeline makes it."""
    with META:
        unet = their_unet(network, config)
    # Not `.to(dtype)`: theirs warns about it, for checkpoints' sake.
    for parameter in unet.parameters():
        parameter.data = parameter.data.to(DTYPE)
    unet.eval().requires_grad_(False)
    with torch.no_grad(), Meter() as meter:
        x, t, conditions = inputs(config, batch=2)
        planes = torch.empty_like(x)  # its pipeline puts the image latent and the frame positions here
        meter.restart()
        unet(
            x,
            timestep=t,
            fps=conditions.fps,
            image_latents=planes,
            image_embeddings=conditions.image_vector,
            encoder_hidden_states=conditions.text,
            return_dict=False,
        )
    return meter


def their_unet(network: type[nn.Module], config: Config) -> nn.Module:
    """diffusers' class for our settings; what is not its argument must have the released model's value."""
    unet = config.unet
    side = {True: "CrossAttn{}Block3D", False: "{}Block3D"}
    return network(
        in_channels=unet.in_channels,
        out_channels=unet.out_channels,
        block_out_channels=unet.widths,
        layers_per_block=unet.blocks_per_level,
        down_block_types=tuple(side[on].format("Down") for on in unet.attention_levels),
        up_block_types=tuple(side[on].format("Up") for on in reversed(unet.attention_levels)),
        norm_num_groups=unet.norm_groups,
        cross_attention_dim=unet.context_width,
        attention_head_dim=unet.head_width,
    )


# ---------------------------------------------------------------------------------------------------
# Both


def run(network: type[nn.Module], config: Config | None = None) -> Report:
    """`network` is the class diffusers.I2VGenXLUNet; the default size is the released model's."""
    config = config or Config()
    their, our = count_theirs(network, config), {n: count_ours(plan, config) for n, plan in PLANS.items()}
    theirs, ours = figures(their), {name: figures(meter) for name, meter in our.items()}
    found = ratios(theirs, ours)
    size = [config.sample.frames, *config.latent_size]
    values = found | {
        "size": size,
        "dtype": str(DTYPE).removeprefix("torch."),
        "diffusers": theirs,
        "ours": ours,
        "operations": {
            "diffusers": operations(their),
            "ours": {name: operations(meter) for name, meter in our.items()},
        },
    }
    meters = {"diffusers": their} | {f"ours, {name}": meter for name, meter in our.items()}
    return Report(values, (_totals(meters, size), _by_operation(meters), _ratios(found)))


def figures(meter: Meter) -> dict[str, int]:
    return {name: getattr(meter, name) for name in FIGURES}


def operations(meter: Meter) -> list[dict]:
    return [asdict(row) for row in meter.table]


def ratios(theirs: dict[str, int], ours: dict[str, dict[str, int]]) -> dict[str, float | None]:
    """Figures of both sides, ours by plan -> `RATIOS`"""
    return {
        ratio: round(ours[plan][name] / theirs[name], 4) if plan in ours else None
        for ratio, (name, plan) in RATIOS.items()
    }


def _totals(meters: dict[str, Meter], size: list[int]) -> Table:
    title = f"one guidance step at {'x'.join(map(str, size))} (frames x latent rows x columns), {DTYPE}"
    rows = []
    for side, meter in meters.items():
        found = figures(meter)
        cells = (f"{found[name] / unit:,.{digits}f}" for name, (_, unit, digits) in FIGURES.items())
        rows.append((side, *cells))
    return Table(title, ("", *(heading for heading, _, _ in FIGURES.values())), tuple(rows))


def _by_operation(meters: dict[str, Meter]) -> Table:
    """Where the bytes go, largest of any side first."""
    found: dict[str, dict[str, Operation]] = {}
    for side, meter in meters.items():
        for row in meter.table:
            found.setdefault(row.name, {})[side] = row
    order = sorted(found, key=lambda name: -max(row.bytes for row in found[name].values()))
    rows = []
    for name in order[:SHOWN]:
        cells = (found[name].get(side, Operation(name, False)) for side in meters)
        rows.append((name, *(f"{cell.bytes / 1e9:.1f} ({cell.calls})" for cell in cells)))
    return Table("GB (calls) by operation", ("", *meters), tuple(rows))


def _ratios(found: dict[str, float | None]) -> Table:
    rows = ((name, "none yet" if value is None else f"{value:.3f}") for name, value in found.items())
    return Table("ours / diffusers", ("", "ratio"), tuple(rows))
