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
from i2vgen.layers import RES_EPS, TRANSFORMER_EPS, Conv, FeedForward, GroupNorm, norm_silu, per_frame, zero_


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
        frames = x.flatten(0, 1)
        y = self.conv1(norm_silu(self.norm1, frames))
        y = norm_silu(self.norm2, y, self.embedding(F.silu(embedding)))
        y = self.conv2(self.dropout(y))
        return (self.skip(frames) + y).unflatten(0, x.shape[:2])


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
    """Half the rows and columns by a convolution of stride 2."""

    def __init__(self, width: int):
        super().__init__()
        self.conv = Conv(width, width, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return per_frame(self.conv, x)


class Upsample(nn.Module):
    """Twice the rows and columns: nearest neighbour, then a convolution."""

    subpixel = False  # the same by four 2 x 2 convolutions before enlarging; see `speed.py`

    def __init__(self, width: int):
        super().__init__()
        self.conv = Conv(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        if self.subpixel and type(self.conv) is Conv and not self.few_pixels(x):
            return per_frame(self.before_enlarging, x)
        return per_frame(self.conv, nearest_twice(x))

    def few_pixels(self, x: Tensor) -> bool:
        """Whether folding the weights costs more than it saves."""
        return self.conv.product and self.conv.product_pays(x.flatten(0, 1))

    def before_enlarging(self, x: Tensor) -> Tensor:
        """[n h w c] -> [n 2h 2w c']

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
        out = x.new_empty(n, h, 2, w, 2, y.shape[-1])
        for i in range(2):
            for j in range(2):
                out[:, :, i, :, j] = y[:, i, j, i : i + h, j : j + w]
        return out.view(n, 2 * h, 2 * w, -1)


def halves(like: Tensor) -> Tensor:
    """[9 16]: the nine weights of a 3 x 3 kernel -> four 2 x 2 kernels, for even and odd rows and columns."""
    even, odd = [[1, 0], [0, 1], [0, 1]], [[1, 0], [1, 0], [0, 1]]  # three rows of the kernel -> two
    rows = torch.tensor([even, odd], dtype=like.dtype, device=like.device)
    return torch.einsum("iru, jsv -> rsijuv", rows, rows).reshape(9, 16)


def nearest_twice(x: Tensor) -> Tensor:
    """[... h w c] -> [... 2h 2w c]"""
    return x.repeat_interleave(2, dim=-3).repeat_interleave(2, dim=-2)
