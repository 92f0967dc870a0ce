"""What mixes frames and never looks at another pixel. Tensors are [b f h w c] as everywhere.

The released model has no positional encoding over frames: order in time reaches it through the
frame-position planes (`conditioning.py`) and the zero padding of the temporal convolutions.

Axes: b batch, f frames, h w latent rows and columns, p = h w flattened, c channels.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from i2vgen.fast import folding
from i2vgen.fast.stream import Stream
from i2vgen.model.attention import FrameAttention
from i2vgen.model.layers import (
    RES_EPS,
    TRANSFORMER_EPS,
    Conv,
    FeedForward,
    GroupNorm,
    as_written,
    in_chunks,
    norm_silu,
    sinusoid,
    untouched,
    zero_,
)

Norm = Callable[[Tensor], Tensor]


class TemporalConv(nn.Module):
    """Four stages of norm, SiLU, convolution over three frames; one residual around all four."""

    tokens = 0  # at once, in whole pixels; 0: all; see `speed.py`

    def __init__(self, width: int, *, groups: int, dropout: float):
        super().__init__()
        # The first stage alone has no dropout.
        self.stages = nn.ModuleList(
            ConvStage(width, groups=groups, dropout=dropout if stage > 0 else 0.0) for stage in range(4)
        )
        zero_(self.stages[3].conv)

    def forward(self, x: Tensor) -> Tensor:
        """x [b f h w c] -> same. Norm statistics run over frames and pixels together."""
        y = rearrange(x, "b f h w c -> b f (h w) c")
        pixels = pixels_at_once(self.tokens, y)
        if pixels and all(type(s) is ConvStage and s.keeps_pixels_apart() for s in self.stages):
            return self.in_place(y, pixels).view_as(x)
        for stage in self.stages:
            y = stage(y)
        return x + y.view_as(x)

    def in_place(self, x: Tensor, pixels: int) -> Tensor:
        """x [b f p c] -> same: the first stage makes the result, the others and the sum write into it."""
        y = None
        for stage in self.stages:
            source = x if y is None else y
            norm = stage.norm.of_parts(source, pixels)
            y = in_chunks(lambda part, s=stage, n=norm: s.on_pixels(part, n), pixels, 2, source, into=y)
        return y.add_(x)


class ConvStage(nn.Module):
    def __init__(self, width: int, *, groups: int, dropout: float):
        super().__init__()
        self.norm = GroupNorm(groups, width, eps=RES_EPS)
        self.dropout = nn.Dropout(dropout)
        # With pixels flattened a convolution over frames is two-dimensional: frames are rows, pixels columns.
        self.conv = Conv(width, width, (3, 1), padding=(1, 0))

    def forward(self, x: Tensor) -> Tensor:
        """x [b f p c] -> same"""
        return self.conv(self.dropout(norm_silu(self.norm, x)))

    def on_pixels(self, x: Tensor, norm: Norm) -> Tensor:
        """`forward` of a part of the pixels, under the norm of all of them."""
        return self.conv(self.dropout(F.silu(norm(x))))

    def keeps_pixels_apart(self) -> bool:
        return as_written(self, GroupNorm, nn.Dropout, Conv) and self.conv.kernel_size[1] == 1


class TemporalTransformer(nn.Module):
    """Two self-attentions over the frames of every pixel, each with its own weights, and a feed-forward."""

    tokens = 0  # at once, in whole pixels; 0: all; see `speed.py`
    # Without gradients, see `stream.py`, `folding.py` and `speed.py`.
    sum_in_place = kernel = fold = False

    def __init__(
        self,
        width: int,
        *,
        heads: int,
        head_width: int,
        groups: int,
        second_attention: bool,
        positions: bool = False,
        backend: str,
    ):
        super().__init__()
        inner = heads * head_width
        self.norm = GroupNorm(groups, width, eps=TRANSFORMER_EPS)
        self.proj_in = nn.Linear(width, inner)
        self.positions = FramePositions(inner) if positions else None
        self.norm1 = nn.LayerNorm(inner)
        self.attention1 = FrameAttention(inner, inner, heads, head_width, backend=backend)
        self.norm2 = nn.LayerNorm(inner) if second_attention else None
        self.attention2 = (
            FrameAttention(inner, inner, heads, head_width, backend=backend) if second_attention else None
        )
        self.norm3 = nn.LayerNorm(inner)
        self.feed_forward = FeedForward(inner)
        self.proj_out = zero_(nn.Linear(inner, width))

    def forward(self, x: Tensor) -> Tensor:
        """x [b f h w c] -> same. The entrance norm's statistics run over frames and pixels together."""
        y, norm = rearrange(x, "b f h w c -> b f (h w) c"), self.norm
        known = as_written(
            self, GroupNorm, nn.LayerNorm, nn.Linear, FramePositions, FrameAttention, FeedForward
        )
        pixels = pixels_at_once(self.tokens, y) if known else 0
        if pixels:
            norm = norm.of_parts(y, pixels)
        return in_chunks(lambda part: self.on_pixels(part, norm), pixels, 2, y).view_as(x)

    def on_pixels(self, x: Tensor, norm: Norm) -> Tensor:
        """x [b f p c] -> same"""
        own, entering = untouched(self.proj_in, nn.Linear), norm(x)
        tokens = self.proj_in(entering)
        if self.positions is not None:
            tokens = tokens + self.positions(x.shape[1])
        y = Stream(tokens, in_place=self.sum_in_place, kernel=self.kernel, own=own)
        del tokens
        pays = self.fold and folding.pays(x.shape[:3].numel(), x.shape[-1], y.x.shape[-1])
        through = pays and self.positions is None  # what is folded is a function of `entering` alone
        if (
            through
            and y.fits(self.attention1)
            and folding.foldable(self.proj_in, self.norm1, self.attention1)
        ):
            first = folding.projected(entering, y.x, self.proj_in, self.norm1, self.attention1)
        else:
            del entering
            first = y.read(self.norm1)
        y.add(self.attention1, first)
        del first  # or it would lie there while the feed-forward is at its widest
        if self.attention2 is not None:
            y.add(self.attention2, y.read(self.norm2))
        if pays and y.fits(self.feed_forward) and untouched(self.proj_out, nn.Linear):
            return y.onto_folded(x, self.feed_forward, y.read(self.norm3), self.proj_out)
        y.add(self.feed_forward, y.read(self.norm3))
        return y.onto(x, self.proj_out)


