"""Your own context tokens, which every cross-attention reads besides those of the text and the picture.

    tokens = project(camera)                                # [b k d]: a small module that you write and train
    with extra_tokens(model.unet, tokens):                  # appended to the others, in the same softmax
        model(picture, prompt)

    beside = Beside(model.unet)                             # or with their own keys, values and softmax, as
    with extra_tokens(model.unet, tokens, through=beside, scale=0.8):    # in IP-Adapter (arXiv 2308.06721)
        model(picture, prompt)

They become a part of the result of `UNet.prepare`, which is computed once per video. Gradients reach the
tokens and `beside`. Nothing is left behind after the `with`.

Axes: b batch, k tokens, d their width, m heads of an attention.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from i2vgen.adapt.context import Context, ContextReader, Keys, as_context, cross_attentions, with_tokens
from i2vgen.adapt.taps import matching
from i2vgen.model.attention import Attention
from i2vgen.model.conditioning import Conditions, Prepared, Unconditional
from i2vgen.model.unet import UNet

Negative = Tensor | Literal["zeros", "none", "same"]


@contextlib.contextmanager
def extra_tokens(
    unet: UNet,
    tokens: Tensor,
    *,
    negative: Negative = "zeros",
    through: Beside | None = None,
    scale: float = 1.0,
) -> Iterator[None]:
    """Inside, conditions are prepared with `tokens` [b k d], or [1 k d] for every sample of a batch.

    `negative` is what the unconditional branch of guidance reads instead: zeros of the same number, none,
    the same, or tokens of your own. An appended zero token still takes its share of the softmax; `through`
    a `Beside` it adds nothing, so there "none" equals "zeros". `scale` multiplies what they add.

    ValueError for tokens that do not fit; a warning if they change nothing. Several `with` add up.
    """
    width = unet.stem.context_width if through is None else through.width
    for given in (tokens, negative) if isinstance(negative, Tensor) else (tokens,):
        _check(given, width, "the context tokens" if through is None else "what `through` takes")
    if not isinstance(negative, Tensor) and negative not in ("zeros", "none", "same"):
        raise ValueError(f"negative is {negative!r}; give zeros, none, same, or tokens [b k {width}]")
    if through is None and scale != 1.0:
        raise ValueError(
            f"scale is {scale:g} without `through`: appended tokens have no scale; multiply them, "
            "or give through=Beside(unet)"
        )
    if through is not None:
        through.check(unet)
    if not math.isfinite(scale):
        raise ValueError(f"scale is {scale}; give a finite number")
    if scale == 0:
        warnings.warn("extra tokens at scale 0 change nothing", stacklevel=3)
    extra = _Extra(unet, tokens, negative, through, scale)
    before = vars(unet).get("prepare")
    vars(unet)["prepare"] = extra.prepare
    try:
        with reading_contexts(unet if through is not None else None):
            yield
    finally:
        vars(unet).pop("prepare")
        if before is not None:
            vars(unet)["prepare"] = before
    if not extra.called:
        warnings.warn(
            "the extra tokens had no effect: no conditions were prepared inside the `with`, and those that "
            "were prepared before do not have them",
            stacklevel=3,
        )


@contextlib.contextmanager
def reading_contexts(unet: UNet | None) -> Iterator[None]:
    """Inside, the plain cross-attentions of a UNet are `ContextReader`s."""
    plain = (
        [] if unet is None else [part for part in cross_attentions(unet).values() if type(part) is Attention]
    )
    for part in plain:
        part.__class__ = ContextReader
    try:
        yield
    finally:
        for part in plain:
            part.__class__ = Attention


def _check(tokens: Tensor, width: int, place: str) -> None:
    if tokens.ndim != 3 or tokens.shape[-1] != width or not tokens.numel():
        raise ValueError(
            f"extra tokens have the shape {list(tokens.shape)}; give [b k d] with d = {width}, the width of "
            f"{place}, and b and k of at least 1"
        )


class Beside(nn.Module):
    """Keys and values of tokens that a cross-attention reads by a softmax of their own, whose result it adds.

    Without effect until trained, since the values start at zero. `patterns` choose the cross-attentions (as
    in `taps.py`; ValueError if one matches none); `width` is that of the tokens, by default the context's.
    """

    def __init__(
        self, unet: UNet, patterns: Sequence[str] = ("*.cross_attention",), *, width: int | None = None
    ):
        super().__init__()
        self.width = unet.stem.context_width if width is None else width
        there, parts = cross_attentions(unet), {}
        like = unet.conv_in.weight
        for pattern in patterns:
            found = {path: m for path, m in matching(unet, pattern).items() if path in there}
            if not found:
                raise ValueError(
                    f"{pattern!r} matches no cross-attention; their paths end in cross_attention"
                )
            for path, reader in found.items():
                # In at least float32: Adam's updates would vanish in half precision.
                wide = torch.promote_types(like.dtype, torch.float32)
                parts[path.replace(".", "/")] = KeysOf(reader, self.width).to(like.device, wide)
        if not parts:
            raise ValueError("no pattern given; name cross-attentions, for example *.cross_attention")
        self.parts = nn.ModuleDict(parts)

    def check(self, unet: UNet) -> None:
        """ValueError if this was made for a network with other cross-attentions."""
        there = {path.replace(".", "/"): reader for path, reader in cross_attentions(unet).items()}
        for path, part in self.parts.items():
            reader, wanted = there.get(path), (part.heads, part.to_k.out_features)
            if reader is None or (reader.heads, reader.to_q.out_features) != wanted:
                raise ValueError(
                    f"`through` was made for another network: this one's {path.replace('/', '.')} is no "
                    f"cross-attention of {wanted[0]} heads and width {wanted[1]}"
                )

    def forward(self, path: str, tokens: Tensor) -> Keys | None:
        """Tokens [b k d] as the cross-attention at `path` reads them; None if it does not"""
        path = path.replace(".", "/")
        return self.parts[path](tokens) if path in self.parts else None


class KeysOf(nn.Module):
    """Tokens [b k d] to the keys and values of one attention."""

    def __init__(self, reader: Attention, width: int):
        super().__init__()
        self.heads, inner = reader.heads, reader.to_q.out_features
        self.to_k = nn.Linear(width, inner, bias=False)
        self.to_v = nn.Linear(width, inner, bias=False)
        nn.init.zeros_(self.to_v.weight)

    def forward(self, tokens: Tensor) -> Keys:
        k, v = (
            layer(tokens).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.to_k, self.to_v)
        )
        return Keys(k, v)


class _Extra:
    """Replaces `UNet.prepare`: the same, with these tokens."""

    def __init__(self, unet: UNet, tokens: Tensor, negative: Negative, through: Beside | None, scale: float):
        self.unet, self.tokens, self.negative = unet, tokens, negative
        self.through, self.scale = through, scale
        self.inner, self.called = unet.prepare, False

    def prepare(self, conditions: Conditions, frames: int) -> Prepared:
        self.called = True
        prepared = self.inner(conditions, frames)
        tokens = self.of(conditions)
        if tokens is None:
            return prepared
        context = as_context(prepared.context)
        if len(tokens) not in (1, len(context)):
            raise ValueError(
                f"extra tokens for {len(tokens)} samples meet a batch of {len(context)}; give one set for "
                "each sample, or one for all"
            )
        tokens = tokens.to(context.tokens.device).expand(len(context), -1, -1)
        if self.through is not None:
            extra = self.extra(tokens, context, isinstance(conditions, Unconditional))
            return prepared._replace(context=Context(context.tokens, {}, extra))
        longer = torch.cat([context.tokens, tokens.to(context.tokens.dtype)], dim=1)
        return prepared._replace(context=with_tokens(prepared.context, longer))

    def of(self, conditions: Conditions) -> Tensor | None:
        if not isinstance(conditions, Unconditional) or self.negative == "same":
            return self.tokens
        if isinstance(self.negative, Tensor):
            return self.negative
        return None if self.negative == "none" and self.through is None else torch.zeros_like(self.tokens)

    def extra(self, tokens: Tensor, context: Context, negative: bool) -> dict[Attention, tuple[Keys, ...]]:
        """What every cross-attention reads by further softmaxes, with these tokens [b k d] as the last"""
        tokens, like = tokens.to(next(self.through.parameters())), context.tokens
        made = {reader: self.through(path, tokens) for path, reader in cross_attentions(self.unet).items()}
        made = {reader: keys for reader, keys in made.items() if keys is not None}
        idle = not torch.is_grad_enabled() and not negative and self.scale
        if idle and not any(keys.v.any() for keys in made.values()):
            warnings.warn(
                "extra tokens change nothing: `through` is untrained, its values are 0", stacklevel=2
            )
        last = {r: Keys(keys.k.to(like), (self.scale * keys.v).to(like)) for r, keys in made.items()}
        return {**context.extra, **{r: (*context.extra.get(r, ()), keys) for r, keys in last.items()}}
