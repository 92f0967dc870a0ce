"""Context tokens of one's own, which every cross-attention reads beside those of the text and the picture.

    tokens = project(camera)                                # [b k d]: a small module that you write and train
    with extra_tokens(model.unet, tokens):                  # behind the others, under one softmax
        model(picture, prompt)

    beside = Beside(model.unet)                             # or with keys and values of their own, as in
    with extra_tokens(model.unet, tokens, through=beside, scale=0.8):    # IP-Adapter (arXiv 2308.06721)
        model(picture, prompt)

They become a part of what `UNet.prepare` makes once per video, so all that is cached or shared knows them.
Gradients reach the tokens and `beside`. Outside the `with` nothing is left behind.

Axes: b batch, k tokens, d their width; n m heads of an attention, see `attention.py`.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from i2vgen.adapt.taps import matching
from i2vgen.model.attention import Attention, Keys
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

    `negative` is what the unconditional branch of guidance reads in their place: zeros of the same number,
    none, the same, or tokens of your own. Behind the others a zero token still takes its share of the
    softmax; `through` a `Beside` it adds nothing, so there "none" is "zeros". `scale` is of these alone.

    ValueError for tokens that do not fit; a warning where nothing changes. One `with` inside another adds up.
    """
    width = unet.stem.context_width if through is None else through.width
    for given in (tokens, negative) if isinstance(negative, Tensor) else (tokens,):
        _check(given, width, "the context tokens" if through is None else "what `through` takes")
    if not isinstance(negative, Tensor) and negative not in ("zeros", "none", "same"):
        raise ValueError(f"negative is {negative!r}; give zeros, none, same, or tokens [b k {width}]")
    if through is None and scale != 1.0:
        raise ValueError(
            f"scale is {scale:g} without `through`: tokens behind the others have no scale; multiply them, "
            "or give through=Beside(unet)"
        )
    if through is not None:
        through.check(unet)
    if not math.isfinite(scale):
        raise ValueError(f"scale is {scale}; give a finite number")
    if scale == 0:
        warnings.warn("extra tokens at scale 0 change nothing", stacklevel=3)
    extra = _Extra(unet, tokens, negative, through, scale)
    object.__setattr__(unet, "extra", extra)  # past nn.Module, which would register a module
    try:
        yield
    finally:
        object.__setattr__(unet, "extra", extra.before)
    if not extra.asked:
        warnings.warn(
            "the extra tokens changed nothing: no conditions were prepared inside the `with`; what was "
            "prepared before does not have them",
            stacklevel=3,
        )


def _check(tokens: Tensor, width: int, place: str) -> None:
    if tokens.ndim != 3 or tokens.shape[-1] != width or not tokens.numel():
        raise ValueError(
            f"extra tokens have the shape {list(tokens.shape)}; give [b k d] with d = {width}, the width of "
            f"{place}, and b and k of at least 1"
        )


class Beside(nn.Module):
    """Keys and values for tokens that a cross-attention reads apart from its context, and adds.

    Without effect until trained: values begin at zero. `patterns` choose the cross-attentions (as in
    `taps.py`; ValueError if one matches none), `width` is that of the tokens, by default the context's.
    """

    def __init__(
        self, unet: UNet, patterns: Sequence[str] = ("*.cross_attention",), *, width: int | None = None
    ):
        super().__init__()
        self.width = unet.stem.context_width if width is None else width
        readers, parts = set(unet.readers()), {}
        like = unet.conv_in.weight
        for pattern in patterns:
            found = {path: m for path, m in matching(unet, pattern).items() if m in readers}
            if not found:
                raise ValueError(
                    f"{pattern!r} matches no cross-attention; their paths end in cross_attention"
                )
            for path, reader in found.items():
                # In at least float32: an update of Adam's would vanish in half precision.
                wide = torch.promote_types(like.dtype, torch.float32)
                parts[path.replace(".", "/")] = KeysOf(reader, self.width).to(like.device, wide)
        if not parts:
            raise ValueError("no pattern given; name cross-attentions, for example *.cross_attention")
        self.parts = nn.ModuleDict(parts)

    def check(self, unet: UNet) -> None:
        """ValueError if this was made for a network with other cross-attentions."""
        readers = set(unet.readers())
        there = {path.replace(".", "/"): m for path, m in unet.named_modules() if m in readers}
        for path, part in self.parts.items():
            reader, wanted = there.get(path), (part.heads, part.to_k.out_features)
            if reader is None or (reader.heads, reader.to_q.out_features) != wanted:
                raise ValueError(
                    f"`through` was made for another network: this one's {path.replace('/', '.')} is no "
                    f"cross-attention of {wanted[0]} heads and width {wanted[1]}"
                )

    def forward(self, path: str, tokens: Tensor) -> Keys | None:
        """Tokens [b k d] as the cross-attention at `path` reads them; None: it does not."""
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
    """What `UNet.prepare` asks: conditions and what was made of them -> the same with these tokens."""

    def __init__(self, unet: UNet, tokens: Tensor, negative: Negative, through: Beside | None, scale: float):
        self.unet, self.tokens, self.negative = unet, tokens, negative
        self.through, self.scale = through, scale
        self.before, self.asked = unet.extra, False

    def __call__(self, conditions: Conditions, prepared: Prepared) -> Prepared:
        self.asked = True
        if self.before is not None:
            prepared = self.before(conditions, prepared)
        tokens = self.of(conditions)
        if tokens is None:
            return prepared
        b, context = len(prepared.context), prepared.context
        if len(tokens) not in (1, b):
            raise ValueError(
                f"extra tokens for {len(tokens)} samples meet a batch of {b}; give one set for each, or one "
                "for all"
            )
        tokens = tokens.to(context.device).expand(b, -1, -1)
        if self.through is None:
            return self.unet.with_context(prepared, torch.cat([context, tokens.to(context.dtype)], dim=1))
        return prepared._replace(
            keys=self.keys_beside(tokens, prepared, isinstance(conditions, Unconditional))
        )

    def of(self, conditions: Conditions) -> Tensor | None:
        if not isinstance(conditions, Unconditional) or self.negative == "same":
            return self.tokens
        if isinstance(self.negative, Tensor):
            return self.negative
        return None if self.negative == "none" and self.through is None else torch.zeros_like(self.tokens)

    def keys_beside(self, tokens: Tensor, prepared: Prepared, negative: bool) -> tuple[Keys, ...]:
        """The keys of all cross-attentions, with those of the tokens at the end of what stands beside."""
        context, tokens = prepared.context, tokens.to(next(self.through.parameters()))
        paths = {module: path for path, module in self.unet.named_modules()}
        made = [self.through(paths[reader], tokens) for reader in self.unet.readers()]
        idle = not torch.is_grad_enabled() and not negative and self.scale
        if idle and not any(one.v.any() for one in made if one is not None):
            warnings.warn(
                "extra tokens change nothing: `through` is untrained, its values are 0", stacklevel=2
            )
        keys = self.unet.keys(context) if prepared.keys is None else prepared.keys
        return tuple(
            old if new is None else _behind(old, Keys(new.k.to(context), (self.scale * new.v).to(context)))
            for old, new in zip(keys, made, strict=True)
        )


def _behind(keys: Keys, last: Keys) -> Keys:
    return keys._replace(beside=last if keys.beside is None else _behind(keys.beside, last))
