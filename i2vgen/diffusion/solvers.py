"""Solvers that need fewer calls than DDIM for the same latents, as functions with DDIM's signature.

All of them step between the discrete noise levels x = alpha x0 + sigma eps of the schedule, with lambda =
log(alpha / sigma), half the log-SNR, as their clock. Where no signal is left (t = T - 1 at zero terminal SNR)
lambda is -infinity: that step is taken in DDIM's x0 form, which is finite there, and the next one
extrapolates over alpha / sigma instead, which is 0 there (x / sigma is the integral of x0 over it). The last
step is of first order unless `last_order` is 2: it spans the largest interval of lambda, an infinite one if
`final_alpha` is "one".
Coefficients are Python floats from float64 tables; the state is in at least float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, NamedTuple

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
    limit_x0,
    timestep,
    visits,
)
from i2vgen.diffusion.schedule import Schedule, Spacing

FinalAlpha = Literal["first", "one"]
X0Of = Callable[[Tensor, int], Tensor]  # one network call: x [b c f h w] at a timestep -> x0 [b c f h w]
State = tuple[Tensor, Tensor]  # x after a step, and the x0 that it was taken with


class Step(NamedTuple):
    """From the level at timestep `t` to the next one."""

    t: int
    alpha: float
    sigma: float
    alpha_to: float
    sigma_to: float
    next_t: int | None  # the timestep of the level it lands on; None: the last step
    last_order: int = 1  # the highest order of a multistep solver in the last step

    @property
    def decay(self) -> float:
        """exp(-h): 0 from no signal and onto no noise"""
        return self.sigma_to * self.alpha / (self.alpha_to * self.sigma)

    @property
    def h(self) -> float:
        """How far lambda goes."""
        return math.inf if self.decay == 0 else -math.log(self.decay)

    def of_x(self) -> float:
        return self.sigma_to / self.sigma

    def of_x0(self) -> float:
        """With `of_x`: the step of DDIM, exact where the network's x0 does not change."""
        return self.alpha_to * (1 - self.decay)


def plan(
    schedule: Schedule,
    steps: int,
    spacing: Spacing,
    final_alpha: FinalAlpha,
    timesteps: Sequence[int] | None = None,
    last_order: int = 1,
) -> list[Step]:
    """The steps between the timesteps of `visits`, noisy to clean."""
    if final_alpha not in ("first", "one"):
        raise ValueError(f"final_alpha is {final_alpha!r}; choose first or one")
    if last_order not in (1, 2) or (last_order == 2 and final_alpha == "one"):
        raise ValueError(f"last_order is {last_order}; choose 1, or 2 with final_alpha='first'")
    visited, levels = visits(schedule, steps, spacing, timesteps)
    alpha, sigma = schedule.sqrt_abar.tolist(), schedule.sqrt_one_minus_abar.tolist()
    made = [
        Step(t, alpha[t], sigma[t], alpha[to], sigma[to], next_t, last_order)
        for t, to, next_t in zip(visited, levels, [*visited[1:], None], strict=True)
    ]
    if final_alpha == "one":
        made[-1] = made[-1]._replace(alpha_to=1.0, sigma_to=0.0)
    return made


def ahead(before: Step | None, now: Step) -> float:
    """How much of the last change of x0 to add, which makes it the x0 of half of this step."""
    if before is None or (now.next_t is None and now.last_order == 1) or now.alpha == 0:
        return 0.0
    if before.alpha == 0:  # by alpha / sigma: (now's way) / (2 before's way)
        return (1 / now.decay - 1) / 2
    return now.h / (2 * before.h)


def x0_of(
    predict: Predict, schedule: Schedule, clamp: float | None = None, percentile: float | None = None
) -> X0Of:
    def of(x: Tensor, t: int) -> Tensor:
        now = timestep(t, x)
        return limit_x0(schedule.to_x0(call(predict, x, now), x, now), clamp=clamp, percentile=percentile)

    return of


def walk(states: Iterator[State], planned: Sequence[Step], watch: Watch) -> Tensor:
    """Take all steps of a solver, each of them watched. -> the last x"""
    for index, (step, (x, x0)) in enumerate(zip(planned, states, strict=True)):
        watch.step(StepInfo(index, len(planned), step.t, x, x0))
    watch.end()
    return x


