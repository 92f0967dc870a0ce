"""Weights files in eight bits: half the size of float16, and NOT exact.

A large matrix or filter NAME [o ...] is stored as whole numbers, int8 [o ...], beside NAME.scale, float16
[o 1 ...]: one step size for each output channel, its largest weight / 127. Their product is the weight, off
by half a step at most. Reading multiplies them; nothing after that knows of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from i2vgen.files.safefile import Entry

SCALE = ".scale"  # ends the name of a scale
SMALLEST = 2**10  # values; smaller tensors are stored in float16
LARGEST = 127


def narrow(entries: Sequence[Entry]) -> list[Entry]:
    """Large matrices and filters as a scale and whole numbers, other floats in float16."""
    found = []
    for entry in entries:
        if entry.dtype.is_floating_point and len(entry.shape) > 1 and math.prod(entry.shape) >= SMALLEST:
            found += _pair(entry)
        else:
            kept = torch.float16 if entry.dtype.is_floating_point else entry.dtype
            found.append(Entry(entry.name, entry.shape, kept, entry.read))
    return found


def _pair(entry: Entry) -> list[Entry]:
    rows = (entry.shape[0], *(1 for _ in entry.shape[1:]))
    return [
        Entry(entry.name + SCALE, rows, torch.float16, lambda: scale_of(entry.read())),
        Entry(entry.name, entry.shape, torch.int8, lambda: whole_numbers(w := entry.read(), scale_of(w))),
    ]


def scale_of(weight: Tensor) -> Tensor:
    """[o ...] -> float16 [o 1 ...]"""
    return (largest(weight) / LARGEST).clamp(min=1e-7).half()


def largest(weight: Tensor) -> Tensor:
    """The largest magnitude in each output channel: [o ...] -> float32 [o 1 ...]"""
    return weight.abs().amax(dim=tuple(range(1, weight.ndim)), keepdim=True).float()


def whole_numbers(weight: Tensor, scale: Tensor) -> Tensor:
    """[o ...], [o 1 ...] -> int8 [o ...]"""
    return (weight.float() / scale.float()).round().clamp(-LARGEST, LARGEST).to(torch.int8)


class Widened(Mapping[str, Tensor]):
    """Tensors as they are used: a pair as one float32 tensor, the others as they are stored."""

    def __init__(self, stored: Mapping[str, Tensor]):
        self.stored = stored
        self.names = [n for n in stored if not (n.endswith(SCALE) and n.removesuffix(SCALE) in stored)]

    def __getitem__(self, name: str) -> Tensor:
        tensor = self.stored[name]
        if tensor.dtype != torch.int8:
            return tensor
        scale = self.stored.get(name + SCALE)
        if scale is None or scale.shape != (len(tensor), *(1 for _ in tensor.shape[1:])):
            raise ValueError(f"{name} is stored in eight bits and lacks its scale, {name}{SCALE}")
        return tensor.float() * scale.float()

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)
