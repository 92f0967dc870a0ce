"""Case `memory`: what every memory plan takes at the official size, part by part, counted on `meta`; and what
weights in eight bits change in a clip of the shipped model, the one saving that is not exact.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor, nn

from i2vgen import pipeline
from i2vgen.bench.report import Report, Table
from i2vgen.memory import plans
from i2vgen.memory.free import GIB
from i2vgen.settings import shipped
from i2vgen.settings.config import Config, Runtime

# bfloat16 where the default on a GPU is half precision, float32 where the official code computes so.
HALF = {"dtype": "bfloat16"}
ALL_HALF = {**HALF, "encoder_dtype": "bfloat16", "vae_dtype": "bfloat16"}
DTYPES = {"UNet bfloat16, VAE and CLIP float32": HALF, "all bfloat16": ALL_HALF}


def run(network: type[nn.Module], config: Config | None = None) -> Report:
    """`network` is the other side's, which has no plans and is not counted here."""
    config = config or Config()
    tables, values = [], {}
    for title, dtypes in DTYPES.items():
        found = estimates(config, dtypes)
        values[title] = {plan: dataclasses.asdict(estimate) for plan, estimate in found.items()}
        values[title] |= {f"{plan}_gib": estimate.total / GIB for plan, estimate in found.items()}
        tables.append(table(f"{title}: GiB on the device, weights + activations", found))
    values["drift"] = found = drift()
    rows = tuple((how, f"{l2:.4f}", f"{psnr:.1f}") for how, (l2, psnr) in found.items())
    title = "weight_storage against native weights, a clip of the shipped model"
    tables.append(Table(title, ("", "latents, relative L2", "frames, PSNR dB"), rows))
    return Report(values, tuple(tables))


def drift() -> dict[str, tuple[float, float]]:
    """Storage -> relative L2 of the last latents, PSNR of the frames."""
    native, frames = shipped_clip("native")
    found = {}
    for how in ("int8", "float8"):
        latents, other = shipped_clip(how)
        error = ((frames - other) ** 2).mean().item()
        l2 = ((latents - native).norm() / native.norm()).item()
        found[how] = (l2, 10 * math.log10(255**2 / error) if error else math.inf)
    return found


def shipped_clip(how: str) -> tuple[Tensor, Tensor]:
    """Final latents [1 c f h w] and frames [f h w 3] as floats."""
    told = []
    model = pipeline.load("lab", overrides=["device=cpu", f"weight_storage={how}"])
    clip = model(
        shipped.STAR, "a yellow star moves to the right", seed=7, on_step=lambda info: told.append(info.x)
    )
    return told[-1], torch.from_numpy(clip.frames).float()


def estimates(config: Config, dtypes: dict[str, str]) -> dict[str, plans.Estimate]:
    # As on a GPU: what waits on the CPU takes nothing. The device itself is never asked.
    config = dataclasses.replace(config, runtime=dataclasses.replace(Runtime(), **dtypes))
    ledger = plans.Ledger(config)
    return {plan: ledger.estimate(plans.settle(config, plan, "cuda"), "cuda") for plan in plans.PLANS}


def table(title: str, found: dict[str, plans.Estimate]) -> Table:
    rows = []
    for plan, estimate in found.items():
        cells = (f"{m.weights / GIB:.2f} + {m.activations / GIB:.2f}" for m in estimate.moments)
        rows.append((plan, *cells, f"{estimate.total / GIB:.2f}"))
    first = next(iter(found.values()))
    return Table(title, ("", *(m.name for m in first.moments), "peak"), tuple(rows))
