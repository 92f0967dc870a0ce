"""Cost and error of sampling settings: network calls per clip, and the distance to a reference clip.

The reference is DDIM with many steps from the same noise: the exact solution of the network's ODE. It need
not be a good clip; for quality, see the scores of an evaluation.

Axes: f frames, H W pixel rows and columns.
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
CACHES = (2, 3)  # values of `sample.deep_cache` that the sweep "quality" adds to the presets
CALLS = (5, 10, 20, 40)  # for the sweep "samplers"; with guidance, one call covers both branches
# euler equals ddim, and ancestral must visit every timestep.
SAMPLERS = ("ddim", *(name for name in SOLVERS if name != "euler"))


@dataclass(frozen=True)
class Drift:
    """One row: UNet calls per clip (both branches of guidance counted) and the distance to the reference."""

    whole: int
    outer: int  # calls that computed only the outer blocks (`sample.deep_cache`)
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
    """The clips of one row, uint8 [f H W 3] each if they are kept, and the number of UNet calls they took."""

    def __init__(self):
        self.clips: dict[int, np.ndarray] = {}  # by their places
        self.batches = self.whole = self.outer = 0

    def count(self, _: nn.Module, inputs: tuple, options: dict) -> None:
        (x, _, prepared), deep = inputs[:3], options.get("deep")
        # A custom network may prepare something else; it is called once per branch.
        branches = len(prepared.context) // len(x) if isinstance(prepared, Prepared) else 1
        if deep is not None and deep.features is not None:
            self.outer += branches
        else:
            self.whole += branches

    def add(self, other: Sampled) -> None:
        """What another process sampled of this row"""
        self.clips |= other.clips
        self.batches += other.batches
        self.whole += other.whole
        self.outer += other.outer


@contextmanager
def counting(unet: nn.Module, sampled: Sampled) -> Iterator[None]:
    """Count the calls of `unet` while one batch is sampled; only an nn.Module can be counted."""
    sampled.batches += 1
    hook = None
    if isinstance(unet, nn.Module):
        hook = unet.register_forward_pre_hook(sampled.count, with_kwargs=True)
    try:
        yield
    finally:
        if hook is not None:
            hook.remove()


def drift(row: Sampled, reference: Sampled) -> Drift:
    """Compare two rows of the same clips."""
    pairs = [(clip, reference.clips[place]) for place, clip in sorted(row.clips.items())]
    ours, theirs = (np.stack(side).astype(np.float64) / 127.5 - 1 for side in zip(*pairs, strict=True))
    return Drift(
        whole=row.whole // row.batches,
        outer=row.outer // row.batches,
        psnr=float(np.mean([psnr(a, b) for a, b in pairs])),
        relative=float(np.linalg.norm(ours - theirs) / max(np.linalg.norm(theirs), 1e-12)),
    )


def settings(config: Config, sweep: str) -> list[tuple[str, Config]]:
    """Name and settings of each row of the sweep "quality" or "samplers", the reference first."""
    exact = with_quality(config, "exact")
    steps = min(REFERENCE_STEPS, config.schedule.num_timesteps)
    rows = [(f"reference, {steps} steps", _sampled(exact, {"steps": steps}))]
    if sweep == "quality":
        rows += [(name, with_quality(config, name)) for name in QUALITIES]
        fast = with_quality(config, "fast")
        return rows + [(f"fast, deep_cache={n}", _sampled(fast, {"deep_cache": n})) for n in CACHES]
    for sampler in SAMPLERS:
        for calls in CALLS:
            steps = (calls + 1) // 2 if sampler == "heun" else calls  # two calls per step except the last
            how = {"sampler": sampler, "steps": steps, "spacing": "trailing", "final_alpha": "one"}
            rows.append((f"{sampler}, {steps} steps", _sampled(exact, how)))
    return rows


def _sampled(config: Config, changes: dict) -> Config:
    return dataclasses.replace(config, sample=dataclasses.replace(config.sample, **changes))
