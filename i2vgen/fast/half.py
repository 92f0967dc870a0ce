"""Half precision on a CPU: faster forms of what PyTorch computes there slowly.

Processors multiply bfloat16 several times as fast as float32, but PyTorch's fused attention and its group
norm for channels last take longer in bfloat16 than in float32. So a norm is computed in float32, and
attention by plain products. Both have gradients.

Axes: n independent sequences or samples, m heads, t and k query and context tokens, d head width; c channels.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from i2vgen.fast import kernels
from i2vgen.model.attention import Attention, AttentionFunction, FrameAttention, attend
from i2vgen.model.layers import GroupNorm

HALF = (torch.bfloat16, torch.float16)
PIECE = 2**20  # scores that attention holds at once: they stay in the caches
FEW_KEYS = 16  # up to so many, as over frames, PyTorch's softmax takes twice as long as its parts


def here(x: Tensor) -> bool:
    """Whether a tensor is in half precision on a CPU."""
    return x.device.type == "cpu" and x.dtype in HALF


def backend(wanted: str | AttentionFunction, x: Tensor) -> str | AttentionFunction:
    """`attend_by_products` where PyTorch would choose and `x` is in half precision on a CPU"""
    return attend_by_products if wanted in ("sdpa", "auto") and here(x) else wanted


@torch.autocast("cpu", enabled=False)
def attend_by_products(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q kᵀ / sqrt(d)) v for q [n m t d], k and v [n m k d] -> [n m t d], `PIECE` scores at a time."""
    q, k = q * q.shape[-1] ** -0.5, k.transpose(-1, -2)
    n, m, t, _ = q.shape
    sequences = PIECE // (m * t * k.shape[-1])
    if sequences >= n:
        return softmax(q @ k) @ v
    pieces = []
    for i in range(0, n, max(sequences, 1)):
        some, of_k, of_v = (x[i : i + max(sequences, 1)] for x in (q, k, v))
        rows = t if sequences else max(PIECE // (m * k.shape[-1]), 1)
        done = [softmax(part @ of_k) @ of_v for part in some.split(rows, dim=2)]
        pieces.append(torch.cat(done, dim=2) if len(done) > 1 else done[0])
    return torch.cat(pieces)


def softmax(scores: Tensor) -> Tensor:
    """Over the last axis, [... k] -> same; a few scores in float32, by parts, which are vectors to PyTorch"""
    if scores.shape[-1] > FEW_KEYS:
        return scores.softmax(-1)
    wide = scores.to(torch.promote_types(scores.dtype, torch.float32))
    weights = (wide - wide.detach().amax(-1, keepdim=True)).exp()
    return (weights / weights.sum(-1, keepdim=True)).to(scores.dtype)


@torch.autocast("cpu", enabled=False)
def group_norm(norm: nn.GroupNorm, x: Tensor, *, silu: bool = False, shift: Tensor | None = None) -> Tensor:
    """SiLU or nothing of the norm of x + shift, in float32: x [n ... c], shift [m c] for n / m neighbours."""
    y = x.float()
    if shift is not None:
        y = kernels.shifted(y, shift.float())
    y = rearrange(y.flatten(2, -2), "n h w c -> n c h w")
    weight, bias = (None if one is None else one.float() for one in (norm.weight, norm.bias))
    y = F.group_norm(y, norm.num_groups, weight, bias, norm.eps)
    y = rearrange(F.silu(y, inplace=not torch.is_grad_enabled()) if silu else y, "n c h w -> n h w c")
    return y.to(x.dtype).reshape(x.shape)


# ---------------------------------------------------------------------------------------------------
# Training


class _Backend:
    """An attention whose `backend`, where PyTorch would choose, depends on the inputs of each call."""

    @property
    def backend(self) -> str | AttentionFunction:
        # A module of a plugin's lies where PyTorch puts modules.
        wanted = vars(self)["backend"] if "backend" in vars(self) else self._modules["backend"]
        return functools.partial(_attend, wanted=wanted) if wanted in ("sdpa", "auto") else wanted

    @backend.setter
    def backend(self, wanted: str | AttentionFunction) -> None:
        vars(self)["backend"] = wanted


def _attend(q: Tensor, k: Tensor, v: Tensor, *, wanted: str) -> Tensor:
    return attend(q, k, v, backend(wanted, q))


class TrainedAttention(_Backend, Attention):
    plain = Attention


class TrainedFrameAttention(_Backend, FrameAttention):
    plain = FrameAttention


class TrainedGroupNorm(GroupNorm):
    plain = GroupNorm

    def forward(self, x: Tensor) -> Tensor:
        return group_norm(self, x) if here(x) else super().forward(x)


TRAINED = {kind.plain: kind for kind in (TrainedAttention, TrainedFrameAttention, TrainedGroupNorm)}


def prepare_training(network: nn.Module) -> None:
    """Make a network fast under autocast to half precision on a CPU; its weights and names stay.

    `savings.remove` gives every module its plain class back.
    """
    for module in network.modules():
        if type(module) in TRAINED:
            module.__class__ = TRAINED[type(module)]
