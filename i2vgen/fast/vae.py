"""The autoencoder's wide layers in chunks of rows: the whole picture's numbers in a part of its memory.

Tiles that are decoded separately would change the frames, since every norm has statistics over the whole
picture. Here the norm takes its statistics of the whole first; then a chunk of rows at a time is normed and
convolved, with one more row on each side. Only a layer's input and output exist whole.

Axes: n pictures, c channels, h w rows and columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from i2vgen.fast.guard import diverted
from i2vgen.fast.layers import Savings, norm_of_chunks
from i2vgen.model.layers import Conv, GroupNorm
from i2vgen.model.spatial import nearest_twice
from i2vgen.model.vae import Decoder, Level, ResBlock, Upsample

Pointwise = Callable[[Tensor], Tensor]


class ChunkedResBlock(ResBlock):
    """A chunk of rows at a time."""

    plain = ResBlock
    savings: Savings

    def forward(self, x: Tensor) -> Tensor:
        """[n h w c] -> [n h w c']"""
        rows = self.savings.row_chunk
        if rows >= x.shape[1] or diverted(self):
            return super().forward(x)
        y = convolved(self.conv1, x, rows, norm_silu(self.norm1, x, rows))
        y = convolved(self.conv2, y, rows, norm_silu(self.norm2, y, rows))
        for into, part in zip(y.split(rows, dim=1), x.split(rows, dim=1), strict=True):
            into += self.skip(part)
        return y


class ChunkedUpsample(Upsample):
    """A chunk of rows at a time."""

    plain = Upsample
    savings: Savings

    def forward(self, x: Tensor) -> Tensor:
        rows = self.savings.row_chunk
        if rows >= x.shape[1] or diverted(self):
            return super().forward(x)
        return convolved(self.conv, x, rows, nearest_twice, enlarge=2)


class ChunkedDecoder(Decoder):
    """The output layer a chunk of rows at a time, and no level's input kept while the level runs."""

    plain = Decoder
    savings: Savings

    def forward(self, x: Tensor) -> Tensor:
        if diverted(self):
            return super().forward(x)
        x = self.mid(self.conv_in(x))
        for part in parts(reversed(self.up)):
            x = part(x)
        rows = self.savings.row_chunk
        if rows >= x.shape[1]:
            return self.conv_out(F.silu(self.norm_out(x)))
        return convolved(self.conv_out, x, rows, norm_silu(self.norm_out, x, rows))


def parts(levels: Iterator[Level]) -> Iterator[nn.Module]:
    """Blocks, attentions and resampling in the order in which the levels call them"""
    for level in levels:
        for i, block in enumerate(level.blocks):
            yield block
            if len(level.attentions):
                yield level.attentions[i]
        if level.resample is not None:
            yield level.resample


def norm_silu(norm: GroupNorm, x: Tensor, rows: int) -> Pointwise:
    """x [n h w c] -> SiLU of the norm of any rows of it, with the statistics of the whole"""
    normed = norm_of_chunks(norm, rearrange(x, "n h w c -> n w h c"), rows)
    return lambda part: F.silu(normed(part), inplace=True)


def convolved(conv: Conv, x: Tensor, rows: int, before: Pointwise, *, enlarge: int = 1) -> Tensor:
    """conv(before(x)) for a 3 x 3 convolution, x [n h w c] -> [n h' w' c'], for `rows` rows of x at a time.

    `before` treats rows independently and makes `enlarge` of each.
    """
    n, h = x.shape[:2]
    out = None
    for top in range(0, h, rows):
        end = min(top + rows, h)
        first, last = max(0, top - 1), min(h, end + 1)
        part = before(x[:, first:last])
        # The convolution reads one more row on each side: a neighbour's, or the zeros around the picture.
        above, below = 1 - enlarge * (top - first), 1 - enlarge * (last - end)
        part = F.pad(part, (0, 0, 0, 0, above, below))  # a negative number cuts rows off
        part = F.conv2d(rearrange(part, "n h w c -> n c h w"), conv.weight, conv.bias, padding=(0, 1))
        part = rearrange(part, "n c h w -> n h w c")
        if out is None:
            out = part.new_empty(n, enlarge * h, *part.shape[2:])
        out[:, enlarge * top : enlarge * end] = part
        del part  # before the next chunk is computed
    return out
