"""The savings that span modules: what the branches of guidance share, and what DeepCache keeps.

Axes: b batch, f frames, h w latent rows and columns, c channels, k context tokens, d their width,
e embedding width; n branches of guidance; t is the timestep.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from i2vgen.adapt.context import Context, Keys, as_context, concatenate, tokens_of
from i2vgen.diffusion.sampler import Predict
from i2vgen.fast.attention import FastAttention
from i2vgen.fast.guard import diverted, ordinary, trust, undisturbed
from i2vgen.fast.layers import Savings, norm_silu
from i2vgen.fast.spatial import FastSpatialTransformer
from i2vgen.model.conditioning import Prepared
from i2vgen.model.spatial import SpatialTransformer
from i2vgen.model.unet import NO_RESIDUALS, Block, Residuals, UNet, concatenated, plus


class Deep(NamedTuple):
    """For DeepCache: the last `blocks` of the finest level are computed anew, what enters them is kept.

    `features` [b f h w c], one for each branch of guidance, are those of an earlier call; None computes them.
    """

    blocks: int  # 1 to as many as the finest level has on the way up
    features: Sequence[Tensor] | None = None


class Branch(NamedTuple):
    """What the blocks read in one branch of guidance."""

    x: Tensor  # [b f h w c] after the entrance
    embedding: Tensor  # [b e]
    context: Context  # [b k d]
    prefix: tuple[Tensor, Tensor] | None  # of the first block, as far as it needs no context


class FastUNet(UNet):
    """`share_prefix`: where the context holds n branches for each sample, everything before the first
    cross-attention is computed once. Then the branches follow one after the other, or all as one batch."""

    plain = UNet
    savings: Savings

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        prepared: Prepared,
        residuals: Residuals = NO_RESIDUALS,
        deep: Deep | None = None,
    ) -> Tensor | tuple[Tensor, Sequence[Tensor]]:
        """x [b c f h w], t [b] -> prediction [b c f h w], or [(n b) c f h w] under n contexts (`shared`).

        With `deep` the features come with it: those that were given, or those just computed.
        """
        with trust() if undisturbed(self) else contextlib.nullcontext():
            return self.guided(x, t, prepared, residuals, deep)

    def guided(
        self, x: Tensor, t: Tensor, prepared: Prepared, residuals: Residuals, deep: Deep | None
    ) -> Tensor | tuple[Tensor, Sequence[Tensor]]:
        """`forward`, once the network has been looked at."""
        self.check(x, residuals)
        if deep is not None and residuals is not NO_RESIDUALS:
            raise ValueError(
                "sample.deep_cache leaves out the blocks to which an adapter adds (taps.controlled); "
                "use sample.deep_cache=0"
            )
        embedding = self.embed(t.to(x.device), prepared)
        x = plus(self.enter(x, prepared), residuals.entrance)
        if self.temporal_in is not None:
            x = self.temporal_in(x)
        features = None if deep is None else deep.features
        outer = None if deep is None else self.up[0].blocks[-deep.blocks]
        first, prefix = self.down[0].blocks[0], None
        if len(prepared.context) > len(x) and (features is None or deep.blocks > 1) and can_begin(first):
            prefix = begin(first, x, embedding)
        outs, kept = [], []
        for i, context in enumerate(self.contexts(prepared.context, len(x))):
            n = len(context) // len(x)
            parts = None if prefix is None else tuple(repeated(part, n) for part in prefix)
            branch = Branch(repeated(x, n), repeated(embedding, n), context, parts)
            if features is None:
                out, entering = self.all_blocks(branch, residuals, outer)
            else:
                out, entering = self.outer_blocks(branch, deep.blocks, features[i]), features[i]
            outs.append(out)
            kept.append(entering)
        branches = prepared._replace(
            picture=None
            if prepared.picture is None
            else repeated(prepared.picture, len(prepared.context) // len(x))
        )
        out = self.from_picture(outs[0] if len(outs) == 1 else torch.cat(outs), branches)
        return out if deep is None else (out, kept)

    def contexts(self, context: Tensor | Context, b: int) -> list[Context]:
        """The contexts of all branches, [b k d] each, or as one batch; a hook sees one branch at a time."""
        context = as_context(context)
        if len(context) == b or (self.savings.batch_guidance and undisturbed(self)):
            return [context]
        return context.split(b)

    def all_blocks(
        self, branch: Branch, residuals: Residuals, outer: Block | None
    ) -> tuple[Tensor, Tensor | None]:
        """-> prediction [b c f h w], and what enters the block `outer`, [b f h w c]"""
        x, embedding, context, prefix = branch
        down, up, filters = iter(residuals.down), iter(residuals.up), iter(self.skip_filter)
        entering, skips = None, [x]
        for level in self.down:
            for block in level.blocks:
                if prefix is None:
                    x = block(x, embedding, given(block, context))
                else:
                    x, prefix = read(block, *prefix, context), None
                x = added(x, next(down, None))
                skips.append(x)
            if level.resample is not None:
                x = level.resample(x)
                skips.append(x)
        if residuals.skips:
            skips = [added(skip, one) for skip, one in zip(skips, residuals.skips, strict=True)]
        for block in (self.mid1, self.mid2):
            x = block(x, embedding, given(block, context))
        x = added(x, residuals.middle)
        for level in reversed(self.up):
            for block in level.blocks:
                entering = x if block is outer else entering
                # No name here holds on to the skip or the concatenation while the block computes.
                x = block(concatenated(x, skips.pop(), next(filters, None)), embedding, given(block, context))
                x = added(x, next(up, None))
            if level.resample is not None:
                x = level.resample(x)
        return self.head(x), entering

    def outer_blocks(self, branch: Branch, blocks: int, entering: Tensor) -> Tensor:
        """`all_blocks` with only the last `blocks`, which `entering` [b f h w c] enters. -> [b c f h w]"""
        x, embedding, context, prefix = branch
        skips = [x]
        for block in self.down[0].blocks[: blocks - 1]:
            if prefix is None:
                x = block(x, embedding, given(block, context))
            else:
                x, prefix = read(block, *prefix, context), None
            skips.append(x)
        x = entering
        for block in self.up[0].blocks[-blocks:]:
            x = block(torch.cat([x, skips.pop()], dim=-1), embedding, given(block, context))
        return self.head(x)

    def head(self, x: Tensor) -> Tensor:
        """[b f h w c] -> output [b c f h w]"""
        return self.leave(norm_silu(self.norm_out, x.flatten(0, 1)).unflatten(0, x.shape[:2]))


def projected(unet: UNet, prepared: Prepared) -> Prepared:
    """`project_once`: the same conditions with the keys and values of every cross-attention computed."""
    if not isinstance(unet, FastUNet) or "project_once" not in unet.savings.names:
        return prepared
    context = as_context(prepared.context)
    keys = {part: Keys.of(part, context.tokens) for part in readers(unet)}
    return prepared._replace(context=Context(context.tokens, keys, context.extra))


def readers(unet: UNet) -> list[FastAttention]:
    """The cross-attentions that can read a `Context`"""
    spatial = [block.spatial for block in unet.blocks() if type(block.spatial) is FastSpatialTransformer]
    found = [part.cross_attention for part in spatial]
    return [part for part in found if type(part) is FastAttention and ordinary(part) and undisturbed(part)]


def shared(unet: UNet, branches: Sequence[Prepared]) -> Prepared | None:
    """`share_prefix`: conditions that differ in nothing but their context -> one set for all, or None.

    This is decided from the numbers: branches with other pictures or another fps have nothing to share.
    """
    if not isinstance(unet, FastUNet) or "share_prefix" not in unet.savings.names:
        return None
    first = branches[0]
    for other in branches[1:]:
        if not all(_same(a, b) for a, b in zip(first[1:], other[1:], strict=True)):
            return None
    context = concatenate([as_context(branch.context) for branch in branches])
    return None if context is None else first._replace(context=context)


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None or a.is_meta:  # tensors on `meta` have no numbers that could differ
        return (a is None) == (b is None)
    return torch.equal(a, b)


def can_begin(block: nn.Module) -> bool:
    """Whether a block can be computed in two parts, before and after it reads the context."""
    if type(block) is not Block or type(block.spatial) is not FastSpatialTransformer:
        return False
    return "sum_in_place" in block.spatial.savings.names and ordinary(block) and not diverted(block)


def begin(block: Block, x: Tensor, embedding: Tensor) -> tuple[Tensor, Tensor]:
    """The part of a block's forward that needs no context: x [b f h w c], embedding [b e] -> for `read`"""
    x = block.res(x, embedding)
    x = x if block.temporal_conv is None else block.temporal_conv(x)
    return x, block.spatial.begin(x)


