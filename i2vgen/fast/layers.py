"""Faster forms of the small layers, and the pieces that the faster blocks are made of.

Axes: n independent samples, c channels; b batch, f frames, p pixels of a frame; the others as in `model`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from i2vgen.fast import half, kernels
from i2vgen.fast.guard import diverted, plain_kind, touched
from i2vgen.model.layers import Conv, FeedForward, GroupNorm

# Where a convolution on a CPU is faster as one matrix product, measured with 64 to 1280 channels; in bfloat16
# half of each.
FEW_PIXELS = 512
MANY_CHANNELS = 512


class Savings(NamedTuple):
    """Which savings a module of the `fast` wing applies; `savings.apply` stores one as `module.savings`."""

    names: frozenset[str] = frozenset()  # of `savings.SAVINGS`
    batch_guidance: bool = False  # both branches of guidance as one batch, not one after the other
    token_chunk: int = 0  # tokens that a layer computes at a time; 0 disables chunking
    row_chunk: int = 0  # rows of a picture that a layer of the autoencoder computes at a time; 0 disables it


class FastConv(Conv):
    """`convolution_products`: on a CPU, a convolution with many channels over few pixels as one product.

    There a CPU's convolution kernel spends most of its time on laying out the weights.
    """

    plain = Conv
    savings: Savings

    def forward(self, x: Tensor) -> Tensor:
        if diverted(self) or not self.product_pays(x):
            return super().forward(x)
        (up, left), (rows, columns) = self.padding, self.kernel_size
        x = F.pad(x, (0, 0, left, left, up, up))
        windows = x.unfold(1, rows, self.stride[0]).unfold(2, columns, self.stride[1])
        windows = rearrange(windows, "n h w c i j -> n h w (i j c)")
        return F.linear(windows, rearrange(self.weight, "o c i j -> o (i j c)"), self.bias)

    def product_pays(self, x: Tensor) -> bool:
        pixels = math.prod(x.shape[:3]) // math.prod(self.stride)
        smaller = 2 if x.dtype in half.HALF else 1
        few, many = FEW_PIXELS // smaller, MANY_CHANNELS // smaller
        return x.device.type == "cpu" and pixels <= few and self.in_channels >= many


class FastGroupNorm(GroupNorm):
    """`kernels`: one operation instead of three passes. `half_on_cpu`: half precision there in float32."""

    plain = GroupNorm
    savings: Savings

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if diverted(self) else self.fused(x)

    def fused(self, x: Tensor, *, silu: bool = False, shift: Tensor | None = None) -> Tensor:
        """SiLU or nothing of the norm of x + shift: x [n ... c], shift [m c] for n / m neighbours"""
        if "kernels" in self.savings.names:
            return kernels.group_norm(x, self.num_groups, self.weight, self.bias, self.eps, silu, shift)
        if "half_on_cpu" in self.savings.names and half.here(x):
            return half.group_norm(self, x, silu=silu, shift=shift)
        y = super().forward(x if shift is None else kernels.shifted(x, shift))
        return F.silu(y, inplace=True) if silu else y


def norm_silu(norm: nn.Module, x: Tensor, shift: Tensor | None = None) -> Tensor:
    """SiLU(norm(x + shift)): x [n ... c], shift [m c], a row of which is for n / m neighbours -> like x"""
    if plain_kind(type(norm)) is not GroupNorm or touched(norm) or torch.is_grad_enabled():
        return F.silu(norm(x if shift is None else kernels.shifted(x, shift)))
    if type(norm) is FastGroupNorm:
        return norm.fused(x, silu=True, shift=shift)
    return F.silu(norm(x if shift is None else kernels.shifted(x, shift)), inplace=True)


class FastFeedForward(FeedForward):
    """`kernels`: the gate by one kernel. `in_place`: two products, and no copy of either half."""

    plain = FeedForward
    savings: Savings

    def forward(self, x: Tensor) -> Tensor:
        if diverted(self):
            return super().forward(x)
        return self.proj_out(self.gated(x))

    def add_to(self, y: Tensor, x: Tensor) -> None:
        """y [n ... c] += `forward(x)` without the last bias, inside the last product"""
        add_product(y, self.gated(x), self.proj_out.weight)

    def gated(self, x: Tensor) -> Tensor:
        """[... c] -> [... 4c]"""
        if "kernels" in self.savings.names:
            return kernels.geglu(self.proj_in(x))
        if "in_place" not in self.savings.names:
            value, gate = self.proj_in(x).chunk(2, dim=-1)
            return value * F.gelu(gate)
        value, gate = zip(self.proj_in.weight.chunk(2), self.proj_in.bias.chunk(2), strict=True)
        return torch.ops.aten.gelu_(product(x, *gate)).mul_(product(x, *value))


def product(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x [... k] times a layer's weight [c k], plus its bias -> [... c]"""
    # In float32 PyTorch copies the bias into the result first, which takes longer.
    if x.device.type == "cpu" and not half.here(x):
        return (x @ weight.t()).add_(bias)
    return F.linear(x, weight, bias)


