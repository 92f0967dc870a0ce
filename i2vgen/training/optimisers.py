"""AdamW with moments in float32 (PyTorch's own), bfloat16 or eight bits (`train.moments`).

Moments that change by a thousandth a step would stand still in so few bits, so they are rounded up or down at
random: right on average. In eight bits (float8_e4m3fn) every row of a weight has a scale, which sharding
leaves whole, and of the second moment the root is kept; vectors keep float32.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from i2vgen.training.settings import Train

EPS = 1e-8
LARGEST = torch.finfo(torch.float8_e4m3fn).max
SMALLEST = 2.0**-9  # above 0 in float8_e4m3fn; a root of 0 would make an update infinite
# Bits of a float32's fraction that a format drops.
DROPPED = {torch.bfloat16: 16, torch.float8_e4m3fn: 20}


def make(train: Train, groups: Sequence[dict], device: torch.device) -> torch.optim.Optimizer:
    settings = {"lr": train.learning_rate, "betas": tuple(train.betas), "weight_decay": train.weight_decay}
    if train.moments != "float32":
        return LeanAdamW(groups, eight_bit=train.moments == "eight_bit", **settings)
    # One pass over the weights, and no second copy of them; elsewhere PyTorch chooses.
    return torch.optim.AdamW(groups, fused=device.type in ("cpu", "cuda") or None, **settings)


def blank(optimiser: torch.optim.Optimizer, parameter: nn.Parameter) -> dict[str, Tensor]:
    """The moments of a parameter before its first step, for a checkpoint to be read into."""
    if isinstance(optimiser, LeanAdamW):
        return optimiser.blank(parameter)
    fused = optimiser.defaults["fused"]
    step = torch.zeros((), dtype=torch.float32, device=parameter.device if fused else "cpu")
    return {"step": step} | {key: torch.zeros_like(parameter) for key in ("exp_avg", "exp_avg_sq")}


class LeanAdamW(torch.optim.Optimizer):
    """AdamW (arXiv 1711.05101) that keeps its moments in bfloat16 or eight bits, and computes in float32.

    The rounding draws from the global generator: processes with the same weights must seed it alike.
    """

    def __init__(
        self,
        groups: Sequence[dict],
        *,
        lr: float,
        betas: tuple[float, float],
        weight_decay: float,
        eight_bit: bool,
    ):
        super().__init__(groups, {"lr": lr, "betas": betas, "weight_decay": weight_decay})
        self.eight_bit = eight_bit

    def blank(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        nothing = torch.zeros_like(parameter, dtype=torch.float32)
        held = self.narrowed("exp_avg", nothing) | self.narrowed("exp_avg_root", nothing)
        return {"step": torch.tensor(0.0)} | held

    def narrowed(self, key: str, x: Tensor) -> dict[str, Tensor]:
        """What is kept of a moment x [o ...], under its key"""
        if not self.eight_bit:
            return {key: rounded(x, torch.bfloat16)}
        if x.ndim < 2:
            return {key: x}
        scale = (x.flatten(1).abs().amax(dim=1) / LARGEST).clamp_(min=torch.finfo(torch.float32).tiny)
        x = rounded(x / by_rows(scale, x), torch.float8_e4m3fn, least=SMALLEST if "root" in key else None)
        return {key: x, f"{key}_scale": scale}

    @staticmethod
    def widened(state: dict[str, Tensor], key: str) -> Tensor:
        x = state[key].float()
        return x * by_rows(state[f"{key}_scale"], x) if f"{key}_scale" in state else x

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)

    def _update(self, parameter: nn.Parameter, group: dict) -> None:
        state, (beta1, beta2) = self.state[parameter], group["betas"]
        if not state:
            state.update(self.blank(parameter))
        state["step"] += 1
        count = state["step"].item()
        gradient = parameter.grad.float()
        mean = self.widened(state, "exp_avg").lerp_(gradient, 1 - beta1)
        root = self.widened(state, "exp_avg_root")
        root = root.square_().mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2).sqrt_()
        state.update(self.narrowed("exp_avg", mean) | self.narrowed("exp_avg_root", root))
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        root = root.div_((1 - beta2**count) ** 0.5).add_(EPS)
        parameter.addcdiv_(mean, root, value=-group["lr"] / (1 - beta1**count))


def by_rows(scale: Tensor, x: Tensor) -> Tensor:
    """[o], [o ...] -> [o 1 ...]"""
    return scale.view(-1, *[1] * (x.ndim - 1))


def rounded(x: Tensor, dtype: torch.dtype, *, least: float | None = None) -> Tensor:
    """float32 -> `dtype`, up or down at random, so that the mean is x; `least` keeps it above 0."""
    bits = DROPPED[dtype]
    whole = x.contiguous().view(torch.int32)
    x = (whole + torch.randint_like(whole, 1 << bits)).bitwise_and_(-(1 << bits)).view(torch.float32)
    if dtype == torch.float8_e4m3fn:
        x = x.clamp_(-LARGEST if least is None else least, LARGEST)
    return x.to(dtype)