def read(block: Block, x: Tensor, y: Tensor, context: Context) -> Tensor:
    """The rest of it: x [b f h w c], y [b f p c], context [b k d] -> [b f h w c]"""
    x = block.spatial.read(x, y, context)
    return x if block.temporal is None else block.temporal(x)


def given(block: nn.Module, context: Context) -> Tensor | Context:
    """The context as a block can read it: a researcher's own block or transformer gets the tokens."""
    ours = isinstance(block, Block) and isinstance(block.spatial, SpatialTransformer)
    if ours and (context.extra or type(block.spatial) is FastSpatialTransformer):
        return context
    return tokens_of(context)


def added(x: Tensor, residual: Tensor | None) -> Tensor:
    """x [(n b) ...] + residual [b ...], the same for each of the n branches"""
    if residual is None or residual.shape[1:] != x.shape[1:] or len(x) % len(residual):
        return plus(x, residual)  # nothing to add, or the error
    return plus(x, repeated(residual, len(x) // len(residual)))


def repeated(x: Tensor, n: int) -> Tensor:
    """[b ...] -> [(n b) ...], the whole n times"""
    return x if n == 1 else x.repeat(n, *[1] * (x.ndim - 1))


def under(unet: nn.Module, prepared: Prepared) -> Predict:
    """The network under prepared conditions, as samplers call it"""
    return lambda x, t: unet(x, t.to(x.device), prepared)


def both_branches(
    unet: nn.Module,
    cond: Prepared,
    uncond: Prepared,
    under: Callable[[nn.Module, Prepared], Predict] = under,
) -> Predict:
    """Both predictions of a guidance step, [(2 b) c f h w] with the conditional one first."""
    together = shared(unet, [cond, uncond])
    if together is not None:
        return under(unet, together)
    first, second = under(unet, cond), under(unet, uncond)
    return lambda x, t: torch.cat([first(x, t), second(x, t)])
