"""The spatio-temporal UNet of I2VGen-XL (arXiv 2311.04145), v-prediction in latent space.

From the input convolution to the head one layout holds, [b f h w c] with channels last, so the parts that
mix pixels (`spatial.py`) and those that mix frames (`temporal.py`) meet without copies.

Axes: b batch, f frames, h w latent rows and columns, c channels, e embedding width; t is the timestep.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from i2vgen.model.attention import Attention, Keys
from i2vgen.model.conditioning import Conditions, ConditionStem, Prepared
from i2vgen.model.layers import RES_EPS, Conv, GroupNorm, Mlp, norm_silu, per_frame, sinusoid, untouched
from i2vgen.model.spatial import SKIP_FILTERS, Downsample, ResBlock, SpatialTransformer, Upsample, filter_skip
from i2vgen.model.temporal import TemporalConv, TemporalTransformer
from i2vgen.settings import config


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
                positions=use.frame_positions,
                backend=backend,
            )
            if temporal and use.temporal_attention
            else None
        )

    def forward(self, x: Tensor, embedding: Tensor, context: Tensor | Keys) -> Tensor:
        """x [b f h w c], embedding [b e], context [b k d] -> [b f h w c']"""
        x = self.local(x, embedding)
        if self.spatial is not None:
            x = self.run(self.spatial, x, context)
        return self.over_frames(x)

    def before_reading(self, x: Tensor, embedding: Tensor) -> tuple[Tensor, Tensor]:
        """The part of `forward` that needs no context, where `parts_late` -> what `read` goes on from."""
        x = self.local(x, embedding)
        return x, self.spatial.before_reading(x)

    def read(self, x: Tensor, y: Tensor, context: Tensor | Keys) -> Tensor:
        return self.over_frames(self.spatial.read(x, y, context))

    def local(self, x: Tensor, embedding: Tensor) -> Tensor:
        x = self.run(self.res, x, embedding)
        return x if self.temporal_conv is None else self.run(self.temporal_conv, x)

    def over_frames(self, x: Tensor) -> Tensor:
        return x if self.temporal is None else self.run(self.temporal, x)

    def run(self, part: nn.Module, *inputs: Tensor) -> Tensor:
        """Each part is one unit of gradient checkpointing."""
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(part, *inputs, use_reentrant=False)
        return part(*inputs)


class Residuals(NamedTuple):
    """What an adapter adds inside the UNet: tensors [b f h w c] like those they meet; None adds nothing.

    `down` and `up` have one entry per block, `skips` one per skip connection, all in the order in which
    `forward` meets them; () is none. ControlNets add to `skips` and `middle`, T2I-Adapters to `down`.
    """

    entrance: Tensor | None = None  # to what the input convolution gives
    down: Sequence[Tensor | None] = ()  # to a block's output, so to its skip connection as well
    skips: Sequence[Tensor | None] = ()  # to the skip connections alone, those of resampling included
    middle: Tensor | None = None  # to what the second middle block gives
    up: Sequence[Tensor | None] = ()


Control = Callable[[Tensor, Tensor], Residuals]  # the UNet's own x [b c f h w] and t [b]
Extra = Callable[[Conditions, Prepared], Prepared]  # what `prepare` was given, and what it made of it


class Level(nn.Module):
    """The blocks of one resolution and the resampling that follows them, if any does."""

    def __init__(self, blocks: list[Block], resample: nn.Module | None):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.resample = resample


class Deep(NamedTuple):
    """What `deep_cache.py` keeps between calls in place of all but the entrance and the last `outer` blocks.

    `kept` holds what enters those blocks, [b f h w c] for each branch of guidance. Empty, it is filled;
    filled, it is used, and the deep part is not computed.
    """

    outer: int  # of the finest level: 1 to as many as it has on the way up
    kept: list[Tensor]


class UNet(nn.Module):
    """Latent video and timestep to the network's prediction; the conditions come prepared (`prepare`).

    `down[level].blocks[i]`, `mid1`, `mid2`, `up[level].blocks[i]`: levels are numbered finest first in both
    halves, so `up` runs from its last entry to its first.
    """

    control: Control | None = None  # is asked at every call; see `taps.controlled`
    extra: Extra | None = None  # is asked at every `prepare`; see `extra_tokens.py`
    together = False  # several contexts of a sample as one batch; else one after the other
    project_once = False  # keys and values of all cross-attentions belong to `prepare`; see `speed.py`

    def __init__(self, unet: config.UNet, use: config.Use, *, backend: str = "sdpa"):
        super().__init__()
        self.use, self.base_width = use, unet.base_width
        self.factor, self.margin = unet.factor, unet.margin(use)
        self.skip_filter = SKIP_FILTERS[use.skip_filter]
        widths, depth, margin = unet.widths, len(unet.widths), use.resampling == "margin"

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
                positions=use.frame_positions,
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
            down.append(Level(blocks, None if last else Downsample(width, margin=margin)))
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
            up.append(Level(blocks, Upsample(width, margin=margin) if level > 0 else None))
        self.up = nn.ModuleList(reversed(up))

        self.norm_out = GroupNorm(unet.norm_groups, width, eps=RES_EPS)
        self.conv_out = Conv(width, unet.out_channels, 3, padding=1)
        nn.init.zeros_(self.conv_out.weight)  # its bias keeps the default, as in the official code

    def prepare(self, conditions: Conditions, frames: int) -> Prepared:
        """The part of the network that does not see the timestep; once per video."""
        prepared = self.stem.prepare(conditions, frames, self.conv_in.weight.dtype)
        if self.extra is not None:
            prepared = self.extra(conditions, prepared)
        if not self.project_once or prepared.keys is not None:
            return prepared
        return prepared._replace(keys=self.keys(prepared.context))

    def keys(self, context: Tensor) -> tuple[Keys, ...]:
        """Of all cross-attentions for context [b k d]"""
        return tuple(part.keys(context) for part in self.readers())

    def with_context(self, prepared: Prepared, context: Tensor) -> Prepared:
        """`prepared` with another context [b k d]; its keys are made again, what stands beside them stays."""
        keys = prepared.keys
        if keys is not None:
            again = zip(self.keys(context), keys, strict=True)
            keys = tuple(new._replace(beside=old.beside) for new, old in again)
        return prepared._replace(context=context, keys=keys)

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

    def forward(self, x: Tensor, t: Tensor, prepared: Prepared, deep: Deep | None = None) -> Tensor:
        """Latent video x [b c f h w], timestep t [b] (0..999, unscaled) -> prediction [b c f h w].

        w must be a multiple of `factor`, h one and `margin` more. x is cast to the network's dtype here and
        nowhere else. Where `prepared` holds n contexts for each sample (`conditioning.join`), all n
        predictions: [(n b) c f h w]. `deep` leaves out most of the network where an earlier call has filled
        it.
        """
        h, w = x.shape[-2:]
        if h % self.factor != self.margin or w % self.factor:
            rows = f", the height {self.margin} more than one" if self.margin else ""
            raise ValueError(
                f"latent of {w} x {h} (width x height): both must be multiples of {self.factor}{rows}"
            )
        dtype = self.conv_in.weight.dtype
        embedding = self.time(sinusoid(t.to(x.device), self.base_width, self.use.sinusoid).to(dtype))
        if prepared.fps_embedding is not None:
            embedding = embedding + prepared.fps_embedding

        added = Residuals() if self.control is None else self.residuals(x, t)
        x = rearrange(x.to(dtype), "b c f h w -> b f h w c")
        if prepared.concat is not None:
            x = torch.cat([x, prepared.concat], dim=-1)
        x = plus(per_frame(self.conv_in, x.contiguous()), added.entrance)
        if self.temporal_in is not None:
            x = self.temporal_in(x)

        # Until a block first reads the context, all contexts of a sample have the same numbers.
        first, begun = self.down[0].blocks[0], None
        outs, known = [], [] if deep is None else [*deep.kept]
        needed = not known or deep.outer > 1
        if needed and len(prepared.context) > len(x) and parts_late(first):
            begun = first.before_reading(x, embedding)
        for i, branch in enumerate(self.branches(prepared, len(x))):
            n = len(branch.context) // len(x)
            start = None if begun is None else [repeated(part, n) for part in begun]
            inputs = repeated(x, n), repeated(embedding, n), branch
            if known:
                outs.append(self.outer_blocks_and_head(*inputs, known[i], deep.outer, start))
            else:
                outs.append(self.blocks_and_head(*inputs, added, start, deep))
        return outs[0] if len(outs) == 1 else torch.cat(outs)

    def residuals(self, x: Tensor, t: Tensor) -> Residuals:
        """What an adapter adds; ValueError if it counts other blocks than there are."""
        added = self.control(x, t)
        down, up = (sum(len(level.blocks) for level in side) for side in (self.down, self.up))
        skips = 1 + down + sum(level.resample is not None for level in self.down)
        for name, there in (("down", down), ("skips", skips), ("up", up)):
            if (given := len(getattr(added, name))) not in (0, there):
                raise ValueError(
                    f"the adapter adds {given} residuals to `{name}`, where this network has {there}: it is "
                    "for another architecture"
                )
        return added

    def branches(self, prepared: Prepared, b: int) -> list[Prepared]:
        """`prepared` as it is, or the n contexts of every sample apart."""
        n = len(prepared.context) // b
        if n == 1 or self.together:
            return [prepared]
        keys = [None] * n
        if prepared.keys is not None:
            keys = list(zip(*(one.split(b) for one in prepared.keys), strict=True))
        contexts = prepared.context.split(b)
        return [prepared._replace(context=c, keys=k) for c, k in zip(contexts, keys, strict=True)]

    def blocks_and_head(
        self,
        x: Tensor,
        embedding: Tensor,
        prepared: Prepared,
        added: Residuals,
        begun: Sequence[Tensor] | None = None,
        deep: Deep | None = None,
    ) -> Tensor:
        """x [b f h w c] behind the entrance -> prediction [b c f h w]; `begun` is of the first block."""
        down, up = iter(added.down), iter(added.up)
        outer = None if deep is None else self.up[0].blocks[-deep.outer]
        keys = iter(prepared.keys or ())

        def context(block: Block) -> Tensor | Keys:
            return prepared.context if block.spatial is None else next(keys, prepared.context)

        skips = [x]
        for level in self.down:
            for block in level.blocks:
                if begun is None:
                    x = block(x, embedding, context(block))
                else:
                    x, begun = block.read(*begun, context(block)), None
                x = plus(x, next(down, None))
                skips.append(x)
            if level.resample is not None:
                x = level.resample(x)
                skips.append(x)
        if added.skips:
            skips = [plus(skip, one) for skip, one in zip(skips, added.skips, strict=True)]
        for block in (self.mid1, self.mid2):
            x = block(x, embedding, context(block))
        x = plus(x, added.middle)
        filters = iter(self.skip_filter)
        for level in reversed(self.up):
            for block in level.blocks:
                if block is outer:
                    deep.kept.append(x)
                # Nothing here may hold on to the skip or to what it is joined to while the block computes.
                x = block(joined(x, skips.pop(), next(filters, None)), embedding, context(block))
                x = plus(x, next(up, None))
            if level.resample is not None:
                x = level.resample(x)
        return self.head(x)

    def outer_blocks_and_head(
        self,
        x: Tensor,
        embedding: Tensor,
        prepared: Prepared,
        deep: Tensor,
        outer: int,
        begun: Sequence[Tensor] | None = None,
    ) -> Tensor:
        """`blocks_and_head`, its last `outer` blocks going on from `deep` [b f h w c] of an earlier call."""
        readers = [block for block in self.blocks() if block.spatial is not None]
        contexts = dict.fromkeys(self.blocks(), prepared.context)
        if prepared.keys is not None:
            contexts |= zip(readers, prepared.keys, strict=True)

        skips = [x]
        for block in self.down[0].blocks[: outer - 1]:
            if begun is None:
                x = block(x, embedding, contexts[block])
            else:
                x, begun = block.read(*begun, contexts[block]), None
            skips.append(x)
        x = deep
        for block in self.up[0].blocks[-outer:]:
            x = block(torch.cat([x, skips.pop()], dim=-1), embedding, contexts[block])
        return self.head(x)

    def head(self, x: Tensor) -> Tensor:
        """[b f h w c] -> prediction [b c f h w]"""
        b, frames = len(x), self.conv_out(norm_silu(self.norm_out, x.flatten(0, 1)))
        return rearrange(frames, "(b f) h w c -> b c f h w", b=b).contiguous()

    def set_checkpointing(self, on: bool) -> None:
        """Trade time for memory in training: keep each part's input, recompute its inside in the backward."""
        for module in self.modules():
            if isinstance(module, Block):
                module.checkpointing = on


def parts_late(block: nn.Module) -> bool:
    """Whether a block can be begun without its context: as it is written here, and nobody listens at it."""
    return untouched(block, Block) and untouched(block.spatial, SpatialTransformer)


def joined(x: Tensor, skip: Tensor, gains: tuple[float, float] | None) -> Tensor:
    """Backbone and skip side by side, filtered where the weights want it"""
    if gains is not None:
        x, skip = filter_skip(x, skip, gains)
    return torch.cat([x, skip], dim=-1)


def plus(x: Tensor, residual: Tensor | None) -> Tensor:
    """x [(n b) ...] + residual [b ...], the same for each of the n contexts of a sample"""
    if residual is None:
        return x
    if residual.shape[1:] != x.shape[1:] or len(x) % len(residual):
        raise ValueError(
            f"a residual of shape {list(residual.shape)} meets {list(x.shape)} (b f h w c): the adapter is "
            "for another architecture or size"
        )
    return x + repeated(residual.to(x.dtype), len(x) // len(residual))


def repeated(x: Tensor, n: int) -> Tensor:
    """[b ...] -> [(n b) ...], all of it n times"""
    return x if n == 1 else x.repeat(n, *[1] * (x.ndim - 1))


@dataclass(frozen=True)
class Drops:
    """What a checkpoint of the full model loses in an ablated one: whole tensors by pattern, and slices."""

    patterns: tuple[str, ...]  # as in fnmatch
    slices: dict[str, int]  # tensor name -> how many of its input channels (axis 1) remain


# Tensors that the released model lacks, of switches that are off by default. Where a checkpoint has none they
# start as built; where the model has none, those of a checkpoint are left out.
ADDED = ("temporal_in.positions.*", "*.temporal.positions.*")


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
