"""Sampling of the refiner: its noise levels, windows over long clips, and the shared solvers on both.

The refiner's table is variance preserving, x = alpha z + sigma noise with alpha^2 + sigma^2 = 1, and so are
the states here; the network predicts v. A grid names its noise levels by s = sigma / alpha, because the
official sampler steps through states divided by alpha and may stand between two entries of the table.

Where the official sampler contradicts itself the clean form is the default and the official one an option:
`start="official"` and `grid="official"`.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from i2vgen.diffusion.sampler import (
    Noise,
    OnStep,
    Predict,
    Watch,
    at_least_float32,
    call,
    check_latents,
    invert_along,
    timestep,
)
from i2vgen.diffusion.schedule import Schedule, logsnr_cosine_sigmas
from i2vgen.diffusion.solvers import Step, multistep, over_sigma, walk

Solver = Literal["dpmpp_2m_sde", "heun"]
Spacing = Literal["trailing", "leading", "linspace"]
Form = Literal["clean", "official"]


@dataclass(frozen=True, eq=False)
class Levels:
    """Noise levels sigma float64 [T] of a variance-preserving process, cleanest first, and their alphas.

    `alphas` follow from the sigmas unless given, which only a table in another precision needs.
    """

    sigmas: Tensor
    alphas_given: Tensor | None = None

    @property
    def num_timesteps(self) -> int:
        return len(self.sigmas)

    @cached_property
    def alphas(self) -> Tensor:
        given = self.alphas_given
        return (1 - self.sigmas.double() ** 2).clamp(min=0).sqrt() if given is None else given.double()

    @cached_property
    def logs(self) -> list[float]:
        """ln(sigma / alpha) of every index; infinite where no signal is left."""
        pairs = zip(self.sigmas.tolist(), self.alphas.tolist(), strict=True)
        return [math.log(sigma / alpha) if alpha > 0 else math.inf for sigma, alpha in pairs]

    def level(self, index: float) -> float:
        """s = sigma / alpha at an index that may lie between two entries (linear in its logarithm)."""
        index = min(max(index, 0.0), self.num_timesteps - 1.0)
        low = min(int(index), self.num_timesteps - 2)
        part = index - low
        if part == 0:
            return math.exp(self.logs[low])
        return math.exp((1 - part) * self.logs[low] + part * self.logs[low + 1])

    def index(self, level: float) -> float:
        """The inverse of `level`; levels outside the table take its ends."""
        if level == math.inf:
            return self.num_timesteps - 1.0
        log = math.log(level)
        low = min(max(bisect_right(self.logs, log) - 1, 0), self.num_timesteps - 2)
        below, above = self.logs[low], self.logs[low + 1]
        if above == math.inf:  # nothing lies between a finite level and the infinite one
            low, below, above = low - 1, self.logs[low - 1], below
        return low + min(max((log - below) / (above - below), 0.0), 1.0)

    def noised(self, latents: Tensor, noise: Tensor, index: int) -> Tensor:
        """Clean latents and noise [b c f h w] -> the state at `index`, [b c f h w]."""
        return self.alphas[index].item() * latents + self.sigmas[index].item() * noise

    def schedule(self) -> Schedule:
        """The same process as the rest of the project writes it: betas, v-prediction."""
        abar = self.alphas**2
        return Schedule(torch.cat([1 - abar[:1], 1 - abar[1:] / abar[:-1]]))

    @staticmethod
    def of(schedule: Schedule) -> Levels:
        return Levels(schedule.sqrt_one_minus_abar, schedule.sqrt_abar)


def refiner_levels(num_timesteps: int = 1000, shift: tuple[float, float] = (2.0, 4.0)) -> Levels:
    """The table that both public refiners were trained on."""
    return Levels(logsnr_cosine_sigmas(num_timesteps=num_timesteps, scale_min=shift[0], scale_max=shift[1]))


# ------------------------------------------------------------------------------------------- the grid


@dataclass(frozen=True)
class Grid:
    """Noise levels of a run, noisiest first and 0 at the end, and the network's timestep at each but 0."""

    levels: tuple[float, ...]
    timesteps: tuple[int, ...]

    @property
    def steps(self) -> int:
        return len(self.timesteps)

    def planned(self) -> list[Step]:
        """What the solvers of the first stage walk along."""
        alphas = [0.0 if s == math.inf else 1 / math.hypot(1, s) for s in self.levels]
        sigmas = [1.0 if s == math.inf else s / math.hypot(1, s) for s in self.levels]
        return [
            Step(*step)
            for step in zip(
                self.timesteps, alphas[:-1], sigmas[:-1], alphas[1:], sigmas[1:],
                [*self.timesteps[1:], None], strict=True,
            )
        ]  # fmt: skip


