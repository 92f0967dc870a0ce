"""Weights kept in eight bits and widened when they are used: half the memory of float16, NOT exact.

Plain PyTorch and no package: a layer's weight becomes whole numbers (or float8) with one scale for each
output channel; reading `layer.weight` gives the widened one, so every form of a layer that reads it works.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from i2vgen.files import eight_bits

SMALLEST = 2**12  # values; smaller weights stay as they are
LARGEST = {"int8": 127.0, "float8": 448.0}  # the greatest number of each storage


class EightBits(nn.Module):
    """What `parametrize` needs: from the weight to what is stored, and back."""

    def __init__(self, storage: str):
        super().__init__()
        self.storage = storage

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """weight [o ...] -> stored [o ...] in eight bits, scale [o 1 ...] in the weight's dtype"""
        scale = (eight_bits.largest(weight) / LARGEST[self.storage]).clamp(min=1e-12).to(weight.dtype)
        if self.storage == "int8":
            return eight_bits.whole_numbers(weight, scale), scale
        return (weight.float() / scale.float()).clamp(-448, 448).to(torch.float8_e4m3fn), scale

    def forward(self, stored: Tensor, scale: Tensor) -> Tensor:
        return stored.to(scale.dtype) * scale


def store(module: nn.Module, storage: str) -> None:
    """Linear and convolution layers keep their weights in eight bits: `storage` int8, float8, or native."""
    if storage == "native":
        return
    for layer in list(module.modules()):
        if isinstance(layer, nn.Linear | nn.Conv2d) and layer.weight.numel() >= SMALLEST:
            layer.weight.requires_grad_(False)
            parametrize.register_parametrization(layer, "weight", EightBits(storage))
