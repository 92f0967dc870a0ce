"""Small parts that every other module uses. All of them keep channels last.

Axes: b batch, f frames, h w latent rows and columns, c channels; n whatever else comes first.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.nn.utils.parametrize import type_before_parametrizations

from i2vgen.fast import kernels

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

    # Without gradients, see `speed.py`:
    in_place = False  # two products, the gate in place
    kernel = False  # or one product, the gate by one kernel
    chunk = 0  # tokens at once; 0: all

    def __init__(self, width: int):
        super().__init__()
        self.proj_in = nn.Linear(width, 8 * width)
        self.proj_out = nn.Linear(4 * width, width)

    @property
    def last(self) -> nn.Module:
        return self.proj_out

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() or not (self.in_place or self.kernel):
            value, gate = self.proj_in(x).chunk(2, dim=-1)
            return self.proj_out(value * F.gelu(gate))
        done = [self.proj_out(self.gated(part)) for part in self.parts(x.contiguous())]
        return (done[0] if len(done) == 1 else torch.cat(done)).view_as(x)

    def add_to(self, y: Tensor, x: Tensor, last: Tensor | None = None) -> None:
        """y [n ... c'] += what `forward` makes of x [n ... c] but for the last bias; see `stream.py`.

        `last` [c' 4c] in place of the last weights.
        """
        last = self.proj_out.weight if last is None else last
        for part, into in zip(self.parts(x.contiguous()), self.parts(y), strict=True):
            add_product(into, self.gated(part), last)

    def parts(self, x: Tensor) -> tuple[Tensor, ...]:
        """At most `chunk` tokens are eight times as wide at a time."""
        tokens = x.view(-1, x.shape[-1])
        return tokens.split(self.chunk or len(tokens))

    def gated(self, x: Tensor) -> Tensor:
        """[n c] -> [n 4c] without copies"""
        if self.kernel:
            return kernels.geglu(self.proj_in(x))
        if not (self.in_place and untouched(self.proj_in, nn.Linear)):
            value, gate = self.proj_in(x).chunk(2, dim=-1)
            return value * F.gelu(gate)
        value, gate = zip(self.proj_in.weight.chunk(2), self.proj_in.bias.chunk(2), strict=True)
        return torch.ops.aten.gelu_(product(x, *gate)).mul_(product(x, *value))


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

    # Without gradients, see `speed.py`: one operation, with SiLU where that follows; SiLU over the result.
    kernel = in_place = False

    def forward(self, x: Tensor) -> Tensor:
        if self.kernel and not torch.is_grad_enabled():
            return self.by_kernel(x, silu=False)
        y = super().forward(rearrange(x.flatten(2, -2), "n h w c -> n c h w"))
        return rearrange(y, "n c h w -> n h w c").reshape(x.shape)

    def by_kernel(self, x: Tensor, *, silu: bool, shift: Tensor | None = None) -> Tensor:
        return kernels.group_norm(x, self.num_groups, self.weight, self.bias, self.eps, silu, shift)

    def of_parts(self, x: Tensor, size: int) -> Callable[[Tensor], Tensor]:
        """x [n f p c] -> the norm of any part [n f p' c] of it, by the statistics of the whole.

        They are taken here from `size` of p at a time, in at least float32: first every piece by itself, then
        together (Chan, Golub, LeVeque 1979), so that no large numbers cancel.
        """
        wide = torch.promote_types(x.dtype, torch.float32)
        pieces = x.split(size, dim=2)
        found = [self._statistics(piece.to(wide)) for piece in pieces]
        share = [piece.shape[2] / x.shape[2] for piece in pieces]
        mean = sum(s * m for s, (_, m) in zip(share, found, strict=True))
        var = sum(s * (v + (m - mean) ** 2) for s, (v, m) in zip(share, found, strict=True))
        scale = torch.rsqrt(var + self.eps).repeat_interleave(x.shape[-1] // self.num_groups, dim=-1)
        shift = -mean.repeat_interleave(x.shape[-1] // self.num_groups, dim=-1) * scale
        if self.weight is not None:
            scale, shift = scale * self.weight.to(wide), shift * self.weight.to(wide) + self.bias.to(wide)
        scale, shift = (rearrange(y, "n c -> n 1 1 c") for y in (scale, shift))
        return lambda part: torch.addcmul(shift, part.to(wide), scale).to(part.dtype)

    def _statistics(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[n f p c] -> variance and mean of every group, each [n g]"""
        return torch.var_mean(x.unflatten(-1, (self.num_groups, -1)), dim=(1, 2, 4), correction=0)


def norm_silu(norm: nn.Module, x: Tensor, shift: Tensor | None = None) -> Tensor:
    """SiLU(norm(x + shift)): x [n ... c], shift [m c], each row of it for n / m neighbours -> like x"""
    known = untouched(norm, GroupNorm) and not torch.is_grad_enabled()
    if known and norm.kernel:
        return norm.by_kernel(x, silu=True, shift=shift)
    return F.silu(norm(x if shift is None else kernels.shifted(x, shift)), inplace=known and norm.in_place)


def untouched(module: nn.Module, *kinds: type[nn.Module]) -> bool:
    """Whether a module does what its kind was written to do, and nobody listens at it."""
    if type(module) not in kinds or "forward" in vars(module):
        return False
    return not (module._forward_hooks or module._forward_pre_hooks)


def product(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x [n k] times a layer's weight [c k], plus its bias -> [n c]"""
    if x.device.type == "cpu":  # PyTorch fills the result with the bias first, and that takes longer
        return torch.mm(x, weight.t()).add_(bias)
    return F.linear(x, weight, bias)


def add_product(y: Tensor, x: Tensor, weight: Tensor) -> None:
    """y [... c] += x [... k] times a layer's weight [c k], inside the product; its bias is left out."""
    y.view(-1, y.shape[-1]).addmm_(x.reshape(-1, x.shape[-1]), weight.t())


def per_frame(module: nn.Module, x: Tensor) -> Tensor:
    """Run a module that knows no frames, [n h w c] -> [n h' w' c'], on every frame of x [b f h w c]."""
    return module(x.flatten(0, 1)).unflatten(0, x.shape[:2])


def in_chunks(
    function: Callable[..., Tensor], size: int, axis: int, *inputs: Tensor, into: Tensor | None = None
) -> Tensor:
    """function(*inputs) with at most `size` of an axis at once; all at once for size 0 or with gradients.

    Exact where the function keeps the places of that axis apart. `into` receives the result and may be an
    input: a part is read before it is written.
    """
    n = inputs[0].shape[axis]
    if not 0 < size < n or torch.is_grad_enabled():
        return function(*inputs)
    for i in range(0, n, size):
        part = function(*(x.narrow(axis, i, min(size, n - i)) for x in inputs))
        if into is None:
            into = part.new_empty(*part.shape[:axis], n, *part.shape[axis + 1 :])
        into.narrow(axis, i, part.shape[axis]).copy_(part)
        del part  # before the next one is made
    return into


def as_written(module: nn.Module, *kinds: type[nn.Module]) -> bool:
    """Whether a module's parts are of these kinds and nobody listens at them: then chunks are exact."""
    return all(
        type_before_parametrizations(part) in kinds
        and not part._forward_hooks
        and not part._forward_pre_hooks
        for part in module.children()
    )


def zero_(module: nn.Module) -> nn.Module:
    """Zero a module's parameters: a branch that ends in it starts as the identity."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module
