"""What a way of sampling costs and how far it leads: network calls per clip, and frames against a reference.

The reference is DDIM with many steps from the same noise: the exact solution of what the network says, which
is not the same as a good clip. The scores of an evaluation tell that.

Axes: f frames, H W pixels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from torch import nn

from i2vgen.diffusion.solvers import SOLVERS
from i2vgen.model.conditioning import Prepared
from i2vgen.scoring.metrics import psnr
from i2vgen.settings.config import QUALITIES, Config
from i2vgen.settings.merge import with_quality

REFERENCE_STEPS = 200
CACHES = (2, 3)  # of `quality`, beside the presets: what the cache of the deep part would save and cost
CALLS = (5, 10, 20, 40)  # of `samplers`; with guidance each is one call of both branches
# euler is ddim in other words, ancestral visits every timestep.
SAMPLERS = ("ddim", *(name for name in SOLVERS if name != "euler"))


@dataclass(frozen=True)
class Drift:
    """One row: UNet calls per clip, a pair of guidance counting two, and the distance to the reference."""

    whole: int
    outer: int  # calls that computed the outer blocks only (`sample.deep_cache`)
    psnr: float  # mean over clips, dB
    relative: float  # L2 of the difference over L2 of the reference, values from -1 to 1

    def to_dict(self) -> dict:
        return {
            "calls": self.whole,
            "outer_calls": self.outer,
            "drift_psnr": round(self.psnr, 3),
            "drift_relative": round(self.relative, 5),
        }


class Sampled:
    """The clips of one row, uint8 [f H W 3] each if they are kept, and the calls of the UNet behind them."""

    def __init__(self):
        self.clips: list[np.ndarray] = []
        self.batches = self.whole = self.outer = 0

    def count(self, _: nn.Module, inputs: tuple) -> None:
        x, _, prepared, deep = (*inputs, None)[:4]
        # A network of one's own may prepare something else: it is called once for each branch.
        branches = len(prepared.context) // len(x) if isinstance(prepared, Prepared) else 1
        if deep is not None and deep.kept:
            self.outer += branches
        else:
            self.whole += branches


@contextmanager
def counting(unet: nn.Module, sampled: Sampled) -> Iterator[None]:
    """Inside, one batch is sampled with this network; one that is no module is not counted."""
    sampled.batches += 1
    hook = unet.register_forward_pre_hook(sampled.count) if isinstance(unet, nn.Module) else None
    try:
        yield
    finally:
        if hook is not None:
            hook.remove()


def drift(row: Sampled, reference: Sampled) -> Drift:
    """Of the same clips in the same order."""
    ours, theirs = (np.stack(one.clips).astype(np.float64) / 127.5 - 1 for one in (row, reference))
    return Drift(
        whole=row.whole // row.batches,
        outer=row.outer // row.batches,
        psnr=float(np.mean([psnr(a, b) for a, b in zip(row.clips, reference.clips, strict=True)])),
        relative=float(np.linalg.norm(ours - theirs) / max(np.linalg.norm(theirs), 1e-12)),
    )


def settings(config: Config, sweep: str) -> list[tuple[str, Config]]:
    """Name and settings of the rows of "quality" or "samplers"; the reference first."""
    exact = with_quality(config, "exact")
    steps = min(REFERENCE_STEPS, config.schedule.num_timesteps)
    rows = [(f"reference, {steps} steps", _sampled(exact, {"steps": steps}))]
    if sweep == "quality":
        rows += [(name, with_quality(config, name)) for name in QUALITIES]
        fast = with_quality(config, "fast")
        return rows + [(f"fast, deep_cache={n}", _sampled(fast, {"deep_cache": n})) for n in CACHES]
    for sampler in SAMPLERS:
        for calls in CALLS:
            steps = (calls + 1) // 2 if sampler == "heun" else calls  # two calls per step but for the last
            how = {"sampler": sampler, "steps": steps, "spacing": "trailing", "final_alpha": "one"}
            rows.append((f"{sampler}, {steps} steps", _sampled(exact, how)))
    return rows


def _sampled(config: Config, changes: dict) -> Config:
    return dataclasses.replace(config, sample=dataclasses.replace(config.sample, **changes))
