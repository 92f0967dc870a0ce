"""The spatio-temporal UNet of I2VGen-XL (arXiv 2311.04145), v-prediction in latent space.

From the input convolution to the output layer there is one layout, [b f h w c] with channels last, which the
parts that mix pixels (`spatial.py`) and those that mix frames (`temporal.py`) share.

Axes: b batch, f frames, h w latent rows and columns, c channels, k context tokens, d their width,
e embedding width; t is the timestep.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from i2vgen.model.conditioning import Conditions, ConditionStem, Prepared
from i2vgen.model.layers import RES_EPS, Conv, GroupNorm, Mlp, per_frame, sinusoid, zero_
from i2vgen.model.moved import FinePicture, moved, spread
from i2vgen.model.spatial import SKIP_FILTERS, Downsample, ResBlock, SpatialTransformer, Upsample, filter_skip
from i2vgen.model.temporal import TemporalConv, TemporalTransformer
from i2vgen.settings import config


class Block(nn.Module):
    """ResBlock, temporal convolutions, spatial and temporal transformer; all but the first may be absent."""

    def __init__(
        self, width_in: int, width: int, unet: config.UNet, use: config.Use, *, attention: bool, backend: str
    ):
        super().__init__()
        groups, head_width = unet.norm_groups, unet.head_width
        self.res = ResBlock(width_in, width, unet.embedding_width, groups=groups, dropout=unet.dropout)
        self.temporal_conv = (
            TemporalConv(width, groups=groups, dropout=unet.temporal_conv_dropout)
            if use.temporal_convolution
            else None
        )
        self.spatial = (
            SpatialTransformer(
                width, unet.context_width, head_width=head_width, groups=groups, backend=backend
            )
            if attention
            else None
        )
        self.temporal = (
            temporal_transformer(width, width // head_width, unet, use, backend)
            if attention and use.temporal_attention
            else None
        )

    def forward(self, x: Tensor, embedding: Tensor, context: Tensor) -> Tensor:
        """x [b f h w c], embedding [b e], context [b k d] -> [b f h w c']"""
        x = self.res(x, embedding)
        if self.temporal_conv is not None:
            x = self.temporal_conv(x)
        if self.spatial is not None:
            x = self.spatial(x, context)
        if self.temporal is not None:
            x = self.temporal(x)
        return x


class Level(nn.Module):
    """The blocks of one resolution and the resampling after them, if there is any."""

    def __init__(self, blocks: list[Block], resample: nn.Module | None):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.resample = resample


class Residuals(NamedTuple):
    """What an adapter adds inside the UNet: tensors [b f h w c] like those they are added to, or None.

    `down` and `up` have one entry per block and `skips` one per skip connection, in the order in which
    `forward` reaches them; () adds nothing. ControlNets add to `skips` and `middle`, T2I-Adapters to `down`.
    """

    entrance: Tensor | None = None  # to the output of the input convolution
    down: Sequence[Tensor | None] = ()  # to a block's output, and so to its skip connection too
    skips: Sequence[Tensor | None] = ()  # to the skip connections alone, those after resampling included
    middle: Tensor | None = None  # to the output of the second middle block
    up: Sequence[Tensor | None] = ()  # to a block's output


NO_RESIDUALS = Residuals()


class UNet(nn.Module):
    """Latent video and timestep to the network's prediction; the conditions come from `prepare`.

    `down[level].blocks[i]`, `mid1`, `mid2`, `up[level].blocks[i]`: levels are numbered finest first in both
    halves, so `up` runs from its last entry to its first.
    """

    def __init__(self, unet: config.UNet, use: config.Use, *, backend: str = "sdpa"):
        super().__init__()
        self.use, self.base_width = use, unet.base_width
        self.factor, self.margin = unet.factor, unet.margin(use)
        self.skip_filter = SKIP_FILTERS[use.skip_filter]
        widths, depth, margin = unet.widths, len(unet.widths), use.resampling == "margin"

        def block(width_in: int, width: int, attention: bool) -> Block:
            return Block(width_in, width, unet, use, attention=attention, backend=backend)

        self.stem = ConditionStem(unet, use, backend=backend)
        self.time = Mlp(unet.base_width, unet.embedding_width, unet.embedding_width)
        channels = unet.in_channels + (unet.concat_channels if use.concat else 0)
        self.conv_in = Conv(channels, unet.base_width, 3, padding=1)
        self.temporal_in = (
            temporal_transformer(unet.base_width, unet.first_temporal_heads, unet, use, backend)
            if use.temporal_attention
            else None
        )

        down, skips, width = [], [unet.base_width], unet.base_width
        for level in range(depth):
            blocks = []
            for _ in range(unet.blocks_per_level):
                blocks.append(block(width, widths[level], unet.attention_levels[level]))
                width = widths[level]
                skips.append(width)
            last = level == depth - 1
            down.append(Level(blocks, None if last else Downsample(width, margin=margin)))
            skips += [] if last else [width]
        self.down = nn.ModuleList(down)

        self.mid1, self.mid2 = block(width, width, True), block(width, width, False)

        up = []
        for level in reversed(range(depth)):
            blocks = []
            for _ in range(unet.blocks_per_level + 1):
                blocks.append(block(width + skips.pop(), widths[level], unet.attention_levels[level]))
                width = widths[level]
            up.append(Level(blocks, Upsample(width, margin=margin) if level > 0 else None))
        self.up = nn.ModuleList(reversed(up))

        self.norm_out = GroupNorm(unet.norm_groups, width, eps=RES_EPS)
        self.conv_out = Conv(width, unet.out_channels, 3, padding=1)
        nn.init.zeros_(self.conv_out.weight)  # its bias keeps the default, as in the official code
        # For each place of a grid that may be finer than the latent: two channels of flow, one of weight. One
        # more for how much of the result is left out.
        self.grid, self.flow_out, self.fine_picture = unet.moved_grid, None, None
        if use.output == "moved" and use.concat:
            self.flow_out = zero_(Conv(width, 3 * self.grid**2 + 1, 3, padding=1))
            if self.grid > 1:
                self.fine_picture = FinePicture(unet.out_channels, self.grid)

    def prepare(self, conditions: Conditions, frames: int) -> Prepared:
        """The part of the network that does not depend on the timestep; computed once per video."""
        return self.stem.prepare(conditions, frames, self.conv_in.weight.dtype)

    def forward(
        self, x: Tensor, t: Tensor, prepared: Prepared, residuals: Residuals = NO_RESIDUALS
    ) -> Tensor:
        """Latent video x [b c f h w], timestep t [b] (0 to 999) -> prediction [b c f h w].

        w must be a multiple of `factor`, h one plus `margin`. x is cast to the network's dtype here and
        nowhere else. ValueError for latents or `residuals` that do not fit the network.
        """
        self.check(x, residuals)
        embedding = self.embed(t.to(x.device), prepared)
        x = plus(self.enter(x, prepared), residuals.entrance)
        if self.temporal_in is not None:
            x = self.temporal_in(x)

        skips, down = [x], [*residuals.down]
        for level in self.down:
            for block in level.blocks:
                x = plus(block(x, embedding, prepared.context), first_of(down))
                skips.append(x)
            if level.resample is not None:
                x = level.resample(x)
                skips.append(x)
        if residuals.skips:
            skips = [plus(skip, one) for skip, one in zip(skips, residuals.skips, strict=True)]

        x = self.mid1(x, embedding, prepared.context)
        x = plus(self.mid2(x, embedding, prepared.context), residuals.middle)

        up, filters = [*residuals.up], [*self.skip_filter]
        for level in reversed(self.up):
            for block in level.blocks:
                x = block(concatenated(x, skips.pop(), first_of(filters)), embedding, prepared.context)
                x = plus(x, first_of(up))
            if level.resample is not None:
                x = level.resample(x)

        x = F.silu(per_frame(self.norm_out, x))
        return self.from_picture(self.leave(x), prepared)

    def leave(self, x: Tensor) -> Tensor:
        """Normed x [b f h w c] -> output [b c f h w]; with `use.output=moved`, those of `flow_out` follow."""
        out = per_frame(self.conv_out, x)
        if self.flow_out is not None:
            out = torch.cat([out, per_frame(self.flow_out, x)], dim=-1)
        return rearrange(out, "b f h w c -> b c f h w").contiguous()

    def from_picture(self, out: Tensor, prepared: Prepared) -> Tensor:
        """Output of `leave` -> prediction [b c f h w], which may be a change of the picture (`use.output`)"""
        if self.flow_out is None:
            return out if prepared.picture is None else out + prepared.picture
        places = self.grid**2
        sizes = [out.shape[1] - 3 * places - 1, 2 * places, places, 1]
        change, flow, weight, hidden = out.split(sizes, dim=1)
        if prepared.picture is None:
            return change
        move = moved if self.fine_picture is None else self.fine_picture
        carried = move(prepared.picture, spread(flow, self.grid), spread(weight, self.grid))
        return change + (1 - hidden) * carried

    def embed(self, t: Tensor, prepared: Prepared) -> Tensor:
        """t [b] -> timestep embedding plus that of the fps, [b e]"""
        embedding = self.time(sinusoid(t, self.base_width, self.use.sinusoid).to(self.conv_in.weight.dtype))
        return embedding if prepared.fps_embedding is None else embedding + prepared.fps_embedding

    def enter(self, x: Tensor, prepared: Prepared) -> Tensor:
        """x [b c f h w] -> [b f h w c] after the input convolution, with the condition's channels beside x"""
        x = rearrange(x.to(self.conv_in.weight.dtype), "b c f h w -> b f h w c")
        if prepared.concat is not None:
            x = torch.cat([x, prepared.concat], dim=-1)
        return per_frame(self.conv_in, x.contiguous())

    def blocks(self) -> Iterator[Block]:
        """All blocks, in the order in which `forward` calls them."""
        for level in self.down:
            yield from level.blocks
        yield from (self.mid1, self.mid2)
        for level in reversed(self.up):
            yield from level.blocks

    def check(self, x: Tensor, residuals: Residuals) -> None:
        """ValueError for latents x [b c f h w] of a size, or residuals of a number, that do not fit."""
        h, w = x.shape[-2:]
        if h % self.factor != self.margin or w % self.factor:
            rows = f", the height {self.margin} more than one" if self.margin else ""
            raise ValueError(
                f"latent of {w} x {h} (width x height): both must be multiples of {self.factor}{rows}"
            )
        down, up = (sum(len(level.blocks) for level in side) for side in (self.down, self.up))
        skips = 1 + down + sum(level.resample is not None for level in self.down)
        for name, there in (("down", down), ("skips", skips), ("up", up)):
            if (given := len(getattr(residuals, name))) not in (0, there):
                raise ValueError(
                    f"the adapter adds {given} residuals to `{name}`, but this network has {there}: it was "
                    "made for another architecture"
                )


def temporal_transformer(
    width: int, heads: int, unet: config.UNet, use: config.Use, backend: str
) -> TemporalTransformer:
    return TemporalTransformer(
        width,
        heads=heads,
        head_width=unet.head_width,
        groups=unet.norm_groups,
        second_attention=use.temporal_second_attention,
        positions=use.frame_positions,
        backend=backend,
    )


def concatenated(x: Tensor, skip: Tensor, gains: tuple[float, float] | None) -> Tensor:
    """Backbone and skip [b f h w c] along their channels, filtered first if the weights ask for it"""
    if gains is not None:
        x, skip = filter_skip(x, skip, gains)
    return torch.cat([x, skip], dim=-1)


def first_of(rest: list):
    """Take the first of a list; None once it is empty. (Torch 2.6 cannot compile `next(..., None)`.)"""
    return rest.pop(0) if rest else None


def plus(x: Tensor, residual: Tensor | None) -> Tensor:
    """x [b f h w c] + residual of the same shape; ValueError for another one"""
    if residual is None:
        return x
    if residual.shape != x.shape:
        raise ValueError(
            f"a residual of shape {list(residual.shape)} is added to {list(x.shape)} (b f h w c): the "
            "adapter was made for another architecture or size"
        )
    return x + residual.to(x.dtype)
