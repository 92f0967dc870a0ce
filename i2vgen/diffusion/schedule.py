"""Noise schedules: betas, the tables that follow from them, timestep grids, and v <-> eps <-> x0.

Letters: `t` is the timestep (0 cleanest, T - 1 noisiest), abar = prod(1 - beta) the signal power left at t.
All tables are float64 on the CPU; `Schedule.pick` is the only way out of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from i2vgen.settings import config

BetaKind = Literal["cosine", "linear", "linear_sd", "quadratic"]
Prediction = Literal["v", "eps", "x0", "previous"]
Variance = Literal["fixed_small", "fixed_large"]
EpsForm = Literal["direct", "recovered"]
Spacing = Literal["official", "leading", "trailing", "linspace"]

MAX_COSINE_BETA = 0.999  # the cosine curve ends at abar = 0; the cap keeps the last beta below 1
TERMINAL_BETA_TOLERANCE = 1e-4  # official: a schedule whose largest beta is this near to 1 is left alone
MIN_POSTERIOR_VARIANCE = 1e-20  # it is 0 at t = 0; the clamp keeps its logarithm finite


# ---------------------------------------------------------------------------------------------- betas


def make_betas(
    *,
    kind: BetaKind,
    num_timesteps: int,
    zero_terminal_snr: bool,
    cosine_s: float = 0.008,
    init_beta: float | None = None,
    last_beta: float | None = None,
) -> Tensor:
    """-> float64 [T], every beta in (0, 1].

    `cosine_s` shapes "cosine" only; `init_beta` and `last_beta` the other three, None (or 0) meaning
    the kind's own default. "linear_sd" has no defaults. ValueError for an unknown kind, fewer than two
    timesteps, or betas that the kind does not use. With `zero_terminal_snr` the last beta becomes 1.
    """
    if num_timesteps < 2:
        raise ValueError(f"num_timesteps is {num_timesteps}; a schedule needs at least 2")
    if kind == "cosine":
        if init_beta or last_beta:
            raise ValueError("init_beta and last_beta have no effect on a cosine schedule; leave them out")
        betas = _cosine_betas(num_timesteps, cosine_s)
    elif kind == "linear":
        # The official code assigns the default of last_beta to a misspelt name and fails; this was meant.
        per_step = 1000 / num_timesteps
        first, last = init_beta or per_step * 1e-4, last_beta or per_step * 0.02
        betas = torch.linspace(first, last, num_timesteps, dtype=torch.float64)
    elif kind == "linear_sd":
        if not init_beta or not last_beta:
            raise ValueError(
                f"linear_sd needs init_beta and last_beta, got {init_beta} and {last_beta}; "
                "Stable Diffusion's are 0.00085 and 0.012"
            )
        betas = _linear_in_sqrt(init_beta, last_beta, num_timesteps)
    elif kind == "quadratic":
        betas = _linear_in_sqrt(init_beta or 0.0015, last_beta or 0.0195, num_timesteps)
    else:
        raise ValueError(f"schedule kind is {kind!r}; choose cosine, linear, linear_sd or quadratic")
    return rescale_zero_terminal_snr(betas) if zero_terminal_snr else betas


def _cosine_betas(num_timesteps: int, s: float) -> Tensor:
    """-> float64 [T]. Nichol & Dhariwal 2021, eq. 17; in Python floats, as official, down to the last bit."""

    def abar(u: float) -> float:
        return math.cos((u + s) / (1 + s) * math.pi / 2) ** 2

    ratios = (abar((i + 1) / num_timesteps) / abar(i / num_timesteps) for i in range(num_timesteps))
    return torch.tensor([min(1 - ratio, MAX_COSINE_BETA) for ratio in ratios], dtype=torch.float64)


def _linear_in_sqrt(first: float, last: float, num_timesteps: int) -> Tensor:
    return torch.linspace(first**0.5, last**0.5, num_timesteps, dtype=torch.float64) ** 2


def rescale_zero_terminal_snr(betas: Tensor) -> Tensor:
    """float64 [T] -> float64 [T] whose last entry is exactly 1, so that nothing of x0 is left at T - 1.

    Lin et al. 2023 ("Common diffusion noise schedules ... are flawed"), algorithm 1: sqrt(abar) is shifted
    and stretched so that it keeps its first value and ends at 0. Betas that end at 1 come back as they are.
    """
    if abs(betas.max().item() - 1) <= TERMINAL_BETA_TOLERANCE:
        return betas
    root = torch.cumprod(1 - betas, dim=0).sqrt()
    root = (root - root[-1]) * (root[0] / (root[0] - root[-1]))
    abar = root**2
    return 1 - torch.cat([abar[:1], abar[1:] / abar[:-1]])


def logsnr_cosine_sigmas(
    *,
    num_timesteps: int,
    scale_min: float = 2.0,
    scale_max: float = 4.0,
    logsnr_min: float = -15.0,
    logsnr_max: float = 15.0,
) -> Tensor:
    """-> float64 [T], noise levels sigma with alpha = sqrt(1 - sigma^2); the refiner's table.

    The cosine log-SNR curve of Hoogeboom et al. 2023 ("simple diffusion"), its shift going from `scale_min`
    at the clean end to `scale_max` at the noisy one. The values are rounded to float32 as in the official
    table: only so does the last sigma become exactly 1 (zero terminal SNR).
    """
    u = torch.linspace(0, 1, num_timesteps, dtype=torch.float64)
    low, high = math.atan(math.exp(-logsnr_max / 2)), math.atan(math.exp(-logsnr_min / 2))
    logsnr = -2 * torch.log(torch.tan(high + (1 - u) * (low - high)))
    logsnr = logsnr - 2 * ((1 - u) * math.log(scale_min) + u * math.log(scale_max))
    return torch.sigmoid(-logsnr).sqrt().float().double()


# ------------------------------------------------------------------------------------- timestep grids


def timesteps(num_timesteps: int, steps: int, spacing: Spacing) -> list[int]:
    """-> the timesteps a sampler visits, from noisy to clean. n = `steps`, T = `num_timesteps`:

    "official": min(1 + k (T // n), T - 1) while k (T // n) < T: ceil(T / (T // n)) many, n or more;
    "leading":  1 + k (T // n) for k < n, exactly n (diffusers' default with offset 1; no offset where n = T);
    "trailing": round(T - k T / n) - 1 for k < n, exactly n, from T - 1 on;
    "linspace": n evenly spaced from T - 1 to 0, exactly n.
    """
    if not 1 <= steps <= num_timesteps:
        raise ValueError(f"steps is {steps}; give 1 to {num_timesteps}, the length of the noise schedule")
    stride = num_timesteps // steps
    if spacing == "official":
        visited = [min(1 + level, num_timesteps - 1) for level in range(0, num_timesteps, stride)]
        return visited[::-1]
    if spacing == "leading":
        offset = min(1, num_timesteps - 1 - stride * (steps - 1))  # 1 + (T - 1) would be past the end
        return [offset + stride * k for k in reversed(range(steps))]
    if spacing == "trailing":
        return [round(num_timesteps - k * num_timesteps / steps) - 1 for k in range(steps)]
    if spacing == "linspace":
        gap = (num_timesteps - 1) / max(steps - 1, 1)
        return [round(num_timesteps - 1 - k * gap) for k in range(steps)]
    raise ValueError(f"spacing is {spacing!r}; choose official, leading, trailing or linspace")


def next_levels(num_timesteps: int, steps: int, spacing: Spacing) -> list[int]:
    """-> for each entry of `timesteps`, the index of the noise level that its DDIM step lands on.

    "official" goes back by one stride whatever is visited next (they differ where the grid was cut at T - 1);
    the others land on the next visited timestep. The last step lands on index 0 in all of them.
    """
    visited = timesteps(num_timesteps, steps, spacing)
    if spacing == "official":
        stride = num_timesteps // steps
        return [max(t - stride, 0) for t in visited]
    return [*visited[1:], 0]


def inversion_timesteps(num_timesteps: int, steps: int) -> tuple[list[int], list[int]]:
    """-> (timesteps, levels landed on) of DDIM inversion, clean to noisy: 0, T // n, 2 (T // n), ... < T.

    Level T stands for abar = 0, pure noise (`Schedule.abar_to_noise`). As in the official code there is no
    offset of 1, so this is not the mirror of the sampling grid.
    """
    if not 1 <= steps <= num_timesteps:
        raise ValueError(f"steps is {steps}; give 1 to {num_timesteps}, the length of the noise schedule")
    stride = num_timesteps // steps
    visited = list(range(0, num_timesteps, stride))
    return visited, [min(t + stride, num_timesteps) for t in visited]


# ------------------------------------------------------------------------------------------- schedule


class Distribution(NamedTuple):
    """p(x_{t-1} | x_t): `mean` and `x0` [b c f h w], `variance` and `log_variance` [b 1 1 1 1]."""

    mean: Tensor
    variance: Tensor
    log_variance: Tensor
    x0: Tensor


@dataclass(frozen=True, eq=False)
class Schedule:
    """Betas float64 [T] on the CPU, what the network predicts, and the variance of ancestral steps.

    `prediction`: "v" = sqrt(abar) noise - sqrt(1 - abar) x0, "eps" the noise, "x0" the clean latent,
    "previous" the mean of x_{t-1}. `variance`: "fixed_small" is the posterior's, "fixed_large" is beta.
    ValueError for betas of another type or outside (0, 1].
    """

    betas: Tensor
    prediction: Prediction = "v"
    variance: Variance = "fixed_small"

    def __post_init__(self):
        betas = self.betas
        if betas.dtype != torch.float64 or betas.device.type != "cpu" or betas.ndim != 1 or len(betas) < 2:
            raise ValueError(
                f"betas are {betas.dtype} {tuple(betas.shape)} on {betas.device}; "
                "give a float64 vector of two or more entries on the CPU (see make_betas)"
            )
        if not bool(((betas > 0) & (betas <= 1)).all()):  # written so that NaN is refused too
            raise ValueError(
                f"betas run from {betas.min():g} to {betas.max():g}; all must be above 0 and at most 1"
            )
        if self.prediction not in ("v", "eps", "x0", "previous"):
            raise ValueError(f"prediction is {self.prediction!r}; choose v, eps, x0 or previous")
        if self.variance not in ("fixed_small", "fixed_large"):
            raise ValueError(f"variance is {self.variance!r}; choose fixed_small or fixed_large")

    @classmethod
    def of(cls, settings: config.Schedule) -> Schedule:
        """The process that the settings describe by betas, which `kind=logsnr_cosine` does not."""
        betas = make_betas(
            kind=settings.kind,
            num_timesteps=settings.num_timesteps,
            cosine_s=settings.cosine_s,
            init_beta=settings.init_beta,
            last_beta=settings.last_beta,
            zero_terminal_snr=settings.zero_terminal_snr,
        )
        return cls(betas, prediction=settings.prediction, variance=settings.variance)

    @property
    def num_timesteps(self) -> int:
        return len(self.betas)

    @cached_property
    def abar(self) -> Tensor:
        return torch.cumprod(1 - self.betas, dim=0)

    @cached_property
    def abar_prev(self) -> Tensor:
        return torch.cat([self.abar.new_ones(1), self.abar[:-1]])

    @cached_property
    def abar_next(self) -> Tensor:
        return torch.cat([self.abar[1:], self.abar.new_zeros(1)])

    @cached_property
    def abar_to_noise(self) -> Tensor:
        """[T + 1]: abar with a 0 at index T, the level that DDIM inversion ends on."""
        return torch.cat([self.abar, self.abar.new_zeros(1)])

    @cached_property
    def sqrt_abar(self) -> Tensor:
        return self.abar.sqrt()

    @cached_property
    def sqrt_one_minus_abar(self) -> Tensor:
        return (1 - self.abar).sqrt()

    @cached_property
    def log_one_minus_abar(self) -> Tensor:
        return (1 - self.abar).log()

    @cached_property
    def sqrt_recip_abar(self) -> Tensor:
        """sqrt(1 / abar); infinite where abar is 0."""
        return (1 / self.abar).sqrt()

    @cached_property
    def sqrt_recip_abar_minus_one(self) -> Tensor:
        """sqrt(1 / abar - 1); infinite where abar is 0."""
        return (1 / self.abar - 1).sqrt()

    @cached_property
    def posterior_variance(self) -> Tensor:
        return self.betas * (1 - self.abar_prev) / (1 - self.abar)

    @cached_property
    def posterior_log_variance(self) -> Tensor:
        return self.posterior_variance.clamp(min=MIN_POSTERIOR_VARIANCE).log()

    @cached_property
    def posterior_mean_x0(self) -> Tensor:
        """Weight of x0 in the mean of q(x_{t-1} | x_t, x0)."""
        return self.betas * self.abar_prev.sqrt() / (1 - self.abar)

    @cached_property
    def posterior_mean_xt(self) -> Tensor:
        """Weight of x_t in the mean of q(x_{t-1} | x_t, x0)."""
        return (1 - self.abar_prev) * (1 - self.betas).sqrt() / (1 - self.abar)

    @cached_property
    def large_variance(self) -> Tensor:
        """The betas; entry 0 is the posterior variance at 1, so that its logarithm is no outlier."""
        return torch.cat([self.posterior_variance[1:2], self.betas[1:]])

    def pick(self, table: Tensor, t: Tensor, like: Tensor) -> Tensor:
        """table float64 [T], t int64 [b] -> [b 1 1 1 1] on the device and in the dtype of `like`.

        Never below float32. The five axes matter: in PyTorch a float32 scalar times a float16 tensor stays
        float16, a float32 tensor with axes promotes the product. A `t` on the CPU avoids a wait for the GPU.
        """
        dtype = torch.promote_types(like.dtype, torch.float32)
        return table[t.cpu()].to(like.device, dtype).view(-1, 1, 1, 1, 1)

    # Noising (section 2 of Ho et al. 2020)

    def q_sample(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """x0, noise [b c f h w], t int64 [b] -> x_t [b c f h w] = sqrt(abar) x0 + sqrt(1 - abar) noise."""
        return self.pick(self.sqrt_abar, t, x0) * x0 + self.pick(self.sqrt_one_minus_abar, t, x0) * noise

    def q_mean_variance(self, x0: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x0 [b c f h w], t [b] -> mean [b c f h w], variance and its log [b 1 1 1 1] of q(x_t | x0)."""
        mean = self.pick(self.sqrt_abar, t, x0) * x0
        return mean, self.pick(1 - self.abar, t, x0), self.pick(self.log_one_minus_abar, t, x0)

    def q_posterior(self, x0: Tensor, xt: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x0, xt [b c f h w], t [b] -> mean, variance and its clamped log of q(x_{t-1} | x_t, x0).

        The mean is [b c f h w], the other two [b 1 1 1 1] (Ho et al. 2020, eq. 7).
        """
        mean = self.pick(self.posterior_mean_x0, t, xt) * x0 + self.pick(self.posterior_mean_xt, t, xt) * xt
        return (
            mean,
            self.pick(self.posterior_variance, t, xt),
            self.pick(self.posterior_log_variance, t, xt),
        )

    # What the network is asked for, and the way back

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x0, noise [b c f h w], t int64 [b] -> what the network should return for q_sample(x0, t, noise)."""
        if self.prediction == "v":  # Salimans & Ho 2022, appendix D
            return self.pick(self.sqrt_abar, t, x0) * noise - self.pick(self.sqrt_one_minus_abar, t, x0) * x0
        if self.prediction == "eps":
            return noise
        if self.prediction == "x0":
            return x0
        return self.q_posterior(x0, self.q_sample(x0, t, noise), t)[0]

    def to_x0(self, out: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """Network output and x_t [b c f h w], t [b] -> x0 [b c f h w].

        An eps prediction says nothing about x0 where abar is 0: the result is NaN there.
        """
        if self.prediction == "v":
            return self.pick(self.sqrt_abar, t, x) * x - self.pick(self.sqrt_one_minus_abar, t, x) * out
        if self.prediction == "eps":
            return (
                self.pick(self.sqrt_recip_abar, t, x) * x
                - self.pick(self.sqrt_recip_abar_minus_one, t, x) * out
            )
        if self.prediction == "x0":
            return out
        of_out, of_x = 1 / self.posterior_mean_x0, self.posterior_mean_xt / self.posterior_mean_x0
        return self.pick(of_out, t, x) * out - self.pick(of_x, t, x) * x

    def to_eps(self, out: Tensor, x: Tensor, t: Tensor, *, form: EpsForm = "direct") -> Tensor:
        """Network output and x_t [b c f h w], t [b] -> eps [b c f h w].

        "direct" takes the shortest way from the prediction and is finite at abar = 0; "recovered" goes
        through x0 as the official code does, also for eps models, and is NaN there.
        """
        if form == "direct" and self.prediction == "v":
            return self.pick(self.sqrt_one_minus_abar, t, x) * x + self.pick(self.sqrt_abar, t, x) * out
        if form == "direct" and self.prediction == "eps":
            return out
        return self.eps_from_x0(self.to_x0(out, x, t), x, t, form=form)

    def eps_from_x0(self, x0: Tensor, x: Tensor, t: Tensor, *, form: EpsForm = "direct") -> Tensor:
        """x0 and x_t [b c f h w], t [b] -> the eps that joins them.

        "direct": (x - sqrt(abar) x0) / sqrt(1 - abar). "recovered": the official order of operations,
        (sqrt(1/abar) x - x0) / sqrt(1/abar - 1), which is inf / inf where abar is 0.
        """
        if form == "direct":
            return (x - self.pick(self.sqrt_abar, t, x) * x0) / self.pick(self.sqrt_one_minus_abar, t, x)
        if form == "recovered":
            scaled = self.pick(self.sqrt_recip_abar, t, x) * x - x0
            return scaled / self.pick(self.sqrt_recip_abar_minus_one, t, x)
        raise ValueError(f"eps form is {form!r}; choose direct or recovered")

    def model_distribution(self, out: Tensor, x: Tensor, t: Tensor) -> Distribution:
        """Network output and x_t [b c f h w], t [b] -> the network's p(x_{t-1} | x_t) and its x0."""
        x0 = self.to_x0(out, x, t)
        mean = out if self.prediction == "previous" else self.q_posterior(x0, x, t)[0]
        if self.variance == "fixed_small":
            variance, log_variance = self.posterior_variance, self.posterior_log_variance
        else:
            variance, log_variance = self.large_variance, self.large_variance.log()
        return Distribution(mean, self.pick(variance, t, x), self.pick(log_variance, t, x), x0)
