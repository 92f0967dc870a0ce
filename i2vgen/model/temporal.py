"""The parts that mix frames and never look at another pixel. Tensors are [b f h w c] as everywhere.

The released model has no positional encoding over frames. It learns their order from the frame-position
planes (`conditioning.py`) and from the zero padding of the temporal convolutions.

Axes: b batch, f frames, h w latent rows and columns, p = h w flattened, c channels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from i2vgen.model.attention import FrameAttention
from i2vgen.model.layers import RES_EPS, TRANSFORMER_EPS, Conv, FeedForward, GroupNorm, sinusoid, zero_


class TemporalConv(nn.Module):
    """Four stages of norm, SiLU and a convolution over three frames; one residual around all four."""

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
        for stage in self.stages:
            y = stage(y)
        return x + y.view_as(x)


class ConvStage(nn.Module):
    """Norm, SiLU, dropout and one convolution over three frames."""

    def __init__(self, width: int, *, groups: int, dropout: float):
        super().__init__()
        self.norm = GroupNorm(groups, width, eps=RES_EPS)
        self.dropout = nn.Dropout(dropout)
        # With pixels flattened, the convolution is two-dimensional: frames are its rows, pixels its columns.
        self.conv = Conv(width, width, (3, 1), padding=(1, 0))

    def forward(self, x: Tensor) -> Tensor:
        """x [b f p c] -> same"""
        return self.conv(self.dropout(F.silu(self.norm(x))))


class TemporalTransformer(nn.Module):
    """Two self-attentions over the frames of every pixel, each with its own weights, and a feed-forward."""

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
        """x [b f h w c] -> same. The first norm's statistics run over frames and pixels together."""
        y = self.proj_in(self.norm(rearrange(x, "b f h w c -> b f (h w) c")))
        if self.positions is not None:
            y = y + self.positions(x.shape[1])
        y = y + self.attention1(self.norm1(y))
        if self.attention2 is not None:
            y = y + self.attention2(self.norm2(y))
        y = y + self.feed_forward(self.norm3(y))
        return x + self.proj_out(y).view_as(x)


class FramePositions(nn.Module):
    """`use.frame_positions`: the frame number as sinusoids, through a layer that starts at zero."""

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

    It has a plain GELU instead of GEGLU and no norm before the feed-forward, as in the released model.
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
    """Attention over frames and a feed-forward, each with a residual."""

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
