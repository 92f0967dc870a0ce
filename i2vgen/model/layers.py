"""The small layers that every network here is made of. All of them keep channels last.

Axes: b batch, f frames, h w latent rows and columns, c channels; n any leading axis.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

# The released weights were trained with two epsilons in their group norms: 1e-5 in ResBlocks, temporal
# convolutions and the output layer, 1e-6 in front of transformers and everywhere in the autoencoder.
RES_EPS = 1e-5
TRANSFORMER_EPS = 1e-6


def sinusoid(value: Tensor, width: int, formula: str = "pow") -> Tensor:
    """Sinusoidal features of value [b], in float32 whatever the network's dtype. -> [b width]

    Cosines first, then sines, of value * 10000^(-i / half) with half = width // 2; an odd width ends in a
    zero. `formula` is how float32 computes the power: "pow" as the official code does, "exp" as diffusers
    does. The two differ by up to 6e-5, and each is as far from the exact value.
    """
    half = width // 2
    steps = torch.arange(half, dtype=torch.float32, device=value.device)
    if formula == "pow":
        frequencies = torch.pow(10000, -steps / half)
    else:
        frequencies = torch.exp(-math.log(10000) * steps / half)
    angles = value.to(torch.float32)[:, None] * frequencies
    features = torch.cat([angles.cos(), angles.sin()], dim=-1)
    return F.pad(features, (0, width % 2))


class Mlp(nn.Module):
    """Linear, SiLU, Linear on the last axis."""

    def __init__(self, width: int, hidden: int, out: int):
        super().__init__()
        self.linear1 = nn.Linear(width, hidden)
        self.linear2 = nn.Linear(hidden, out)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear2(F.silu(self.linear1(x)))


class FeedForward(nn.Module):
    """GEGLU (Shazeer 2020): a Linear to 2 x 4 x width, one half times GELU of the other, a Linear back."""

    def __init__(self, width: int):
        super().__init__()
        self.proj_in = nn.Linear(width, 8 * width)
        self.proj_out = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[n ... c] -> same"""
        value, gate = self.proj_in(x).chunk(2, dim=-1)
        return self.proj_out(value * F.gelu(gate))


class Conv(nn.Conv2d):
    """A 2-D convolution on channels-last tensors: [n h w c] -> [n h' w' c']."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(rearrange(x, "n h w c -> n c h w"))  # a view: PyTorch's channels_last format
        return rearrange(y, "n c h w -> n h w c").contiguous()  # a no-op if the kernel kept that format


class GroupNorm(nn.GroupNorm):
    """Group norm on channels-last tensors [n ... c]: one set of statistics per n and group."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(rearrange(x.flatten(2, -2), "n h w c -> n c h w"))
        return rearrange(y, "n c h w -> n h w c").reshape(x.shape)


def per_frame(module: nn.Module, x: Tensor) -> Tensor:
    """Run a module on pictures, [n h w c] -> [n h' w' c'], on every frame of x [b f h w c]."""
    return module(x.flatten(0, 1)).unflatten(0, x.shape[:2])


def zero_(module: nn.Module) -> nn.Module:
    """Set a module's parameters to zero, so that the branch ending in it starts as the identity."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module
