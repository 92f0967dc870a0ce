"""The spatio-temporal UNet of I2VGen-XL (arXiv 2311.04145), v-prediction in latent space.

From the input convolution to the head one layout holds, [b f h w c] with channels last, so the parts that
mix pixels (`spatial.py`) and those that mix frames (`temporal.py`) meet without copies.

Axes: b batch, f frames, h w latent rows and columns, c channels, e embedding width; t is the timestep.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from i2vgen import config
from i2vgen.attention import Attention, Keys
from i2vgen.conditioning import Conditions, ConditionStem, Prepared
from i2vgen.layers import RES_EPS, Conv, GroupNorm, Mlp, per_frame, sinusoid
from i2vgen.spatial import Downsample, ResBlock, SpatialTransformer, Upsample, repeat_samples
from i2vgen.temporal import TemporalConv, TemporalTransformer


class Block(nn.Module):
    """ResBlock, temporal convolutions, spatial and temporal transformer; all but the first may be absent."""

    def __init__(
        self,
        width_in: int,
        width: int,
        unet: config.UNet,
        use: config.Use,
        *,
        spatial: bool,
        temporal: bool,
        backend: str,
    ):
        super().__init__()
        self.checkpointing = False
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
            if spatial
            else None
        )
        self.temporal = (
            TemporalTransformer(
                width,
                heads=width // head_width,
                head_width=head_width,
                groups=groups,
                second_attention=use.temporal_second_attention,
                backend=backend,
            )
            if temporal and use.temporal_attention
            else None
        )

    def forward(self, x: Tensor, embedding: Tensor, context: Tensor | Keys) -> Tensor:
        """x [b f h w c], embedding [b e], context [b k d] -> [b f h w c']

        With n contexts for each sample it leaves as n, as `SpatialTransformer` parts them.
        """
        x = self.run(self.res, x, embedding)
        if self.temporal_conv is not None:
            x = self.run(self.temporal_conv, x)
        if self.spatial is not None:
            x = self.run(self.spatial, x, context)
        if self.temporal is not None:
            x = self.run(self.temporal, x)
        return x

    def run(self, part: nn.Module, *inputs: Tensor) -> Tensor:
        """Each part is one unit of gradient checkpointing."""
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(part, *inputs, use_reentrant=False)
        return part(*inputs)


class Level(nn.Module):
    """The blocks of one resolution and the resampling that follows them, if any does."""

    def __init__(self, blocks: list[Block], resample: nn.Module | None):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.resample = resample


class UNet(nn.Module):
    """Latent video and timestep to the network's prediction; the conditions come prepared (`prepare`).

    `down[level].blocks[i]`, `mid1`, `mid2`, `up[level].blocks[i]`: levels are numbered finest first in both
    halves, so `up` runs from its last entry to its first.
    """

    project_once = False  # keys and values of all cross-attentions belong to `prepare`; see `speed.py`

    def __init__(self, unet: config.UNet, use: config.Use, *, backend: str = "sdpa"):
        super().__init__()
        self.use, self.base_width, self.factor = use, unet.base_width, unet.factor
        widths, depth = unet.widths, len(unet.widths)

        def block(width_in: int, width: int, attention: bool) -> Block:
            return Block(width_in, width, unet, use, spatial=attention, temporal=attention, backend=backend)

        self.stem = ConditionStem(unet, use, backend=backend)
        self.time = Mlp(unet.base_width, unet.embedding_width, unet.embedding_width)
        channels = unet.in_channels + (unet.concat_channels if use.concat else 0)
        self.conv_in = Conv(channels, unet.base_width, 3, padding=1)
        self.temporal_in = (
            TemporalTransformer(
                unet.base_width,
                heads=unet.first_temporal_heads,
                head_width=unet.head_width,
                groups=unet.norm_groups,
                second_attention=use.temporal_second_attention,
                backend=backend,
            )
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
            down.append(Level(blocks, None if last else Downsample(width)))
            skips += [] if last else [width]
        self.down = nn.ModuleList(down)

        self.mid1 = block(width, width, True)
        self.mid2 = block(width, width, False)

        up = []
        for level in reversed(range(depth)):
            blocks = []
            for _ in range(unet.blocks_per_level + 1):
                blocks.append(block(width + skips.pop(), widths[level], unet.attention_levels[level]))
                width = widths[level]
            up.append(Level(blocks, Upsample(width) if level > 0 else None))
        self.up = nn.ModuleList(reversed(up))

        self.norm_out = GroupNorm(unet.norm_groups, width, eps=RES_EPS)
        self.conv_out = Conv(width, unet.out_channels, 3, padding=1)
        nn.init.zeros_(self.conv_out.weight)  # its bias keeps the default, as in the official code

    def prepare(self, conditions: Conditions, frames: int) -> Prepared:
        """The part of the network that does not see the timestep; once per video."""
        prepared = self.stem.prepare(conditions, frames, self.conv_in.weight.dtype)
        if not self.project_once:
            return prepared
        return prepared._replace(keys=tuple(part.keys(prepared.context) for part in self.readers()))

    def readers(self) -> Iterator[Attention]:
        """The cross-attentions, in the order in which `forward` meets them."""
        for block in self.blocks():
            if block.spatial is not None:
                yield block.spatial.cross_attention

    def blocks(self) -> Iterator[Block]:
        """All blocks, in the order in which `forward` meets them."""
        for level in self.down:
            yield from level.blocks
        yield from (self.mid1, self.mid2)
        for level in reversed(self.up):
            yield from level.blocks

    def forward(self, x: Tensor, t: Tensor, prepared: Prepared) -> Tensor:
        """Latent video x [b c f h w], timestep t [b] (0..999, unscaled) -> prediction [b c f h w].

        h and w must be multiples of `factor`. x is cast to the network's dtype here and nowhere else. Where
        `prepared` holds n contexts for each sample (`conditioning.join`), all n predictions: [(n b) c f h w].
        """
        h, w = x.shape[-2:]
        if h % self.factor or w % self.factor:
            raise ValueError(f"latent of {w} x {h} (width x height): both must be multiples of {self.factor}")
        dtype = self.conv_in.weight.dtype
        embedding = self.time(sinusoid(t, self.base_width, self.use.sinusoid).to(dtype))
        if prepared.fps_embedding is not None:
            embedding = embedding + prepared.fps_embedding

        x = rearrange(x.to(dtype), "b c f h w -> b f h w c")
        if prepared.concat is not None:
            x = torch.cat([x, prepared.concat], dim=-1)
        x = per_frame(self.conv_in, x.contiguous())
        if self.temporal_in is not None:
            x = self.temporal_in(x)

        keys = iter(prepared.keys or ())

        def run(block: Block, x: Tensor) -> Tensor:
            reads = block.spatial is not None
            context = next(keys, prepared.context) if reads else prepared.context
            return block(x, repeat_samples(embedding, len(x)), context)

        skips = [x]
        for level in self.down:
            for block in level.blocks:
                x = run(block, x)
                skips.append(x)
            if level.resample is not None:
                x = level.resample(x)
                skips.append(x)
        x = run(self.mid2, run(self.mid1, x))
        for level in reversed(self.up):
            for block in level.blocks:
                x = run(block, torch.cat([x, repeat_samples(skips.pop(), len(x))], dim=-1))
            if level.resample is not None:
                x = level.resample(x)

        x = per_frame(self.conv_out, F.silu(per_frame(self.norm_out, x)))
        return rearrange(x, "b f h w c -> b c f h w").contiguous()

    def set_checkpointing(self, on: bool) -> None:
        """Trade time for memory in training: keep each part's input, recompute its inside in the backward."""
        for module in self.modules():
            if isinstance(module, Block):
                module.checkpointing = on


@dataclass(frozen=True)
class Drops:
    """What a checkpoint of the full model loses in an ablated one: whole tensors by pattern, and slices."""

    patterns: tuple[str, ...]  # as in fnmatch
    slices: dict[str, int]  # tensor name -> how many of its input channels (axis 1) remain


def declared_drops(unet: config.UNet, use: config.Use) -> Drops:
    """Every switch that is off names here what is dropped; `checkpoint` accepts exactly this."""
    patterns: list[str] = []
    slices = {}
    if not use.global_tokens:
        patterns.append("stem.global_tokens.*")
    if not use.local_tokens:
        patterns.append("stem.local_tokens.*")
    if not use.concat:
        patterns.append("stem.concat.*")
        slices["conv_in.weight"] = unet.in_channels
    elif not use.concat_temporal:
        patterns.append("stem.concat.frames.*")
    if not use.fps:
        patterns.append("stem.fps.*")
    if not use.temporal_attention:
        patterns += ["temporal_in.*", "*.temporal.*"]
    elif not use.temporal_second_attention:
        patterns += [
            f"{place}.{part}.*" for place in ("temporal_in", "*.temporal") for part in ("norm2", "attention2")
        ]
    if not use.temporal_convolution:
        patterns.append("*.temporal_conv.*")
    return Drops(tuple(patterns), slices)
