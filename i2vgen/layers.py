"""Small parts that every other module uses. All of them keep channels last.

Axes: b batch, f frames, h w latent rows and columns, c channels; n whatever else comes first.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

# The networks were trained with two GroupNorm epsilons: 1e-5 in ResBlocks, temporal convolutions and the
# head, 1e-6 at the entrance of transformers and everywhere in the autoencoder.
RES_EPS = 1e-5
TRANSFORMER_EPS = 1e-6

# Where a convolution on a CPU is better one matrix product; measured on AVX-512 with 64 to 1280 channels.
FEW_PIXELS = 512
MANY_CHANNELS = 256


def sinusoid(value: Tensor, width: int, formula: str = "pow") -> Tensor:
    """Sinusoidal features of value [b], float32 whatever the network's dtype. -> [b width]

    Cosines first, then sines, of value * 10000^(-i / half), half = width // 2; an odd width ends in a zero.
    `formula` says how float32 takes the power: "pow" is the official code's, "exp" diffusers'. They are up to
    6e-5 apart, and each as far from the exact value.
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
    """GEGLU: one Linear to 2 x 4 x width, value half times GELU (erf) of the gate half, Linear back."""

    in_place = False  # without gradients: two products, the gate in place; see `speed.py`
    chunk = 0  # tokens at once; 0: all

    def __init__(self, width: int):
        super().__init__()
        self.proj_in = nn.Linear(width, 8 * width)
        self.proj_out = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        if self.in_place and not torch.is_grad_enabled() and type(self.proj_in) is nn.Linear:
            return self.without_copies(x)
        value, gate = self.proj_in(x).chunk(2, dim=-1)
        return self.proj_out(value * F.gelu(gate))

    def without_copies(self, x: Tensor) -> Tensor:
        """The same numbers; at most `chunk` tokens are eight times as wide at a time, and none is copied."""
        tokens = x.reshape(-1, x.shape[-1])
        weights, biases = self.proj_in.weight.chunk(2), self.proj_in.bias.chunk(2)
        done = []
        for part in tokens.split(self.chunk or len(tokens)):
            gate = torch.ops.aten.gelu_(F.linear(part, weights[1], biases[1]))
            done.append(self.proj_out(gate.mul_(F.linear(part, weights[0], biases[0]))))
        return (done[0] if len(done) == 1 else torch.cat(done)).view_as(x)


class Conv(nn.Conv2d):
    """A 2-D convolution on channels-last tensors: [n h w c] -> [n h' w' c']."""

    product = False  # on a CPU over few pixels: one matrix product; see `speed.py`

    def forward(self, x: Tensor) -> Tensor:
        if self.product and self.product_pays(x):
            return self.as_product(x)
        y = super().forward(rearrange(x, "n h w c -> n c h w"))  # a view: PyTorch's channels_last format
        return rearrange(y, "n c h w -> n h w c").contiguous()  # a no-op where the kernel kept the format

    def product_pays(self, x: Tensor) -> bool:
        """Where weights are many and pixels few a CPU's kernel spends its time on laying out the weights."""
        pixels = math.prod(x.shape[:3]) // math.prod(self.stride)
        return x.device.type == "cpu" and pixels <= FEW_PIXELS and self.in_channels >= MANY_CHANNELS

    def as_product(self, x: Tensor) -> Tensor:
        """The same: every window of x as a row, times the weights (a view if they lie channels last)."""
        (up, left), (rows, columns) = self.padding, self.kernel_size
        x = F.pad(x, (0, 0, left, left, up, up))
        windows = x.unfold(1, rows, self.stride[0]).unfold(2, columns, self.stride[1])
        windows = rearrange(windows, "n h w c i j -> n h w (i j c)")
        return F.linear(windows, rearrange(self.weight, "o c i j -> o (i j c)"), self.bias)


class GroupNorm(nn.GroupNorm):
    """Group norm on channels-last tensors [n ... c]: one set of statistics per n and group."""

    in_place = False  # without gradients: a SiLU that follows writes over the result; see `speed.py`

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(rearrange(x.flatten(2, -2), "n h w c -> n c h w"))
        return rearrange(y, "n c h w -> n h w c").reshape(x.shape)


def norm_silu(norm: nn.Module, x: Tensor, shift: Tensor | None = None) -> Tensor:
    """SiLU(norm(x + shift)): x [n ... c], shift [m c], each row of it for n / m neighbours -> like x"""
    y = norm(x if shift is None else shifted(x, shift))
    if untouched(norm, GroupNorm) and norm.in_place and not torch.is_grad_enabled():
        return F.silu(y, inplace=True)
    return F.silu(y)


def shifted(x: Tensor, shift: Tensor) -> Tensor:
    """x [n ... c] + shift [m c], each row of it for n / m neighbours"""
    rows = x.unflatten(0, (len(shift), -1))
    return (rows + shift.view(len(shift), *[1] * (x.ndim - 1), -1)).view(x.shape)


def untouched(module: nn.Module, *kinds: type[nn.Module]) -> bool:
    """Whether a module does what its kind was written to do, and nobody listens at it."""
    if type(module) not in kinds or "forward" in vars(module):
        return False
    return not (module._forward_hooks or module._forward_pre_hooks)


def per_frame(module: nn.Module, x: Tensor) -> Tensor:
    """Run a module that knows no frames, [n h w c] -> [n h' w' c'], on every frame of x [b f h w c]."""
    return module(x.flatten(0, 1)).unflatten(0, x.shape[:2])


def zero_(module: nn.Module) -> nn.Module:
    """Zero a module's parameters: a branch that ends in it starts as the identity."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module
