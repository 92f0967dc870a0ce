"""The whole loop of 50 steps: what it takes, and how much of that is neither UNet nor VAE."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from statistics import median

import torch
from torch import Tensor

from i2vgen import pipeline
from i2vgen.bench import pair
from i2vgen.bench.peer import Peer
from i2vgen.bench.timing import Clock, clock_of
from i2vgen.diffusion.sampler import Predict, ddim

STEPS = 50
FEW = 4  # steps where the whole loop is not asked for


class Timed:
    """A network whose calls are timed: `Timed(network, clock)(x, t)`, then `seconds`, one for every call."""

    def __init__(self, predict: Predict, clock: Clock):
        self.predict, self.clock, self.seconds = predict, clock, []

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        kept: list[Tensor] = []
        self.seconds.append(self.clock(lambda: kept.append(self.predict(x, t))))
        return kept[0]


def measure(both: pair.Pair, peer: Peer, changed: Mapping[str, object], *, full: bool) -> dict:
    """-> the figures for the top of a report; `full` runs all 50 steps of both sides, else a few of ours.

    `changed` are our settings of `runtime`.
    """
    settings, device, clock = both.config, both.device, clock_of(both.device)
    inputs = both.inputs()
    model = both.ours(changed, vae=pair.random_part("vae", settings, device, both.dtype))
    steps = STEPS if full else FEW

    latents: list[Tensor] = []
    with torch.no_grad():
        timed = Timed(pipeline.network(model, inputs.cond, inputs.uncond), clock)
        whole = clock(lambda: latents.append(sample(timed, model, inputs.x, steps)))
        decoding = clock(lambda: pipeline.decode(model, latents[0]))
    outside = (whole - sum(timed.seconds)) / len(timed.seconds)
    step = median(timed.seconds)
    figures = {
        "loop_overhead": round(outside / (outside + step), 5),
        "loop_steps": len(timed.seconds),
        "vae_decode_seconds": round(decoding, 3),
        "seconds_per_video": round(whole, 2) if full else None,
        "seconds_per_video_diffusers": None,
        "seconds_per_video_estimated": round(STEPS * (step + outside), 2),
    }
    if full:
        theirs = pair.their_network(both.theirs(peer), inputs, settings.sample.guidance)
        figures["seconds_per_video_diffusers"] = round(their_loop(theirs, model, inputs.x, clock), 2)
    return figures


def sample(predict: Predict, model: pipeline.I2VGenXL, x: Tensor, steps: int) -> Tensor:
    return ddim(predict, x, model.schedule, steps=steps, spacing="leading", final_alpha="one")


def their_loop(predict: Callable, model: pipeline.I2VGenXL, x: Tensor, clock: Clock) -> float:
    """Their network under our sampler: its scheduler takes the same handful of operations per step."""
    with torch.no_grad():
        return clock(lambda: sample(predict, model, x, STEPS))
