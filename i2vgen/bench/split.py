"""Case `parallel`: what one of several cards computes and sends in a guidance step at the official size.

Arithmetic, bytes and exchanges are counted on `meta`, in the first process of an imagined run; seconds are
computed from them and from one card's measured step, never measured.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import nn

from i2vgen import pipeline
from i2vgen.bench.count import DTYPE, META, PLANS, inputs
from i2vgen.bench.report import Report, Table
from i2vgen.fast import parallel, savings
from i2vgen.memory.meter import Meter
from i2vgen.model.unet import UNet
from i2vgen.settings.config import Config

# Branches of guidance and shares of the frames.
SPLITS = {
    "one card": (1, 1),
    "guidance, 2": (2, 1),
    "frames, 2": (1, 2),
    "both, 4": (2, 2),
    "frames, 4": (1, 4),
    "both, 8": (2, 4),
    "frames, 8": (1, 8),
}
# One H200, docs/performance.md: a step at the official size, a matrix product, a copy.
STEP, PRODUCT, COPY = 0.425, 790e12, 4185e9
# Assumed of each direction between two cards: bytes per second, and seconds before the first byte.
LINKS = {"NVLink": (300e9, 15e-6), "PCIe": (20e9, 30e-6)}


@dataclasses.dataclass(frozen=True)
class Counted:
    """One process, one guidance step"""

    flops: int
    memory_bound_bytes: int
    peak: int
    sent: int  # bytes
    exchanges: int

    @property
    def ideal(self) -> float:
        """Seconds at the rates of a product and of a copy"""
        return self.flops / PRODUCT + self.memory_bound_bytes / COPY


def count(branches: int, frames: int, config: Config, dtype: torch.dtype = DTYPE) -> Counted:
    """Under the savings of `config.runtime`, kernels included where they are named"""
    with META:
        unet = UNet(config.unet, config.use)
    unet.to(dtype).eval().requires_grad_(False)
    savings.apply(unet, config.runtime)
    ranks = parallel.imagined(branches, frames)
    parallel.apply(unet, ranks)
    model = pipeline.I2VGenXL(config, unet, None, None, META)
    model.ranks = ranks
    with torch.no_grad(), Meter() as meter:
        x, t, cond = inputs(config, batch=1)
        predict = pipeline.network(model, cond, inputs(config, batch=1)[2])
        meter.restart()
        predict(x.float(), t)
    exchanges = ranks.frames.exchanges + ranks.branches.exchanges
    return Counted(meter.flops, meter.memory_bound_bytes, meter.peak, ranks.sent, exchanges)


def run(network: type[nn.Module], config: Config | None = None) -> Report:
    """`network` is the other side's, which is not split and not counted here."""
    config = config or Config()
    config = dataclasses.replace(config, runtime=dataclasses.replace(config.runtime, **PLANS["fused"]))
    found = {name: count(*split, config) for name, split in SPLITS.items()}
    one = found["one card"]
    rows, values = [], {}
    for name, counted in found.items():
        computing = STEP * counted.ideal / one.ideal
        seconds = {
            link: computing + counted.sent / rate + counted.exchanges * latency
            for link, (rate, latency) in LINKS.items()
        }
        values[name] = {**dataclasses.asdict(counted), "computed_seconds": seconds}
        rows.append(
            (
                name,
                f"{counted.flops / 1e12:.1f}",
                f"{counted.memory_bound_bytes / 1e9:.1f}",
                f"{counted.peak / 2**30:.2f}",
                f"{counted.sent / 1e6:,.0f}",
                f"{counted.exchanges}",
                *(f"{s:.3f} ({STEP / s:.1f} x)" for s in seconds.values()),
            )
        )
    size = "x".join(map(str, (config.sample.frames, *config.latent_size)))
    heads = ("", "TFLOP", "GB memory-bound", "peak GiB", "MB sent", "exchanges")
    title = f"each process, one guidance step at {size}, {DTYPE}; seconds are computed, not measured"
    return Report(values, (Table(title, (*heads, *(f"seconds, {link}" for link in LINKS)), tuple(rows)),))
