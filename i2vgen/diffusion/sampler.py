"""Samplers: functions from noise to latents with one signature, whatever the network is.

A network enters as `Predict`: a function of x_t [b c f h w] and t int64 [b]. t is on the CPU, so that code
which depends on it need not wait for the GPU; moving it, conditions, guidance and number formats are up to
`Predict`. The state x is kept in at least float32. DDIM and its relatives are here, faster solvers in
`solvers.py`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from i2vgen.diffusion.schedule import EpsForm, Schedule, Spacing, inversion_timesteps, next_levels, timesteps

Predict = Callable[[Tensor, Tensor], Tensor]
Noise = Callable[[Tensor], Tensor]


class StepInfo(NamedTuple):
    """What `on_step` receives: step `index` of `num_steps` at timestep `t` gave `x0` and moved on to `x`."""

    index: int
    num_steps: int
    t: int
    x: Tensor
    x0: Tensor


OnStep = Callable[[StepInfo], None]


def guided(
    cond: Predict,
    uncond: Predict,
    scale: float,
    *,
    precision: Literal["float32", "network"] = "float32",
    rescale: float = 0.0,
) -> Predict:
    """Classifier-free guidance: u + scale (c - u), the conditional pass first. -> Predict

    `scale` 1 is the conditional network itself, one pass per step. "float32" combines in at least float32;
    "network" in the output's own dtype, which is float16 in the official code under autocast. `rescale` is
    that of `rescaled`. ValueError if `scale` is not finite.
    """
    pair = guided_pair(
        lambda x, t: torch.cat([cond(x, t), uncond(x, t)]), scale, precision=precision, rescale=rescale
    )
    return cond if scale == 1.0 else pair


def guided_pair(
    both: Predict,
    scale: float,
    *,
    precision: Literal["float32", "network"] = "float32",
    rescale: float = 0.0,
) -> Predict:
    """`guided` for a network that gives both predictions at once, c then u: x [b ...] -> [(2 b) ...]."""
    if not math.isfinite(scale):
        raise ValueError(f"guidance scale is {scale}; give a finite number, 1 for no guidance")
    if not 0 <= rescale <= 1:
        raise ValueError(f"guidance rescale is {rescale}; give a number from 0 (none) to 1")
    if precision not in ("float32", "network"):
        raise ValueError(f"guidance precision is {precision!r}; choose float32 or network")

    def predict(x: Tensor, t: Tensor) -> Tensor:
        c, u = both(x, t).chunk(2)
        if precision == "float32":
            c, u = at_least_float32(c), at_least_float32(u)
        out = u + scale * (c - u)
        return rescaled(out, c, rescale) if rescale > 0 else out

    return predict


def rescaled(out: Tensor, cond: Tensor, share: float) -> Tensor:
    """Guided and conditional prediction [b c f h w] -> the guided one with less of its excess contrast.

    Per sample, `share` of the way from its own standard deviation to that of the conditional prediction, in
    at least float32 (Lin et al. 2023, section 3.4; they use 0.7).
    """
    out, cond = at_least_float32(out), at_least_float32(cond)
    axes = tuple(range(1, out.ndim))
    ratio = cond.std(axes, keepdim=True) / out.std(axes, keepdim=True).clamp(min=1e-12)
    return out * (1 + share * (ratio - 1))


def between(low: float, high: float, inside: Predict, outside: Predict) -> Predict:
    """`inside` where low <= t <= high, `outside` elsewhere. -> Predict"""

    def predict(x: Tensor, t: Tensor) -> Tensor:
        return (inside if low <= int(t[0]) <= high else outside)(x, t)

    return predict


def visits(
    schedule: Schedule, steps: int, spacing: Spacing, own: Sequence[int] | None
) -> tuple[list[int], list[int]]:
    """-> the timesteps of a sampler, and the noise level that the step from each lands on.

    `own`, falling timesteps, take the place of `steps` and `spacing`. ValueError if they cannot be visited.
    """
    if own is None:
        return tuple(grid(schedule.num_timesteps, steps, spacing) for grid in (timesteps, next_levels))
    visited, last = [int(t) for t in own], schedule.num_timesteps - 1
    falling = all(before > after for before, after in itertools.pairwise(visited))
    if not visited or not falling or visited != list(own) or not 0 <= visited[-1] <= visited[0] <= last:
        raise ValueError(f"timesteps are {list(own)}; give falling whole numbers from {last} to 0")
    return visited, [*visited[1:], 0]


@torch.no_grad()
def ddim(
    predict: Predict,
    x: Tensor,
    schedule: Schedule,
    *,
    steps: int,
    spacing: Spacing = "official",
    timesteps: Sequence[int] | None = None,
    eta: float = 0.0,
    eps_form: EpsForm = "direct",
    final_alpha: Literal["first", "one"] = "first",
    clamp: float | None = None,
    percentile: float | None = None,
    noise: Noise | None = None,
    on_step: OnStep | None = None,
    check_finite: bool = True,
) -> Tensor:
    """Noise x [b c f h w] -> latents [b c f h w] by DDIM (Song et al. 2021, eq. 12), in at least float32.

    `steps` and `spacing` choose the timesteps (`schedule.timesteps`; "official" may take more than `steps`),
    unless they are given themselves, as `timesteps`.
    `eta` 0 is deterministic, 1 as noisy as ancestral sampling; `noise` draws z like x, called only where it
    is used. `final_alpha` is the signal power that the last step lands on: "first" is abar[0] as in the
    official code, which leaves sqrt(1 - abar[0]) of eps in the result; "one" returns x0. `clamp` or
    `percentile` limit x0 (`limit_x0`). `eps_form="recovered"` keeps the official order of operations, its NaN
    at abar = 0 included. No gradients. ValueError for settings outside their range, FloatingPointError when x
    stops being finite (`check_finite`).
    """
    check_latents(x)
    if not 0 <= eta <= 1:
        raise ValueError(f"eta is {eta}; give a number from 0 (deterministic) to 1 (ancestral)")
    if eta > 0 and noise is None:
        raise ValueError(f"eta is {eta} but no `noise` was given; pass a function that draws noise like x")
    if final_alpha not in ("first", "one"):
        raise ValueError(f"final_alpha is {final_alpha!r}; choose first or one")
    visited, levels = visits(schedule, steps, spacing, timesteps)
    x = at_least_float32(x)
    # Coefficients of all steps [n 1 1 1 1]: float32 operations on picked values, as in the official code.
    abar = schedule.pick(schedule.abar, torch.tensor(visited), x)
    abar_to = schedule.pick(schedule.abar, torch.tensor(levels), x)
    if final_alpha == "one":
        abar_to[-1] = 1
    sigma = eta * torch.sqrt((1 - abar_to) / (1 - abar) * (1 - abar / abar_to))
    rest = (1 - abar_to - sigma**2).clamp(min=0)  # eta 1 at abar = 0 can round to just below 0
    of_x0, of_eps = torch.sqrt(abar_to), torch.sqrt(rest)
    watch = Watch(schedule, on_step, check_finite)
    for index, now in enumerate(visited):
        x0, eps = _estimate(predict, x, timestep(now, x), schedule, eps_form, clamp, percentile)
        x = of_x0[index] * x0 + of_eps[index] * eps
        if eta > 0 and now > 0:
            x = x + sigma[index] * noise(x)
        watch.step(StepInfo(index, len(visited), now, x, x0))
    watch.end()
    return x


@torch.no_grad()
def ddim_invert(
    predict: Predict,
    x: Tensor,
    schedule: Schedule,
    *,
    steps: int,
    eps_form: EpsForm = "direct",
    on_step: OnStep | None = None,
    check_finite: bool = True,
) -> Tensor:
    """Clean latents x [b c f h w] -> the noise [b c f h w] that DDIM turns into them, in at least float32.

    Visits 0, stride, 2 stride, ... upwards and ends on pure eps (`schedule.inversion_timesteps`): for T
    timesteps ceil(T / (T // steps)) network calls. Errors as in `ddim`.
    """
    visited, levels = inversion_timesteps(schedule.num_timesteps, steps)
    return invert_along(predict, x, schedule, visited, levels, eps_form, on_step, check_finite)


def invert_along(
    predict: Predict,
    x: Tensor,
    schedule: Schedule,
    visited: Sequence[int],
    levels: Sequence[int],
    eps_form: EpsForm = "direct",
    on_step: OnStep | None = None,
    check_finite: bool = True,
) -> Tensor:
    """`ddim_invert` with one call at each timestep of `visited`, each going to its level of `levels`."""
    check_latents(x)
    x = at_least_float32(x)
    watch = Watch(schedule, on_step, check_finite)
    for index, (now, level) in enumerate(zip(visited, levels, strict=True)):
        t, to = timestep(now, x), timestep(level, x)
        x, x0 = invert_step(predict, x, t, to, schedule, eps_form=eps_form)
        watch.step(StepInfo(index, len(visited), now, x, x0))
    watch.end()
    return x


def invert_step(
    predict: Predict, x: Tensor, t: Tensor, level: Tensor, schedule: Schedule, *, eps_form: EpsForm = "direct"
) -> tuple[Tensor, Tensor]:
    """x [b c f h w] at t int64 [b] -> (x at `level` int64 [b], x0), both [b c f h w]. Level T is noise."""
    x0, eps = _estimate(predict, x, t, schedule, eps_form, None, None)
    abar_to = schedule.pick(schedule.abar_to_noise, level, x)
    return torch.sqrt(abar_to) * x0 + torch.sqrt(1 - abar_to) * eps, x0


@torch.no_grad()
def ancestral(
    predict: Predict,
    x: Tensor,
    schedule: Schedule,
    *,
    noise: Noise,
    clamp: float | None = None,
    percentile: float | None = None,
    on_step: OnStep | None = None,
    check_finite: bool = True,
) -> Tensor:
    """Noise x [b c f h w] -> latents [b c f h w] over all T steps (Ho et al. 2020, algorithm 2).

    The state is kept in at least float32. `noise` draws z like x, once per step except the last; its size
    follows `schedule.variance`. `clamp` or `percentile` limit x0 (`limit_x0`).
    FloatingPointError when x stops being finite (`check_finite`).
    """
    check_latents(x)
    x = at_least_float32(x)
    watch = Watch(schedule, on_step, check_finite)
    for index, now in enumerate(reversed(range(schedule.num_timesteps))):
        t = timestep(now, x)
        step = schedule.model_distribution(call(predict, x, t), x, t)
        x0, mean = limit_x0(step.x0, clamp=clamp, percentile=percentile), step.mean
        if x0 is not step.x0:
            mean = schedule.q_posterior(x0, x, t)[0]
        x = mean
        if now > 0:
            x = x + torch.exp(0.5 * step.log_variance) * noise(x)
        watch.step(StepInfo(index, schedule.num_timesteps, now, x, x0))
    watch.end()
    return x


def limit_x0(x0: Tensor, *, clamp: float | None = None, percentile: float | None = None) -> Tensor:
    """x0 [b c f h w] -> the same, limited; unchanged if neither is given, ValueError if both are.

    `clamp` clips to [-clamp, clamp]. `percentile` p in (0, 1] is Imagen's dynamic thresholding: per sample,
    s = max(p-quantile of |x0|, 1), clip to [-s, s], divide by s. (The official code shapes s for four axes.)
    """
    if clamp is not None and percentile is not None:
        raise ValueError(f"clamp {clamp} and percentile {percentile} exclude each other; give one")
    if percentile is not None:
        if not 0 < percentile <= 1:
            raise ValueError(f"percentile is {percentile}; give a number above 0 and at most 1")
        s = torch.stack([torch.quantile(sample.abs().flatten(), percentile) for sample in x0])
        s = s.clamp(min=1).view(-1, 1, 1, 1, 1)
        return torch.maximum(torch.minimum(x0, s), -s) / s
    if clamp is not None:
        if not clamp > 0:
            raise ValueError(f"clamp is {clamp}; give a positive number")
        return x0.clamp(-clamp, clamp)
    return x0


def _estimate(
    predict: Predict,
    x: Tensor,
    t: Tensor,
    schedule: Schedule,
    eps_form: EpsForm,
    clamp: float | None,
    percentile: float | None,
) -> tuple[Tensor, Tensor]:
    """x [b c f h w], t int64 [b] on the CPU -> (x0, eps), both [b c f h w]; eps follows a limited x0."""
    out = call(predict, x, t)
    x0 = limit_x0(schedule.to_x0(out, x, t), clamp=clamp, percentile=percentile)
    if eps_form == "direct" and clamp is None and percentile is None:
        return x0, schedule.to_eps(out, x, t)
    return x0, schedule.eps_from_x0(x0, x, t, form=eps_form)


def call(predict: Predict, x: Tensor, t: Tensor) -> Tensor:
    """x [b c f h w], t int64 [b] -> the network's output [b c f h w]; ValueError for any other shape."""
    out = predict(x, t)
    if out.shape != x.shape:
        raise ValueError(
            f"the network returned {tuple(out.shape)} for latents {tuple(x.shape)}; want the same"
        )
    return out


def timestep(t: int, x: Tensor) -> Tensor:
    """-> int64 [b] on the CPU, where the schedule's tables are: picking with it never waits for the GPU."""
    return torch.full((x.shape[0],), t, dtype=torch.int64)


def at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def check_latents(x: Tensor) -> None:
    if x.ndim != 5 or not x.is_floating_point():
        raise ValueError(f"latents are {x.dtype} {tuple(x.shape)}; give floats [b c f h w]")


class Watch:
    """Calls `on_step` after every step, and raises FloatingPointError when the state stops being finite.

    On a CPU immediately; elsewhere at the end, because a check at every step would make the host wait.
    With a `schedule` the message names a step without signal as the likely cause, else it gives `advice`.
    """

    def __init__(
        self, schedule: Schedule | None, on_step: OnStep | None, check_finite: bool, advice: str = ""
    ):
        self.schedule, self.on_step, self.check_finite = schedule, on_step, check_finite
        self.advice = advice
        self.waiting: list[tuple[StepInfo, Tensor]] = []  # steps without their latents, and the verdicts

    def step(self, info: StepInfo) -> None:
        if self.check_finite:
            finite = torch.isfinite(info.x).all()
            self.waiting.append((info._replace(x=finite, x0=finite), finite))
            if finite.device.type == "cpu":
                self.end()
        if self.on_step is not None:
            self.on_step(info)

    def end(self) -> None:
        waiting, self.waiting = self.waiting, []
        if not waiting:
            return
        for (info, _), finite in zip(waiting, torch.stack([f for _, f in waiting]).tolist(), strict=True):
            if not finite:
                raise FloatingPointError(self.message(info))

    def message(self, info: StepInfo) -> str:
        message = f"latents are not finite after step {info.index + 1} of {info.num_steps} (t = {info.t})"
        if self.schedule is None:
            return message + self.advice
        if self.schedule.abar[info.t] == 0:
            message += (
                "; no signal is left at this t, so eps cannot be recovered from x0 nor x0 from eps: "
                "use eps_form='direct' with v prediction, or another number of steps"
            )
        return message
