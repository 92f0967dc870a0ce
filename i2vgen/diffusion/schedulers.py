"""Any scheduler object of diffusers as a sampler of ours; diffusers itself is not needed here.

scheduler = UniPCMultistepScheduler(
    trained_betas=model.schedule.betas.numpy(), prediction_type="v_prediction",
    timestep_spacing="trailing", rescale_betas_zero_snr=True,
)
model.generate(["boat.png"], ["a boat"], [1], sampler=schedulers.from_diffusers(scheduler))
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from i2vgen.diffusion.sampler import (
    Noise,
    OnStep,
    Predict,
    StepInfo,
    Watch,
    at_least_float32,
    call,
    check_latents,
)
from i2vgen.diffusion.schedule import Schedule

PREDICTIONS = {"v": "v_prediction", "eps": "epsilon", "x0": "sample"}
CLOSE = 1e-4  # schedulers keep float32 tables, and lift an abar of 0 a little to divide by it


class FromDiffusers:
    """A scheduler with `set_timesteps`, `timesteps`, `scale_model_input` and `step` -> `pipeline.Sampler`.

    Spacing, order and final step are the scheduler's own; `steps` is passed to `set_timesteps`.
    """

    def __init__(self, scheduler: Any):
        self.scheduler = scheduler

    @torch.no_grad()
    def __call__(
        self,
        predict: Predict,
        x: Tensor,
        schedule: Schedule,
        *,
        steps: int,
        noise: Noise | None = None,
        on_step: OnStep | None = None,
        check_finite: bool = True,
    ) -> Tensor:
        """Noise x [b c f h w] -> latents [b c f h w]; ValueError for a scheduler of other noise levels."""
        check_latents(x)
        check(self.scheduler, schedule)
        self.scheduler.set_timesteps(steps, device=x.device)
        if not torch.as_tensor(getattr(self.scheduler, "sigmas", 0.0)).isfinite().all():
            raise ValueError(
                "the scheduler divides by the signal and there is none at its first timestep; make it with "
                "rescale_betas_zero_snr=True, which leaves a little there"
            )
        visited = self.scheduler.timesteps.tolist()
        x = at_least_float32(x) * self.scheduler.init_noise_sigma
        extra = {} if noise is None else randomness(self.scheduler, x, noise)
        watch = Watch(schedule, on_step, check_finite)
        for index, (t, now) in enumerate(zip(self.scheduler.timesteps, visited, strict=True)):
            own = torch.full((len(x),), now).to(torch.int64 if now == int(now) else torch.float64)
            out = call(predict, self.scheduler.scale_model_input(x, t), own)
            done = self.scheduler.step(at_least_float32(out), t, x, **extra)
            x, x0 = done.prev_sample, done.get("pred_original_sample", done.prev_sample)
            watch.step(StepInfo(index, len(visited), int(now), x, x0))
        watch.end()
        return x


def from_diffusers(scheduler: Any) -> FromDiffusers:
    return FromDiffusers(scheduler)


def randomness(scheduler: Any, x: Tensor, noise: Noise) -> dict[str, Any]:
    """Schedulers that draw get a generator for each sample, seeded from the sample's own noise."""
    if "generator" not in inspect.signature(scheduler.step).parameters:
        return {}
    seeds = (noise(x).flatten(1)[:, 0].double() * 2**40).long().abs().tolist()
    return {"generator": [torch.Generator().manual_seed(seed) for seed in seeds]}


def check(scheduler: Any, schedule: Schedule) -> None:
    """ValueError unless the scheduler was made for these noise levels and this prediction."""
    wanted, got = PREDICTIONS.get(schedule.prediction), scheduler.config.get("prediction_type")
    if wanted is None or got != wanted:
        raise ValueError(
            f"the scheduler's prediction_type is {got}, the network predicts {schedule.prediction}; make the "
            f"scheduler with prediction_type={wanted!r}"
        )
    abar = torch.as_tensor(scheduler.alphas_cumprod).double().cpu()
    if len(abar) != schedule.num_timesteps or not torch.allclose(abar, schedule.abar, rtol=0, atol=CLOSE):
        raise ValueError(
            "the scheduler has other noise levels than the model; make it with "
            "trained_betas=model.schedule.betas.numpy()"
        )