def sampler(method: Callable[..., Iterator[State]]) -> Callable[..., Tensor]:
    """The steps of a solver of order 1 or 2 -> a sampler with DDIM's signature.

    `last_order` 2 also extrapolates in the last step; only multistep solvers have it.
    """

    @torch.no_grad()
    def sample(
        predict: Predict,
        x: Tensor,
        schedule: Schedule,
        *,
        steps: int,
        spacing: Spacing = "official",
        timesteps: Sequence[int] | None = None,
        final_alpha: FinalAlpha = "first",
        clamp: float | None = None,
        percentile: float | None = None,
        order: int = 2,
        last_order: int = 1,
        noise: Noise | None = None,
        on_step: OnStep | None = None,
        check_finite: bool = True,
    ) -> Tensor:
        check_latents(x)
        if order not in (1, 2):
            raise ValueError(f"order is {order}; choose 1 or 2")
        planned = plan(schedule, steps, spacing, final_alpha, timesteps, last_order)
        estimate = x0_of(predict, schedule, clamp, percentile)
        states = method(estimate, at_least_float32(x), planned, order, noise)
        return walk(states, planned, Watch(schedule, on_step, check_finite))

    sample.__name__, sample.__doc__ = method.__name__, method.__doc__
    return sample


@sampler
def dpmpp_2m(
    x0_of: X0Of, x: Tensor, planned: Sequence[Step], order: int, noise: Noise | None
) -> Iterator[State]:
    """DPM-Solver++ 2M (Lu et al. 2022b, algorithm 2).

    One call per step; x0 is extrapolated from the step before. `order` 1 is DDIM. `noise` is not used.
    """
    return multistep(x0_of, x, planned, order=order)


@sampler
def dpmpp_2m_sde(
    x0_of: X0Of, x: Tensor, planned: Sequence[Step], order: int, noise: Noise | None
) -> Iterator[State]:
    """SDE-DPM-Solver++ 2M (Lu et al. 2022b, section 5).

    `dpmpp_2m` with fresh noise in every step that does not end on clean latents; `noise` draws it like x.
    `order` 1 is DDIM with eta 1.
    """
    if noise is None:
        raise ValueError("dpmpp_2m_sde needs `noise`; pass a function that draws noise like x")
    return multistep(x0_of, x, planned, order=order, eta=1.0, noise=noise)


def multistep(
    x0_of: X0Of,
    x: Tensor,
    planned: Sequence[Step],
    *,
    order: int = 2,
    eta: float = 0.0,
    noise: Noise | None = None,
    correction: Literal["midpoint", "heun"] = "midpoint",
    restart: bool = False,
) -> Iterator[State]:
    """DPM-Solver++ 2M step by step: its ODE with `eta` 0, its SDE with 1, and what lies between.

    `correction` is the form of the second-order term. `restart` concerns a start from pure noise: its step
    adds no fresh noise and the next one does not extrapolate from it, as in the samplers of the public
    refiners. Otherwise that step is like all others.
    """
    before, last = None, None
    for step in planned:
        x0 = x0_of(x, step.t)
        kept = restart and step.alpha == 0
        share, decay = (0.0, 1.0) if kept else (eta, step.decay**eta)
        new = 1 - step.decay ** (1 + share)
        weight = ahead(before, step) if order == 2 else 0.0
        if weight and correction == "heun":
            weight *= 2 / new - 2 / ((1 + share) * step.h)
        target = x0 + weight * (x0 - last) if weight else x0
        x = step.of_x() * decay * x + step.alpha_to * new * target
        if share > 0 and step.sigma_to > 0:
            x = x + step.sigma_to * math.sqrt(1 - step.decay ** (2 * share)) * noise(x)
        before, last = None if kept else step, x0
        yield x, x0


