"""What mixes pixels inside a frame and never looks at another frame. All tensors are [b f h w c].

Axes: b batch, f frames, h w latent rows and columns, c channels, k context tokens, d context width,
e embedding width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from i2vgen.fast.stream import Stream
from i2vgen.model.attention import Attention, Keys
from i2vgen.model.layers import (
    RES_EPS,
    TRANSFORMER_EPS,
    Conv,
    FeedForward,
    GroupNorm,
    as_written,
    in_chunks,
    norm_silu,
    per_frame,
    untouched,
    zero_,
)


class ResBlock(nn.Module):
    """Two convolutions around the addition of the timestep embedding, and a skip."""

    tokens = 0  # at once, in whole frames; 0: all; see `speed.py`

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
        known = as_written(self, GroupNorm, Conv, nn.Linear, nn.Dropout, nn.Identity)
        frames = frames_at_once(self.tokens, x) if known else 0
        return in_chunks(lambda part: self.on_frames(part, embedding), frames, 1, x)

    def on_frames(self, x: Tensor, embedding: Tensor) -> Tensor:
        frames = x.flatten(0, 1)
        y = self.conv1(norm_silu(self.norm1, frames))
        y = norm_silu(self.norm2, y, self.embedding(F.silu(embedding)))
        y = self.conv2(self.dropout(y))
        return (self.skip(frames) + y).unflatten(0, x.shape[:2])


class SpatialTransformer(nn.Module):
    """Self-attention over a frame's pixels, cross-attention to the context tokens, feed-forward."""

    tokens = 0  # at once, in whole frames; 0: all; see `speed.py`
    # Without gradients, see `stream.py` and `speed.py`.
    sum_in_place = kernel = False

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
        return in_chunks(lambda part: self.finish(part, self.begin(part), context), self.frames(x), 1, x)

    def before_reading(self, x: Tensor) -> Tensor:
        """What needs no context: x [b f h w c] -> y [b f (h w) c]"""

        def begun(part: Tensor) -> Tensor:
            return rearrange(self.begin(part).settle(), "b (f p) c -> b f p c", f=part.shape[1])

        return in_chunks(begun, self.frames(x), 1, x)

    def read(self, x: Tensor, y: Tensor, context: Tensor | Keys) -> Tensor:
        """x [b f h w c], y [b f (h w) c], context [b k d] -> [b f h w c]"""

        def reading(x: Tensor, y: Tensor) -> Tensor:
            return self.finish(x, self.stream(y.flatten(1, 2), own=False), context)

        return in_chunks(reading, self.frames(x), 1, x, y)

    def frames(self, x: Tensor) -> int:
        known = as_written(self, GroupNorm, nn.LayerNorm, nn.Linear, Attention, FeedForward)
        return frames_at_once(self.tokens, x) if known else 0

    def begin(self, x: Tensor) -> Stream:
        y = rearrange(self.proj_in(per_frame(self.norm, x)), "b f h w c -> (b f) (h w) c")
        y = self.stream(y, own=untouched(self.proj_in, nn.Linear))
        y.add(self.self_attention, y.read(self.norm1))
        # All frames of a sample see the same context: they are one long sequence of queries.
        y.x = rearrange(y.x, "(b f) p c -> b (f p) c", b=len(x))
        return y

    def finish(self, x: Tensor, y: Stream, context: Tensor | Keys) -> Tensor:
        y.add(self.cross_attention, y.read(self.norm2), context)
        y.add(self.feed_forward, y.read(self.norm3))
        return y.onto(x, self.proj_out)

    def stream(self, y: Tensor, *, own: bool) -> Stream:
        return Stream(y, in_place=self.sum_in_place, kernel=self.kernel, own=own)


class Downsample(nn.Module):
    """Half the rows and columns by a convolution of stride 2; with `margin` a row more above and below."""

    tokens = 0  # at once, in whole frames; 0: all; see `speed.py`

    def __init__(self, width: int, *, margin: bool = False):
        super().__init__()
        self.conv = Conv(width, width, 3, stride=2, padding=(2, 1) if margin else 1)

    def forward(self, x: Tensor) -> Tensor:
        frames = frames_at_once(self.tokens, x) if as_written(self, Conv) else 0
        return in_chunks(lambda part: per_frame(self.conv, part), frames, 1, x)


class Upsample(nn.Module):
    """Twice the rows and columns, with `margin` without the outer rows: repeated, then convolved."""

    subpixel = False  # the same by four 2 x 2 convolutions before enlarging; see `speed.py`
    tokens = 0  # of the result at once, in whole frames; 0: all

    def __init__(self, width: int, *, margin: bool = False):
        super().__init__()
        self.margin = margin
        self.conv = Conv(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        frames = frames_at_once(self.tokens // 4, x) if as_written(self, Conv) else 0
        return in_chunks(self.on_frames, frames, 1, x)

    def on_frames(self, x: Tensor) -> Tensor:
        if self.subpixel and type(self.conv) is Conv and not self.few_pixels(x):
            return per_frame(self.before_enlarging, x)
        return per_frame(self.conv, self.enlarged(x))

    def enlarged(self, x: Tensor) -> Tensor:
        y = nearest_twice(x)
        return y[..., 1:-1, :, :] if self.margin else y

    def few_pixels(self, x: Tensor) -> bool:
        """Whether folding the weights costs more than it saves."""
        return self.conv.product and self.conv.product_pays(x.flatten(0, 1))

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


def frames_at_once(tokens: int, x: Tensor) -> int:
    """How many frames of x [b f h w c] are at most so many tokens, but one at least; 0 is all."""
    b, _, h, w, _ = x.shape
    return max(1, tokens // (b * h * w)) if tokens else 0


def halves(like: Tensor) -> Tensor:
    """[9 16]: the nine weights of a 3 x 3 kernel -> four 2 x 2 kernels, for even and odd rows and columns."""
    # Kernel row r goes to row u of two: 0 1 1 for even output rows, 0 0 1 for odd ones. Made on the device,
    # since a CUDA graph may not wait for the CPU.
    i, r, u = (torch.arange(size, device=like.device) for size in (2, 3, 2))
    rows = ((1 + r - i[:, None]) // 2)[..., None] == u
    rows = rows.to(like.dtype)
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
