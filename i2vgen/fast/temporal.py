"""Faster forms of the parts that mix frames. Tensors are [b f h w c].

Axes: b batch, f frames, h w latent rows and columns, p = h w flattened, c channels.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from i2vgen.fast.guard import diverted
from i2vgen.fast.layers import Savings, add_product, in_chunks, norm_of_chunks, norm_silu
from i2vgen.fast.spatial import layer_norm, projected_sum
from i2vgen.model.temporal import TemporalConv, TemporalTransformer


class FastTemporalConv(TemporalConv):
    """Norm and SiLU in one kernel, or the SiLU in place; a chunk of pixels at a time."""

    plain = TemporalConv
    savings: Savings

    def forward(self, x: Tensor) -> Tensor:
        """x [b f h w c] -> same"""
        if diverted(self):
            return super().forward(x)
        y = rearrange(x, "b f h w c -> b f (h w) c")
        pixels = pixels_per_chunk(self.savings.token_chunk, y)
        if pixels:
            return self.of_chunks(y, pixels).view_as(x)
        for stage in self.stages:
            y = stage.conv(norm_silu(stage.norm, y))
        return y.view_as(x).add_(x)

    def of_chunks(self, x: Tensor, pixels: int) -> Tensor:
        """x [b f p c] -> same: the first stage allocates the result, and the others overwrite it."""
        y = None
        for stage in self.stages:
            source = x if y is None else y
            norm = norm_of_chunks(stage.norm, source, pixels)
            y = in_chunks(lambda part, s=stage, n=norm: s.conv(F.silu(n(part))), pixels, 2, source, into=y)
        return y.add_(x)


class FastTemporalTransformer(TemporalTransformer):
    """`sum_in_place`: residual sums inside the products before them; a chunk of pixels at a time.

    `bias` is what y still lacks, as in `FastSpatialTransformer`. `fold_products`: a transformer that is much
    wider inside than outside ends in one product, onto its narrow output, instead of two.
    """

    plain = TemporalTransformer
    savings: Savings

    def forward(self, x: Tensor) -> Tensor:
        """x [b f h w c] -> same"""
        if diverted(self):
            return super().forward(x)
        y, norm = rearrange(x, "b f h w c -> b f (h w) c"), self.norm
        pixels = pixels_per_chunk(self.savings.token_chunk, y)
        if pixels:
            norm = norm_of_chunks(norm, y, pixels)
        return in_chunks(lambda part: self.of_pixels(part, norm), pixels, 2, y).view_as(x)

    def of_pixels(self, x: Tensor, norm: Callable[[Tensor], Tensor]) -> Tensor:
        """x [b f p c] -> same"""
        y = self.proj_in(norm(x))
        if self.positions is not None:
            y = y + self.positions(x.shape[1])
        fused = "kernels" in self.savings.names
        first, second = self.attention1, self.attention2
        add_product(y, first.inner(self.norm1(y)), first.to_out.weight)
        bias = first.to_out.bias
        if second is not None:
            add_product(y, second.inner(layer_norm(self.norm2, y, bias, fused=fused)), second.to_out.weight)
            bias = bias + second.to_out.bias
        read = layer_norm(self.norm3, y, bias, fused=fused)
        if "fold_products" in self.savings.names and self.folding_pays(x):
            out = projected_sum(x, y, bias + self.feed_forward.proj_out.bias, self.proj_out)
            add_product(out, self.feed_forward.gated(read), self.folded_weight())
            return out
        self.feed_forward.add_to(y, read)
        return projected_sum(x, y, bias + self.feed_forward.proj_out.bias, self.proj_out)

    def folding_pays(self, x: Tensor) -> bool:
        """Whether the folded product saves more than the product of the two weights costs."""
        inner, width = self.proj_in.weight.shape
        return inner >= 2 * width and x.shape[:3].numel() > inner

    def folded_weight(self) -> Tensor:
        """The feed-forward's last weight and the output projection's as one, rounded once: [c 4i]"""
        last, wide = (
            self.feed_forward.proj_out.weight,
            torch.promote_types(self.proj_out.weight.dtype, torch.float32),
        )
        return (self.proj_out.weight.to(wide) @ last.to(wide)).to(last.dtype)


def pixels_per_chunk(tokens: int, x: Tensor) -> int:
    """Pixels of x [b f p c] that are at most so many tokens; 0, which means all, if there are fewer"""
    b, f, p, _ = x.shape
    pixels = max(1, tokens // (b * f)) if tokens else 0
    return pixels if pixels < p else 0
