"""Faster attention: context keys computed once per video, fused projections, frames through strided views.

Axes: n independent sequences, m heads, t and k query and context tokens, d head width; b batch, f frames,
p pixels of a frame, c channels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from i2vgen.adapt.context import Context, Keys, as_context, attend_to_all, sum_of_attentions
from i2vgen.fast import half, kernels
from i2vgen.fast.guard import diverted
from i2vgen.fast.layers import Savings
from i2vgen.model.attention import Attention, FrameAttention, attend


class FastAttention(Attention):
    """`project_once`: reads a `Context`. `fuse_projections`: q, k and v of self-attention in one product."""

    plain = Attention
    savings: Savings

    def forward(self, x: Tensor, context: Tensor | Context | None = None) -> Tensor:
        """Sequences x [n t c] attend to context [n k d], or to themselves. -> [n t c]"""
        if not diverted(self):
            return self.to_out(self.inner(x, context))
        if isinstance(context, Context):
            return attend_to_all(self, x, context)
        return super().forward(x, context)

    def inner(self, x: Tensor, context: Tensor | Context | None = None) -> Tensor:
        """The input of the output projection: [n t c] -> [n t (m d)]"""
        if context is None:
            q, *keys = (self.split_heads(y) for y in projections(self, x))
            listed = [Keys(*keys)]
        else:
            q, context = self.split_heads(self.to_q(x)), as_context(context)
            own = context.keys[self] if self in context.keys else Keys.of(self, context.tokens)
            listed = [own, *context.extra.get(self, ())]
        backend = half.backend(self.backend, q) if "half_on_cpu" in self.savings.names else self.backend
        y = sum_of_attentions(q, listed, backend)
        return rearrange(y, "n m t d -> n t (m d)")


class FastFrameAttention(FrameAttention):
    """`kernels`: short clips by one kernel. Without them frames become tokens as views, not copies."""

    plain = FrameAttention
    savings: Savings

    def forward(self, x: Tensor) -> Tensor:
        """[b f p c] -> same"""
        if diverted(self):
            return super().forward(x)
        return self.to_out(self.inner(x))

    def inner(self, x: Tensor) -> Tensor:
        """The input of the output projection: [b f p c] -> [b f p (m d)]"""
        b, f, m = *x.shape[:2], self.heads
        q, k, v = projections(self, x)
        if "kernels" in self.savings.names and f <= kernels.MAX_FRAMES and not callable(self.backend):
            return kernels.frame_attention(q, k, v, m)
        if b > 1 and x.device.type not in ("cpu", "meta"):
            # Copies cost a GPU less than waiting for one call per sample.
            q, k, v = (rearrange(y, "b f p (m d) -> (b p) m f d", m=m) for y in (q, k, v))
            return rearrange(attend(q, k, v, self.backend), "(b p) m f d -> b f p (m d)", b=b)
        # Fused kernels take one batch axis, and b and p have no common stride: one call per sample. The
        # output has the layout of q, so that a single sample is not copied on its way back either.
        q, k, v = (rearrange(y, "b f p (m d) -> b p m f d", m=m).unbind() for y in (q, k, v))
        backend = half.backend(self.backend, x) if "half_on_cpu" in self.savings.names else self.backend
        samples = (attend(*sample, backend) for sample in zip(q, k, v, strict=True))
        done = [rearrange(y, "p m f d -> f p (m d)") for y in samples]
        return done[0][None] if b == 1 else torch.stack(done)


def projections(attention: FastAttention | FastFrameAttention, x: Tensor) -> Sequence[Tensor]:
    """x [... c] -> q, k, v of self-attention, each [... c']"""
    layers = (attention.to_q, attention.to_k, attention.to_v)
    if "fuse_projections" not in attention.savings.names:
        return tuple(layer(x) for layer in layers)
    return F.linear(x, joined([layer.weight for layer in layers])).chunk(3, dim=-1)


def lay_side_by_side(layers: Sequence[nn.Linear]) -> None:
    """Move the weights of layers of one input width into one storage, so that `joined` needs no copy."""
    sizes = [len(layer.weight) for layer in layers]
    whole = joined([layer.weight.data for layer in layers])  # a view if they are side by side already
    for layer, part in zip(layers, whole.split(sizes), strict=True):
        layer.weight.data = part


def joined(weights: Sequence[Tensor]) -> Tensor:
    """Matrices of one width stacked: a view if they are side by side in memory and need no gradient."""
    if torch.compiler.is_compiling():  # it does not see storages
        return torch.cat(list(weights))
    first, end = weights[0], weights[0].storage_offset()
    for weight in weights:
        apart = weight.storage_offset() != end or not weight.is_contiguous() or weight.requires_grad
        if apart or weight.untyped_storage()._cdata != first.untyped_storage()._cdata:
            return torch.cat(list(weights))
        end += weight.numel()
    return first.detach().as_strided((sum(map(len, weights)), first.shape[1]), first.stride())