@sampler
def unipc(
    x0_of: X0Of, x: Tensor, planned: Sequence[Step], order: int, noise: Noise | None
) -> Iterator[State]:
    """UniPC of order 2 (Zhao et al. 2023, x0 form, B2).

    `dpmpp_2m` predicts; the call of the next step then corrects this one at no further cost. `order` 1 is
    DDIM with that correction. `noise` is not used.
    """
    before, last, correct = None, None, None
    for step in planned:
        x0 = x0_of(x, step.t)
        if correct is not None:
            x = correct(x0)
        weight = ahead(before, step) if order == 2 else 0.0
        plain = step.of_x() * x + step.of_x0() * x0
        x = plain + step.of_x0() * weight * (x0 - last) if weight else plain
        if step.next_t is not None:
            correct = _corrector(step, before if order == 2 else None, plain, x0, last)
        before, last = step, x0
        yield x, x0


def _corrector(
    step: Step, before: Step | None, plain: Tensor, x0: Tensor, last: Tensor | None
) -> Callable[[Tensor], Tensor]:
    """-> x at the end of a step from the x0 that the network sees there.

    With u = (lambda - lambda at the start) / h, x0 is a parabola through u = -`back`, 0 and 1, and the step
    its integral with the weight h exp(h (u - 1)). Without a step before: half of the change, as B2 has it,
    which is the trapezoid rule over alpha / sigma.
    """
    if before is None or before.alpha == 0 or step.alpha == 0:
        return lambda seen: plain + 0.5 * step.of_x0() * (seen - x0)
    h, back = step.h, before.h / step.h
    first = 1 - (1 - step.decay) / h  # integral of u
    second = 1 - 2 * first / h  # integral of u^2

    # Newton's form: x0 + slope u + bend u (u - 1); `slope` is that from 0 to 1, `behind` that up to 0.
    def correct(seen: Tensor) -> Tensor:
        slope, behind = seen - x0, (x0 - last) / back
        bend = (slope - behind) / (1 + back)
        return plain + step.alpha_to * (first * slope + (second - first) * bend)

    return correct


@sampler
def euler(
    x0_of: X0Of, x: Tensor, planned: Sequence[Step], order: int, noise: Noise | None
) -> Iterator[State]:
    """Euler steps of x / alpha over sigma / alpha.

    The slope there is eps (Karras et al. 2022), so this is DDIM in other words, and the base of `heun`.
    `order` and `noise` are not used.
    """
    return over_sigma(x0_of, x, planned, twice=False)


@sampler
def heun(x0_of: X0Of, x: Tensor, planned: Sequence[Step], order: int, noise: Noise | None) -> Iterator[State]:
    """Heun's method (Karras et al. 2022, algorithm 1); `order` 1 is `euler`.

    Every step but the last is taken again with the mean slope of both its ends: two calls per step. From no
    signal, where sigma / alpha is infinite, that is the mean x0 over alpha / sigma. `noise` is not used.
    """
    return over_sigma(x0_of, x, planned, twice=order == 2)


def over_sigma(
    x0_of: X0Of, x: Tensor, planned: Sequence[Step], *, twice: bool, restart: bool = False
) -> Iterator[State]:
    """Euler's method, or `twice` Heun's, step by step. `restart`: a step from pure noise is one call."""
    for step in planned:
        x0 = x0_of(x, step.t)
        moved = step.of_x() * x + step.of_x0() * x0
        if twice and step.next_t is not None and not (restart and step.alpha == 0):
            moved = moved + _half_the_bend(step, x, x0, moved, x0_of(moved, step.next_t))
        x = moved
        yield x, x0


def _half_the_bend(step: Step, x: Tensor, x0: Tensor, end: Tensor, end_x0: Tensor) -> Tensor:
    """What the mean slope of both ends adds to a step from `x` to `end`."""
    if step.alpha == 0:
        return 0.5 * step.of_x0() * (end_x0 - x0)
    eps, end_eps = (x - step.alpha * x0) / step.sigma, (end - step.alpha_to * end_x0) / step.sigma_to
    return 0.5 * (step.sigma_to - step.sigma * step.alpha_to / step.alpha) * (end_eps - eps)


SOLVERS = {
    "dpmpp_2m": dpmpp_2m,
    "dpmpp_2m_sde": dpmpp_2m_sde,
    "unipc": unipc,
    "euler": euler,
    "heun": heun,
}