def pixels_at_once(tokens: int, x: Tensor) -> int:
    """How many pixels of x [b f p c] are at most so many tokens; 0, which is all, without or with enough."""
    b, f, p, _ = x.shape
    pixels = max(1, tokens // (b * f)) if tokens else 0
    return pixels if pixels < p and not torch.is_grad_enabled() else 0


class FramePositions(nn.Module):
    """`use.frame_positions`: the number of a frame, as sinusoids through a layer that begins at zero."""

    def __init__(self, width: int):
        super().__init__()
        self.proj = zero_(nn.Linear(width, width, bias=False))

    def forward(self, frames: int) -> Tensor:
        """-> [f 1 c], to be added to [b f p c]"""
        weight = self.proj.weight
        numbers = torch.arange(frames, device=weight.device)
        return self.proj(sinusoid(numbers, weight.shape[1]).to(weight.dtype))[:, None]


class FrameEncoder(nn.Module):
    """The concat branch's transformer over frames, a few channels wide.

    Plain GELU instead of GEGLU, and no norm before the feed-forward: so the released model was trained.
    """

    def __init__(self, width: int, *, layers: int, heads: int, head_width: int, dropout: float, backend: str):
        super().__init__()
        self.layers = nn.ModuleList(
            FrameEncoderLayer(width, heads=heads, head_width=head_width, dropout=dropout, backend=backend)
            for _ in range(layers)
        )

    def forward(self, x: Tensor) -> Tensor:
        """x [b f h w c] -> same"""
        y = rearrange(x, "b f h w c -> b f (h w) c")
        for layer in self.layers:
            y = layer(y)
        return y.view_as(x)


class FrameEncoderLayer(nn.Module):
    def __init__(self, width: int, *, heads: int, head_width: int, dropout: float, backend: str):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = FrameAttention(width, width, heads, head_width, dropout=dropout, backend=backend)
        self.linear1 = nn.Linear(width, 4 * width)
        self.dropout = nn.Dropout(dropout)
        self.linear2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """x [b f p c] -> same"""
        x = x + self.attention(self.norm(x))
        return x + self.linear2(self.dropout(F.gelu(self.linear1(x))))
