"""The parts that mix pixels inside a frame and never look at another frame. All tensors are [b f h w c].

Axes: b batch, f frames, h w latent rows and columns, p = h w flattened, c channels, k context tokens,
d context width, e embedding width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from i2vgen.model.attention import Attention
from i2vgen.model.layers import RES_EPS, TRANSFORMER_EPS, Conv, FeedForward, GroupNorm, per_frame, zero_


class ResBlock(nn.Module):
    """Two convolutions with the timestep embedding added between them, and a skip around both."""

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

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """x [b f h w c], context [b k d] -> [b f h w c]"""
        b = len(x)
        y = rearrange(self.proj_in(per_frame(self.norm, x)), "b f h w c -> (b f) (h w) c")
        y = y + self.self_attention(self.norm1(y))
        # All frames of a sample read the same context, so together they are one sequence of queries.
        y = rearrange(y, "(b f) p c -> b (f p) c", b=b)
        y = y + self.cross_attention(self.norm2(y), context)
        y = y + self.feed_forward(self.norm3(y))
        return x + self.proj_out(y).view_as(x)


class Downsample(nn.Module):
    """Half the rows and columns by a convolution of stride 2; `margin` pads one more row above and below."""

    def __init__(self, width: int, *, margin: bool = False):
        super().__init__()
        self.conv = Conv(width, width, 3, stride=2, padding=(2, 1) if margin else 1)

    def forward(self, x: Tensor) -> Tensor:
        return per_frame(self.conv, x)


class Upsample(nn.Module):
    """Twice the rows and columns by repetition, then a convolution; `margin` drops the outermost rows."""

    def __init__(self, width: int, *, margin: bool = False):
        super().__init__()
        self.margin = margin
        self.conv = Conv(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = nearest_twice(x)
        return per_frame(self.conv, y[..., 1:-1, :, :] if self.margin else y)


def nearest_twice(x: Tensor) -> Tensor:
    """[... h w c] -> [... 2h 2w c]"""
    return x.repeat_interleave(2, dim=-3).repeat_interleave(2, dim=-2)


# FreeU (Si et al. 2023) as SR600 applies it to the decoder's first two blocks: a gain for the first half of
# the backbone's channels, and one for the lowest frequencies of the skip.
SKIP_FILTERS = {"none": (), "sr600": ((1.1, 0.6), (1.2, 0.4))}


def filter_skip(x: Tensor, skip: Tensor, gains: tuple[float, float]) -> tuple[Tensor, Tensor]:
    """Backbone and skip [b f h w c] before they are concatenated -> both, filtered."""
    backbone, low = gains
    half = x.shape[-1] // 2
    return torch.cat([x[..., :half] * backbone, x[..., half:]], dim=-1), damp_lowest(skip, low)


def damp_lowest(x: Tensor, gain: float) -> Tensor:
    """[... h w c] -> same: multiply frequencies 0 and -1 of rows and columns, the mean among them, by `gain`.

    The official filter has this asymmetry and keeps the real part. Computed in at least float32.
    """
    h, w, _ = x.shape[-3:]
    spectrum = torch.fft.fft2(x.to(torch.promote_types(x.dtype, torch.float32)), dim=(-3, -2))
    gains = torch.ones(h, w, 1, dtype=spectrum.real.dtype, device=x.device)
    for row in (0, -1):
        gains[row, [0, -1]] = gain
    return torch.fft.ifft2(spectrum * gains, dim=(-3, -2)).real.to(x.dtype)
