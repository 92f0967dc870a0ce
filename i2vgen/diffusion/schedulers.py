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
NEEDED = ("config", "set_timesteps", "scale_model_input", "step", "init_noise_sigma", "alphas_cumprod")
OTHER_KIND = (
    "it is no scheduler of diffusers for networks that learn eps, v or x0 under a table of noise levels; "
    "take one that is, such as UniPCMultistepScheduler"
)
CLOSE = 1e-4  # schedulers keep float32 tables, and lift an abar of 0 a little to divide by it


class FromDiffusers:
    """A scheduler with `set_timesteps`, `timesteps`, `scale_model_input` and `step` -> `pipeline.Sampler`.

    Spacing, order and final step are the scheduler's own; `steps` is passed to `set_timesteps`. `eta` is
    DDIM's, and ValueError for schedulers without it.
    """

    def __init__(self, scheduler: Any, *, eta: float = 0.0):
        if isinstance(scheduler, type):
            raise ValueError(f"{scheduler.__name__} is a class; give an object of it, made with its options")
        if lacking := [part for part in NEEDED if getattr(scheduler, part, None) is None]:
            raise ValueError(f"{type(scheduler).__name__} has no {lacking[0]}: {OTHER_KIND}")
        self.scheduler, self.eta = scheduler, eta
        known = inspect.signature(scheduler.step).parameters
        if eta and not {"eta", "variance_noise"} <= set(known):
            raise ValueError(f"eta is {eta}, which {type(scheduler).__name__} does not have; leave it out")

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
        visited = self.scheduler.timesteps.tolist()
        if visited[0] < visited[-1]:
            name = type(self.scheduler).__name__
            raise ValueError(f"{name} goes from latents to noise, as pipeline.invert does; it cannot sample")
        if not torch.as_tensor(getattr(self.scheduler, "sigmas", 0.0)).isfinite().all():
            raise ValueError(f"the scheduler {NO_SIGNAL}; {advice(self.scheduler)}")
        x = at_least_float32(x) * self.scheduler.init_noise_sigma
        extra = {} if noise is None else randomness(self.scheduler, x, noise)
        starts_without = schedule.abar[int(visited[0])] == 0
        why = f"; it {NO_SIGNAL}: {advice(self.scheduler)}" if starts_without else ""
        watch = Watch(None, on_step, check_finite, why)
        for index, (t, now) in enumerate(zip(self.scheduler.timesteps, visited, strict=True)):
            own = torch.full((len(x),), now).to(torch.int64 if now == int(now) else torch.float64)
            out = call(predict, self.scheduler.scale_model_input(x, t), own)
            if self.eta:
                extra = {"eta": self.eta, "variance_noise": noise(x)}
            done = self.scheduler.step(at_least_float32(out), t, x, **extra)
            x, x0 = done.prev_sample, done.get("pred_original_sample", done.prev_sample)
            watch.step(StepInfo(index, len(visited), int(now), x, x0))
        watch.end()
        return x


def from_diffusers(scheduler: Any, *, eta: float = 0.0) -> FromDiffusers:
    return FromDiffusers(scheduler, eta=eta)


NO_SIGNAL = "divides by the signal and there is none at its first timestep"


def advice(scheduler: Any) -> str:
    """How to make such a scheduler so that it starts where some signal is left."""
    options = inspect.signature(type(scheduler)).parameters
    if "rescale_betas_zero_snr" in options:
        return "make it with rescale_betas_zero_snr=True, which leaves a little there"
    if "timestep_spacing" in options:
        return "make it with timestep_spacing='leading', steps_offset=1, which starts below that timestep"
    return "take a scheduler that can avoid this, such as UniPCMultistepScheduler"


def randomness(scheduler: Any, x: Tensor, noise: Noise) -> dict[str, Any]:
    """Schedulers that draw get a generator for each sample, seeded from the sample's own noise."""
    if "generator" not in inspect.signature(scheduler.step).parameters:
        return {}
    seeds = (noise(x).flatten(1)[:, 0].double() * 2**40).long().abs().tolist()
    return {"generator": [torch.Generator().manual_seed(seed) for seed in seeds]}


def check(scheduler: Any, schedule: Schedule) -> None:
    """ValueError unless the scheduler was made for these noise levels, this prediction and plain steps."""
    name = type(scheduler).__name__
    needed = [p.name for p in inspect.signature(scheduler.step).parameters.values() if p.default is p.empty]
    if len(needed) > 3:
        raise ValueError(f"{name} has steps of another kind: they need {', '.join(needed)}")
    wanted, got = PREDICTIONS.get(schedule.prediction), scheduler.config.get("prediction_type")
    if "prediction_type" not in scheduler.config:
        raise ValueError(f"{name} has no prediction_type: {OTHER_KIND}")
    if scheduler.config.get("use_flow_sigmas"):
        raise ValueError(
            "the scheduler was made with use_flow_sigmas=True, which are the noise levels of another kind of "
            "network: make it with use_flow_sigmas=False"
        )
    if wanted is None or got != wanted:
        raise ValueError(
            f"the scheduler's prediction_type is {got}, the network predicts {schedule.prediction}; make the "
            f"scheduler with prediction_type={wanted!r}"
        )
    abar = torch.as_tensor(scheduler.alphas_cumprod).double().cpu()
    if len(abar) != schedule.num_timesteps or not torch.allclose(abar, schedule.abar, rtol=0, atol=CLOSE):
        raise ValueError(
            "the scheduler has other noise levels than the model; make it with "
            "trained_betas=model.schedule.betas.numpy(), and without options that change these"
        )
    for limit in ("clip_sample", "thresholding"):
        if scheduler.config.get(limit):
            raise ValueError(
                f"the scheduler was made with {limit}=True, which limits x0 as if it were pixels; latents "
                f"leave that range: make it with {limit}=False"
            )
