"""What mixes pixels inside a frame and never looks at another frame. All tensors are [b f h w c].

Axes: b batch, f frames, h w latent rows and columns, c channels, k context tokens, d context width,
e embedding width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from i2vgen.attention import Attention, Keys
from i2vgen.layers import RES_EPS, TRANSFORMER_EPS, Conv, FeedForward, GroupNorm, per_frame, zero_


class ResBlock(nn.Module):
    """Two convolutions around the addition of the timestep embedding, and a skip."""

    def __init__(self, width_in: int, width: int, embedding_width: int, *, groups: int, dropout: float):
        super().__init__()
        self.norm1 = GroupNorm(groups, width_in, eps=RES_EPS)
        self.conv1 = Conv(width_in, width, 3, padding=1)
        self.embedding = nn.Linear(embedding_width, width)
        self.norm2 = GroupNorm(groups, width, eps=RES_EPS)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = zero_(Conv(width, width, 3, padding=1))
        self.skip = Conv(width_in, width, 1) if width_in != width else nn.Identity()

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """x [b f h w c], embedding [b e] -> [b f h w c']"""
        y = per_frame(self.conv1, F.silu(per_frame(self.norm1, x)))
        y = y + rearrange(self.embedding(F.silu(embedding)), "b c -> b 1 1 1 c")
        y = per_frame(self.conv2, self.dropout(F.silu(per_frame(self.norm2, y))))
        return per_frame(self.skip, x) + y


class SpatialTransformer(nn.Module):
    """Self-attention over a frame's pixels, cross-attention to the context tokens, feed-forward."""

    def __init__(self, width: int, context_width: int, *, head_width: int, groups: int, backend: str):
        super().__init__()
        heads = width // head_width
        self.norm = GroupNorm(groups, width, eps=TRANSFORMER_EPS)
        self.proj_in = nn.Linear(width, width)
        self.norm1 = nn.LayerNorm(width)
        self.self_attention = Attention(width, width, heads, head_width, backend=backend)
        self.norm2 = nn.LayerNorm(width)
        self.cross_attention = Attention(width, context_width, heads, head_width, backend=backend)
        self.norm3 = nn.LayerNorm(width)
        self.feed_forward = FeedForward(width)
        self.proj_out = zero_(nn.Linear(width, width))

    def forward(self, x: Tensor, context: Tensor | Keys) -> Tensor:
        """x [b f h w c], context [b k d] -> [b f h w c]"""
        return self.read(x, self.before_reading(x), context)

    def before_reading(self, x: Tensor) -> Tensor:
        """What needs no context: x [b f h w c] -> y [b (f h w) c]"""
        y = rearrange(self.proj_in(per_frame(self.norm, x)), "b f h w c -> (b f) (h w) c")
        y = y + self.self_attention(self.norm1(y))
        # All frames of a sample see the same context: they are one long sequence of queries.
        return rearrange(y, "(b f) p c -> b (f p) c", b=len(x))

    def read(self, x: Tensor, y: Tensor, context: Tensor | Keys) -> Tensor:
        """x [b f h w c], y [b (f h w) c], context [b k d] -> [b f h w c]"""
        _, f, h, w, _ = x.shape
        y = y + self.cross_attention(self.norm2(y), context)
        y = y + self.feed_forward(self.norm3(y))
        return x + rearrange(self.proj_out(y), "b (f h w) c -> b f h w c", f=f, h=h, w=w)


class Downsample(nn.Module):
    """Half the rows and columns by a convolution of stride 2; with `margin` a row more above and below."""

    def __init__(self, width: int, *, margin: bool = False):
        super().__init__()
        self.conv = Conv(width, width, 3, stride=2, padding=(2, 1) if margin else 1)

    def forward(self, x: Tensor) -> Tensor:
        return per_frame(self.conv, x)


class Upsample(nn.Module):
    """Twice the rows and columns, with `margin` without the outer rows: repeated, then convolved."""

    subpixel = False  # the same by four 2 x 2 convolutions before enlarging; see `speed.py`

    def __init__(self, width: int, *, margin: bool = False):
        super().__init__()
        self.margin = margin
        self.conv = Conv(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        if self.subpixel and type(self.conv) is Conv:
            return per_frame(self.before_enlarging, x)
        return per_frame(self.conv, self.enlarged(x))

    def enlarged(self, x: Tensor) -> Tensor:
        y = nearest_twice(x)
        return y[..., 1:-1, :, :] if self.margin else y

    def before_enlarging(self, x: Tensor) -> Tensor:
        """[n h w c] -> [n 2h 2w c'], or [n 2h-2 2w c'] with `margin`

        After doubling, the three rows that an output row reads are two rows of x, one of them twice: an even
        output row reads x's row above with the first kernel row and its own with the sum of the other two,
        an odd one its own with the sum of the first two and the row below with the last. So for columns.
        """
        n, h, w, _ = x.shape
        # One product, so that half precision rounds the sums once.
        weight = self.conv.weight.flatten(2) @ halves(self.conv.weight)
        weight = rearrange(weight, "o c (i j u v) -> (i j o) c u v", i=2, j=2, u=2)
        y = F.conv2d(rearrange(x, "n h w c -> n c h w"), weight, self.conv.bias.repeat(4), padding=1)
        y = rearrange(y, "n (i j c) h w -> n i j h w c", i=2, j=2)
        # Output row 2r + i looks at rows r - 1 + i and r + i of x, which is window r + i of the convolution.
        # Without the outer rows pairs begin with an odd row, and both rows of a pair look at one window.
        pairs = h - 1 if self.margin else h
        out = x.new_empty(n, pairs, 2, w, 2, y.shape[-1])
        for i in range(2):
            for j in range(2):
                first, row = (1, 1 - i) if self.margin else (i, i)
                out[:, :, i, :, j] = y[:, row, j, first : first + pairs, j : j + w]
        out = out.view(n, 2 * pairs, 2 * w, -1)
        if self.margin:  # the outermost rows that are left see zeros where the ones cut off were
            out[:, :1] = self.conv(self.enlarged(x[:, :2]))[:, :1]
            out[:, -1:] = self.conv(self.enlarged(x[:, -2:]))[:, -1:]
        return out


def halves(like: Tensor) -> Tensor:
    """[9 16]: the nine weights of a 3 x 3 kernel -> four 2 x 2 kernels, for even and odd rows and columns."""
    even, odd = [[1, 0], [0, 1], [0, 1]], [[1, 0], [1, 0], [0, 1]]  # three rows of the kernel -> two
    rows = torch.tensor([even, odd], dtype=like.dtype, device=like.device)
    return torch.einsum("iru, jsv -> rsijuv", rows, rows).reshape(9, 16)


def nearest_twice(x: Tensor) -> Tensor:
    """[... h w c] -> [... 2h 2w c]"""
    return x.repeat_interleave(2, dim=-3).repeat_interleave(2, dim=-2)


# FreeU (Si et al. 2023) as SR600 has it, for the decoder's first two blocks: a gain on the first half of the
# backbone's channels, and one on the lowest frequencies of the skip.
SKIP_FILTERS = {"none": (), "sr600": ((1.1, 0.6), (1.2, 0.4))}


def filter_skip(x: Tensor, skip: Tensor, gains: tuple[float, float]) -> tuple[Tensor, Tensor]:
    """Backbone and skip [b f h w c] before they are joined -> both, filtered."""
    backbone, low = gains
    half = x.shape[-1] // 2
    return torch.cat([x[..., :half] * backbone, x[..., half:]], dim=-1), damp_lowest(skip, low)


def damp_lowest(x: Tensor, gain: float) -> Tensor:
    """[.. h w c] -> same: frequencies 0 and -1 of rows and columns, the mean among them, times `gain`.

    So lopsided the official filter is, and it keeps the real part. At least float32.
    """
    h, w, _ = x.shape[-3:]
    spectrum = torch.fft.fft2(x.to(torch.promote_types(x.dtype, torch.float32)), dim=(-3, -2))
    gains = torch.ones(h, w, 1, dtype=spectrum.real.dtype, device=x.device)
    for row in (0, -1):
        gains[row, [0, -1]] = gain
    return torch.fft.ifft2(spectrum * gains, dim=(-3, -2)).real.to(x.dtype)