def add_product(y: Tensor, x: Tensor, weight: Tensor) -> None:
    """y [... c] += x [... k] times a layer's weight [c k], inside the product"""
    y.view(-1, y.shape[-1]).addmm_(x.reshape(-1, x.shape[-1]), weight.t())


def in_chunks(
    function: Callable[..., Tensor], size: int, axis: int, *inputs: Tensor, into: Tensor | None = None
) -> Tensor:
    """function(*inputs), computed for `size` entries of an axis at a time; 0 disables chunking.

    Exact if the function treats the entries of that axis independently. The result is written to `into`,
    which may be one of the inputs: a chunk is read before it is written.
    """
    n = inputs[0].shape[axis]
    if not 0 < size < n:
        return function(*inputs)
    for i in range(0, n, size):
        part = function(*(x.narrow(axis, i, min(size, n - i)) for x in inputs))
        if into is None:
            into = part.new_empty(*part.shape[:axis], n, *part.shape[axis + 1 :])
        into.narrow(axis, i, part.shape[axis]).copy_(part)
        del part  # before the next chunk is computed
    return into


def norm_of_chunks(norm: GroupNorm, x: Tensor, size: int) -> Callable[[Tensor], Tensor]:
    """x [n f p c] -> the group norm of any part [n f p' c] of it, with the statistics of the whole.

    The statistics are taken here from `size` entries of p at a time and in at least float32, first of every
    piece and then combined (Chan, Golub, LeVeque 1979), so that no large numbers cancel.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    pieces = x.split(size, dim=2)
    found = [statistics(norm, piece.to(wide)) for piece in pieces]
    return with_statistics(norm, [piece.shape[2] / x.shape[2] for piece in pieces], found)


def statistics(norm: GroupNorm, x: Tensor) -> tuple[Tensor, Tensor]:
    """[n f p c] -> variance and mean of every group, each [n g]"""
    return torch.var_mean(x.unflatten(-1, (norm.num_groups, -1)), dim=(1, 2, 4), correction=0)


def with_statistics(
    norm: GroupNorm, shares: Sequence[float | Tensor], found: Sequence[tuple[Tensor, Tensor]]
) -> Callable[[Tensor], Tensor]:
    """The group norm of parts [n f p c] of a whole, from the `statistics` of its pieces and their shares"""
    mean = sum(s * m for s, (_, m) in zip(shares, found, strict=True))
    var = sum(s * (v + (m - mean) ** 2) for s, (v, m) in zip(shares, found, strict=True))
    wide, width = mean.dtype, norm.num_channels // norm.num_groups
    scale = torch.rsqrt(var + norm.eps).repeat_interleave(width, dim=-1)
    shift = -mean.repeat_interleave(width, dim=-1) * scale
    scale, shift = scale * norm.weight.to(wide), shift * norm.weight.to(wide) + norm.bias.to(wide)
    scale, shift = (rearrange(y, "n c -> n 1 1 c") for y in (scale, shift))
    return lambda part: torch.addcmul(shift, part.to(wide), scale).to(part.dtype)