def make_grid(
    table: Levels,
    *,
    total: int,
    steps: int,
    solver: Solver = "dpmpp_2m_sde",
    spacing: Spacing = "trailing",
    form: Form = "clean",
) -> Grid:
    """`steps` levels from index `total` - 1 of the table down, then 0.

    The SDE solver spaces one index more than it visits and leaves the cleanest out: its last step jumps from
    there. "clean" visits whole indices, so that the network's timestep is exactly that of x. "official"
    visits fractional indices, passes the nearest whole one to the network and decodes with it, and takes one
    step too many at a few step counts (of 600: 6, 13, 27, 54, 55), where its range of floats rounds up.
    """
    if not 1 <= total <= table.num_timesteps:
        raise ValueError(
            f"the total noise level is {total}; give 1 to {table.num_timesteps}, the length of the noise "
            "table (refine.noise_level is 600 and 700 in the public refiners)"
        )
    extra = 1 if solver == "dpmpp_2m_sde" else 0
    if not 1 <= steps <= total - extra:
        raise ValueError(
            f"steps is {steps}; give 1 to {total - extra}, as many as there are noise levels up to {total}"
        )
    indices = positions(table.num_timesteps, total, steps + extra, spacing, form)
    if form == "clean":
        indices = [float(round(i)) for i in indices]
    return at(table, indices[:-1] if extra else indices)


def at(table: Levels, indices: Sequence[float]) -> Grid:
    """The grid through these indices of the table, noisiest first."""
    levels = [table.level(index) for index in indices]
    # The rounding of a float32 logarithm must not decide a tie.
    return Grid((*levels, 0.0), tuple(round(round(table.index(level), 6)) for level in levels))


def positions(num_timesteps: int, total: int, count: int, spacing: Spacing, form: Form) -> list[float]:
    """Evenly spaced indices of 0 .. `total` - 1, noisiest first."""
    if spacing == "linspace":
        gap = (total - 1) / max(count - 1, 1)
        return [total - 1 - k * gap for k in range(count)]
    gap = total / count
    # The official ranges of floats end past the last entry; rounding may add one more.
    entries = math.ceil(total / gap) if form == "official" else count
    if spacing == "trailing":
        found = [total - 1 - k * gap for k in range(entries)]
    elif spacing == "leading":
        found = [k * gap for k in reversed(range(entries))]
    else:
        raise ValueError(f"spacing is {spacing!r}; choose trailing, leading or linspace")
    return [min(max(index, 0.0), total - 1.0) for index in found]


# -------------------------------------------------------------------------------------------- windows


