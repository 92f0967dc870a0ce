"""The autoencoder's wide layers in bands of rows: the whole picture's numbers, a part of its memory.

Tiles that are decoded one by one would change the frames, since every norm has statistics over the whole
picture. Here a layer sees the whole: the norm takes its statistics first, then a band of rows at a time is
normed and convolved, with one row more on each side. Only the layer's input and result are whole.

Axes: n pictures, c channels, h w rows and columns.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from i2vgen.model.layers import Conv, GroupNorm

Pointwise = Callable[[Tensor], Tensor]


def pays(rows: int, x: Tensor) -> bool:
    """Whether x [n h w c] has more rows than a band; training keeps the plain way."""
    return 0 < rows < x.shape[1] and not torch.is_grad_enabled()


def norm_silu(norm: GroupNorm, x: Tensor, rows: int) -> Pointwise:
    """x [n h w c] -> SiLU of the norm of any rows of it, by the statistics of the whole."""
    normed = norm.of_parts(rearrange(x, "n h w c -> n w h c"), rows)
    return lambda part: F.silu(normed(part), inplace=True)


def convolved(conv: Conv, x: Tensor, rows: int, before: Pointwise, *, enlarge: int = 1) -> Tensor:
    """conv(before(x)) for a 3 x 3 convolution, x [n h w c] -> [n h' w' c'], at most `rows` rows of x at once.

    `before` keeps rows apart and makes `enlarge` of each.
    """
    n, h = x.shape[:2]
    out = None
    for top in range(0, h, rows):
        end = min(top + rows, h)
        first, last = max(0, top - 1), min(h, end + 1)
        part = before(x[:, first:last])
        # The convolution reads one row more on each side: a neighbour's, or the zeros around the picture.
        above, below = 1 - enlarge * (top - first), 1 - enlarge * (last - end)
        part = F.pad(part, (0, 0, 0, 0, above, below))  # cuts where negative
        part = F.conv2d(rearrange(part, "n h w c -> n c h w"), conv.weight, conv.bias, padding=(0, 1))
        part = rearrange(part, "n c h w -> n h w c")
        if out is None:
            out = part.new_empty(n, enlarge * h, *part.shape[2:])
        out[:, enlarge * top : enlarge * end] = part
        del part  # before the next one is made
    return out


def add(y: Tensor, function: Pointwise, x: Tensor, rows: int) -> Tensor:
    """y [n h w c'] += function(x), x [n h w c], in bands -> y"""
    for into, part in zip(y.split(rows, dim=1), x.split(rows, dim=1), strict=True):
        into += function(part)
    return y
