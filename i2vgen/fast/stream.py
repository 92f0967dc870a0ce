"""The residual stream of a transformer: sums inside the matrix products that end its parts."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from i2vgen.fast import folding, kernels
from i2vgen.model.attention import Attention, FrameAttention
from i2vgen.model.layers import FeedForward, add_product, untouched

PARTS = (Attention, FrameAttention, FeedForward)


class Stream:
    """x [... c]: each part of a transformer reads it through a norm and adds to it. x + part(norm(x))

    `in_place` and without gradients, a part's last product adds to x where it lies, and its bias is owed:
    the next reader adds it on the way. A part, layer or norm that was changed, replaced or is listened to
    gets the plain form, and nobody who may keep x sees it written over.
    """

    def __init__(self, x: Tensor, *, in_place: bool, kernel: bool, own: bool):
        self.x, self.owed, self.own = x, None, own  # own: nobody else holds x
        self.in_place, self.kernel = in_place and not torch.is_grad_enabled(), kernel

    def read(self, norm: nn.Module) -> Tensor:
        """norm(x) -> like x"""
        if not untouched(norm, nn.LayerNorm):
            self.settle()
            self.own = False
        if self.owed is None:
            return norm(self.x)
        if self.kernel:
            return kernels.layer_norm(self.x, self.owed, norm.weight, norm.bias, norm.eps)
        if self.x.itemsize < 4:  # half precision would round the sum once more
            return norm(self.x + self.owed)
        return norm(self.settle())

    def add(self, part: nn.Module, *inputs: object) -> None:
        """x + part(*inputs)"""
        if not self.fits(part):
            self.x, self.own = self.settle() + part(*inputs), True
            return
        if not self.own:
            self.x, self.own = self.x.clone(memory_format=torch.contiguous_format), True
        part.add_to(self.x, *inputs)
        self.owed = part.last.bias if self.owed is None else self.owed + part.last.bias

    def fits(self, part: nn.Module) -> bool:
        ready = self.in_place and untouched(part, *PARTS) and untouched(part.last, nn.Linear)
        return ready and not part.training  # dropout

    def onto(self, x: Tensor, linear: nn.Module) -> Tensor:
        """x + linear(stream) for x with as many values, in the same order -> like x"""
        if not (self.in_place and untouched(linear, nn.Linear)):
            return x + linear(self.settle()).view_as(x)
        bias = linear.bias
        if self.owed is not None:
            bias = F.linear(self.owed, linear.weight, bias)
        out = x + bias
        add_product(out, self.x, linear.weight)
        return out

    def onto_folded(self, x: Tensor, part: FeedForward, read: Tensor, linear: nn.Linear) -> Tensor:
        """x + linear(stream + part(read)), the last products of both as one -> like x"""
        owed = part.last.bias if self.owed is None else self.owed + part.last.bias
        out = x + F.linear(owed, linear.weight, linear.bias)
        add_product(out, self.x, linear.weight)
        part.add_to(out, read, folding.joined(linear, part))
        return out

    def settle(self) -> Tensor:
        """x, nothing owed"""
        if self.owed is not None:
            self.x, self.owed = self.x.add_(self.owed), None  # x is our own since the first sum
        return self.x
