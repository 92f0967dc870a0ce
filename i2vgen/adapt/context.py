"""Context tokens together with keys and values computed beforehand, from them or from other tokens.

A UNet passes its context through to the cross-attentions without looking at it. So a `Context` can take the
place of the tokens [b k d] wherever every cross-attention that it names can read it: those of the `fast` wing
do, and `extra_tokens.py` makes plain ones do so.

Axes: b batch, k context tokens, d their width; m heads of an attention.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from i2vgen.model.attention import Attention, AttentionFunction, attend
from i2vgen.model.spatial import SpatialTransformer
from i2vgen.model.unet import UNet


class Keys(NamedTuple):
    """Keys and values of one cross-attention, each [b m k d]."""

    k: Tensor
    v: Tensor

    @classmethod
    def of(cls, attention: Attention, context: Tensor) -> Keys:
        """Those of context tokens [b k d]"""
        return cls(
            attention.split_heads(attention.to_k(context)), attention.split_heads(attention.to_v(context))
        )


@dataclass(frozen=True)
class Context:
    """Tokens [b k d]; `keys` holds what some cross-attentions make of them, so that it is computed only once.

    `extra` holds keys and values that a cross-attention reads by further softmaxes, whose results are added.
    """

    tokens: Tensor
    keys: Mapping[Attention, Keys]
    extra: Mapping[Attention, tuple[Keys, ...]]

    def __len__(self) -> int:
        return len(self.tokens)

    def split(self, b: int) -> list[Context]:
        """Pieces of b samples each"""
        pieces = range(0, len(self), b)
        return [
            Context(
                self.tokens[i : i + b],
                {part: _rows(keys, i, b) for part, keys in self.keys.items()},
                {part: tuple(_rows(keys, i, b) for keys in listed) for part, listed in self.extra.items()},
            )
            for i in pieces
        ]


class ContextReader(Attention):
    """A plain cross-attention that also reads a `Context`; those of the `fast` wing do anyway."""

    def forward(self, x: Tensor, context: Tensor | Context | None = None) -> Tensor:
        """[n t c], context [n k d] -> [n t c]"""
        if isinstance(context, Context):
            return attend_to_all(self, x, context)
        return super().forward(x, context)


def cross_attentions(unet: UNet) -> dict[str, Attention]:
    """Those of our own kind in a UNet, by path and in the order of definition"""
    spatial = [block.spatial for block in unet.blocks() if isinstance(block.spatial, SpatialTransformer)]
    wanted = {part.cross_attention for part in spatial if isinstance(part.cross_attention, Attention)}
    return {path: module for path, module in unet.named_modules() if module in wanted}


def attend_to_all(attention: Attention, x: Tensor, context: Context) -> Tensor:
    """`attention(x, context.tokens)`, the extra keys and values included: x [b t c] -> same"""
    q = attention.split_heads(attention.to_q(x))
    listed = [Keys.of(attention, context.tokens), *context.extra.get(attention, ())]
    y = rearrange(sum_of_attentions(q, listed, attention.backend), "b m t d -> b t (m d)")
    return attention.dropout(attention.to_out(y))


def sum_of_attentions(q: Tensor, listed: Sequence[Keys], backend: str | AttentionFunction) -> Tensor:
    """q [b m t d] -> [b m t d]: one softmax for each set of keys and values"""
    first, *others = (attend(q, keys.k, keys.v, backend) for keys in listed)
    return sum(others, start=first)


def tokens_of(context: Tensor | Context) -> Tensor:
    """[b k d]"""
    return context.tokens if isinstance(context, Context) else context


def with_tokens(context: Tensor | Context, tokens: Tensor) -> Tensor | Context:
    """The same context with other tokens [b k d]; extra keys and values stay."""
    return Context(tokens, {}, context.extra) if isinstance(context, Context) else tokens


def as_context(context: Tensor | Context) -> Context:
    return context if isinstance(context, Context) else Context(context, {}, {})


def concatenate(contexts: Sequence[Context]) -> Context | None:
    """Contexts of the same shapes as one batch [(n b) k d]; None if their shapes differ."""
    first = contexts[0]
    for other in contexts[1:]:
        alike = other.tokens.shape == first.tokens.shape and other.keys.keys() == first.keys.keys()
        if not alike or _shapes(other) != _shapes(first):
            return None
    return Context(
        torch.cat([one.tokens for one in contexts]),
        {part: _concatenated([one.keys[part] for one in contexts]) for part in first.keys},
        {
            part: tuple(map(_concatenated, zip(*(one.extra[part] for one in contexts), strict=True)))
            for part in first.extra
        },
    )


def _rows(keys: Keys, start: int, count: int) -> Keys:
    return Keys(keys.k[start : start + count], keys.v[start : start + count])


def _shapes(context: Context) -> dict[Attention, list[torch.Size]]:
    return {part: [keys.k.shape for keys in listed] for part, listed in context.extra.items()}


def _concatenated(listed: Sequence[Keys]) -> Keys:
    return Keys(torch.cat([one.k for one in listed]), torch.cat([one.v for one in listed]))
