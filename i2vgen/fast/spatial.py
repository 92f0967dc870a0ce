"""Faster forms of the parts that mix pixels. All tensors are [b f h w c].

Axes: b batch, f frames, h w latent rows and columns, p = h w flattened, c channels, k context tokens,
d context width, e embedding width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from i2vgen.adapt.context import Context, ContextReader, tokens_of
from i2vgen.fast import kernels
from i2vgen.fast.attention import FastAttention
from i2vgen.fast.guard import diverted
from i2vgen.fast.layers import FastConv, Savings, add_product, in_chunks, norm_silu
from i2vgen.model.layers import per_frame
from i2vgen.model.spatial import Downsample, ResBlock, SpatialTransformer, Upsample


class FastResBlock(ResBlock):
    """Norm, embedding and SiLU in one kernel, or the SiLU in place; a chunk of frames at a time."""

    plain = ResBlock
    savings: Savings

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """x [b f h w c], embedding [b e] -> [b f h w c']"""
        if diverted(self):
            return super().forward(x, embedding)
        frames = frames_per_chunk(self.savings.token_chunk, x)
        return in_chunks(lambda part: self.of_frames(part, embedding), frames, 1, x)

    def of_frames(self, x: Tensor, embedding: Tensor) -> Tensor:
        frames = x.flatten(0, 1)
        y = self.conv1(norm_silu(self.norm1, frames))
        y = self.conv2(norm_silu(self.norm2, y, self.embedding(F.silu(embedding))))
        return y.add_(self.skip(frames)).unflatten(0, x.shape[:2])


class FastSpatialTransformer(SpatialTransformer):
    """`sum_in_place`: residual sums inside the products before them; a chunk of frames at a time.

    The biases of these products are collected in `bias`, which the next norm or layer adds while it reads y,
    so that no sum takes a pass of its own.
    """

    plain = SpatialTransformer
    savings: Savings

    def forward(self, x: Tensor, context: Tensor | Context) -> Tensor:
        """x [b f h w c], context [b k d] -> [b f h w c]"""
        if diverted(self):
            ours = isinstance(self.cross_attention, FastAttention | ContextReader)
            return super().forward(x, context if ours else tokens_of(context))
        frames = frames_per_chunk(self.savings.token_chunk, x)
        if "sum_in_place" not in self.savings.names:
            return in_chunks(lambda part: SpatialTransformer.forward(self, part, context), frames, 1, x)
        return in_chunks(lambda part: self.read_frames(part, self.begin_frames(part), context), frames, 1, x)

    def begin(self, x: Tensor) -> Tensor:
        """The part of `forward` that needs no context: x [b f h w c] -> y [b f p c] for `read`"""
        return in_chunks(self.begin_frames, frames_per_chunk(self.savings.token_chunk, x), 1, x)

    def read(self, x: Tensor, y: Tensor, context: Tensor | Context) -> Tensor:
        """The rest of it: x [b f h w c], y [b f p c] of `begin`, context [b k d] -> [b f h w c]"""
        frames = frames_per_chunk(self.savings.token_chunk, x)
        return in_chunks(lambda x, y: self.read_frames(x, y.clone(), context), frames, 1, x, y)

    def begin_frames(self, x: Tensor) -> Tensor:
        """x [b f h w c] -> y [b f p c], which lacks the bias of the self-attention's output projection"""
        y = rearrange(self.proj_in(per_frame(self.norm, x)), "b f h w c -> (b f) (h w) c").contiguous()
        add_product(y, self.self_attention.inner(self.norm1(y)), self.self_attention.to_out.weight)
        return rearrange(y, "(b f) p c -> b f p c", b=len(x))

    def read_frames(self, x: Tensor, y: Tensor, context: Tensor | Context) -> Tensor:
        """x [b f h w c], y [b f p c] of `begin_frames`, context [b k d] -> [b f h w c]; y is overwritten"""
        cross, feed_forward, bias = self.cross_attention, self.feed_forward, self.self_attention.to_out.bias
        y = y.flatten(1, 2)  # all frames of a sample read the same context: one sequence of queries
        add_product(y, cross.inner(self.normed(self.norm2, y, bias), context), cross.to_out.weight)
        bias = bias + cross.to_out.bias
        feed_forward.add_to(y, self.normed(self.norm3, y, bias))
        return projected_sum(x, y, bias + feed_forward.proj_out.bias, self.proj_out)

    def normed(self, norm: nn.LayerNorm, y: Tensor, bias: Tensor) -> Tensor:
        return layer_norm(norm, y, bias, fused="kernels" in self.savings.names)


def layer_norm(norm: nn.LayerNorm, y: Tensor, bias: Tensor, *, fused: bool) -> Tensor:
    """norm(y + bias): y [... c], bias [c] -> like y"""
    if fused:
        return kernels.layer_norm(y, bias, norm.weight, norm.bias, norm.eps)
    return norm(y + bias)


def projected_sum(x: Tensor, y: Tensor, bias: Tensor, linear: nn.Linear) -> Tensor:
    """x + linear(y + bias): y has as many values as x, in the same order -> like x"""
    out = x + F.linear(bias, linear.weight, linear.bias)
    add_product(out, y, linear.weight)
    return out


class FastDownsample(Downsample):
    """A chunk of frames at a time."""

    plain = Downsample
    savings: Savings

    def forward(self, x: Tensor) -> Tensor:
        if diverted(self):
            return super().forward(x)
        frames = frames_per_chunk(self.savings.token_chunk, x)
        return in_chunks(lambda part: per_frame(self.conv, part), frames, 1, x)


class FastUpsample(Upsample):
    """`subpixel_upsampling`: four 2 x 2 convolutions before enlarging; a chunk of frames at a time."""

    plain = Upsample
    savings: Savings

    def forward(self, x: Tensor) -> Tensor:
        if diverted(self):
            return super().forward(x)
        # Where the convolution is a matrix product, summing its weights costs more than it saves.
        as_product = type(self.conv) is FastConv and self.conv.product_pays(x.flatten(0, 1))
        subpixel = "subpixel_upsampling" in self.savings.names and not as_product
        function = self.convolve_first if subpixel else super().forward
        return in_chunks(function, frames_per_chunk(self.savings.token_chunk // 4, x), 1, x)

    def convolve_first(self, x: Tensor) -> Tensor:
        """[b f h w c] -> [b f 2h 2w c'], or [b f 2h-2 2w c'] with `margin`

        After doubling, the three rows that an output row reads are two rows of x, one of them twice: an even
        output row reads x's row above with the first kernel row and its own with the sum of the other two,
        an odd one its own with the sum of the first two and the row below with the last. So for columns.
        """
        b, f, h, w, _ = x.shape
        # One product for all sums of weights, so that half precision rounds them once.
        weight = self.conv.weight.flatten(2) @ summed_rows_and_columns(self.conv.weight)
        weight = rearrange(weight, "o c (i j u v) -> (i j o) c u v", i=2, j=2, u=2)
        y = F.conv2d(rearrange(x, "b f h w c -> (b f) c h w"), weight, self.conv.bias.repeat(4), padding=1)
        y = rearrange(y, "n (i j c) h w -> n i j h w c", i=2, j=2)
        # Output row 2r + i reads rows r - 1 + i and r + i of x, which is window r + i of the convolution.
        # Without the outer rows pairs begin with an odd row, and both rows of a pair read one window.
        pairs = h - 1 if self.margin else h
        out = x.new_empty(b * f, pairs, 2, w, 2, y.shape[-1])
        for i in range(2):
            for j in range(2):
                first, row = (1, 1 - i) if self.margin else (i, i)
                out[:, :, i, :, j] = y[:, row, j, first : first + pairs, j : j + w]
        out = out.view(b, f, 2 * pairs, 2 * w, -1)
        if self.margin:  # the outermost rows that are left read zeros in place of those that were cut off
            out[..., :1, :, :] = self.plain.forward(self, x[..., :2, :, :])[..., :1, :, :]
            out[..., -1:, :, :] = self.plain.forward(self, x[..., -2:, :, :])[..., -1:, :, :]
        return out


def summed_rows_and_columns(like: Tensor) -> Tensor:
    """[9 16]: the nine weights of a 3 x 3 kernel -> four 2 x 2 kernels, for even and odd rows and columns."""
    # Kernel row r goes to row u of two: 0 1 1 for even output rows, 0 0 1 for odd ones. Computed on the
    # device, since a CUDA graph must not wait for the CPU.
    i, r, u = (torch.arange(size, device=like.device) for size in (2, 3, 2))
    rows = ((1 + r - i[:, None]) // 2)[..., None] == u
    rows = rows.to(like.dtype)
    return torch.einsum("iru, jsv -> rsijuv", rows, rows).reshape(9, 16)


def frames_per_chunk(tokens: int, x: Tensor) -> int:
    """Frames of x [b f h w c] that are at most so many tokens, at least one; 0 if chunking is disabled"""
    b, _, h, w, _ = x.shape
    return max(1, tokens // (b * h * w)) if tokens else 0