def windowed(predict: Predict, window: int, overlap: int) -> Predict:
    """A network for `window` frames at most -> one for clips of any length.

    Long clips go through it in windows that overlap by at least `overlap` frames, evenly spread; where two
    predictions meet they are blended, the weight of each falling linearly towards its end. Blended at every
    step, all windows work on one state and stay one film. A clip that fits is passed on as it is.
    """
    if not 0 <= overlap < window:
        raise ValueError(f"window is {window} and overlap {overlap} frames; give 0 <= overlap < window")

    def whole(x: Tensor, t: Tensor) -> Tensor:
        frames = x.shape[2]
        if frames <= window:
            return predict(x, t)
        starts = window_starts(frames, window, overlap)
        out = weights = None
        ramp = torch.arange(1, window + 1, dtype=torch.float32, device=x.device)
        ramp = torch.minimum(ramp, ramp.flip(0)).view(1, 1, -1, 1, 1)
        for start in starts:
            part = slice(start, start + window)
            got = predict(x[:, :, part], t)
            if out is None:
                out = got.new_zeros(x.shape[0], got.shape[1], *x.shape[2:], dtype=at_least_float32(got).dtype)
                weights = ramp.new_zeros(1, 1, frames, 1, 1)
            out[:, :, part] += ramp * got
            weights[:, :, part] += ramp
        return out / weights

    return whole


def window_starts(frames: int, window: int, overlap: int) -> list[int]:
    """First frames of the fewest windows that cover a clip and overlap by `overlap` or more."""
    if frames <= window:
        return [0]
    count = math.ceil((frames - overlap) / (window - overlap))
    return [round(i * (frames - window) / (count - 1)) for i in range(count)]


# ------------------------------------------------------------------------------------------- sampling


@torch.no_grad()
def refine(
    predict: Predict,
    x: Tensor,
    table: Levels,
    grid: Grid,
    *,
    solver: Solver = "dpmpp_2m_sde",
    start: Form = "clean",
    eta: float = 1.0,
    correction: Literal["midpoint", "heun"] = "midpoint",
    noise: Noise | None = None,
    on_step: OnStep | None = None,
    check_finite: bool = True,
) -> Tensor:
    """Latents x [b c f h w] at the noise of the grid's first level -> clean latents.

    `noise` draws the unit noise of a step like x, called only where it is used. `eta` 0 makes the SDE solver
    deterministic; `correction` is its second-order term's form. `start="official"` begins with sigma times x,
    2.8 % too small at 599: there x is multiplied by s, where 1 / alpha is right. State in at least float32.
    ValueError for settings out of range, FloatingPointError when x stops being finite.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta is {eta}; give a number from 0 (deterministic) to 1")
    if solver not in ("dpmpp_2m_sde", "heun"):
        raise ValueError(f"solver is {solver!r}; choose dpmpp_2m_sde or heun")
    if solver == "dpmpp_2m_sde" and eta > 0 and grid.steps > 1 and noise is None:
        raise ValueError(f"eta is {eta} but no `noise` was given; pass a function that draws noise like x")
    check_latents(x)
    planned = grid.planned()
    x = at_least_float32(x)
    if start == "official" and planned[0].alpha > 0:
        x = planned[0].sigma * x

    def x0_of(x: Tensor, t: int) -> Tensor:
        out = at_least_float32(call(predict, x, timestep(t, x)))
        return table.alphas[t].item() * x - table.sigmas[t].item() * out

    watch = Watch(None, on_step, check_finite, advice="; try runtime.dtype=float32")
    if solver == "heun":
        states = over_sigma(x0_of, x, planned, twice=True, restart=True)
    else:
        states = multistep(x0_of, x, planned, eta=eta, noise=noise, correction=correction, restart=True)
    return walk(states, planned, watch)


@torch.no_grad()
def invert(
    predict: Predict,
    latents: Tensor,
    schedule: Schedule,
    *,
    total: int,
    steps: int,
    on_step: OnStep | None = None,
) -> Tensor:
    """Clean latents [b c f h w] -> the state at index `total` - 1 of `schedule`, by DDIM inversion.

    Visits 0, stride, 2 stride, ... below `total` with stride `total` // `steps`; as in the official code the
    clean latents count as the state at index 0.
    """
    if not 1 <= steps <= total:
        raise ValueError(f"inversion steps are {steps}; give 1 to the total noise level {total}")
    visited = list(range(0, total, total // steps))
    levels = [min(now + total // steps, total - 1) for now in visited]
    return invert_along(predict, latents, schedule, visited, levels, on_step=on_step)
