"""The random numbers of a sample, drawn on the CPU from its own seed."""

from __future__ import annotations

import operator

import torch
from torch import Tensor


class SampleNoise:
    """All random numbers of one sample, from its own CPU generator, in the official order.

    First the posterior noise of the first-frame latent, then the initial noise, then one draw per step if eta
    is above 0. So a sample depends on its seed alone, not on batch size, device or its neighbours.
    """

    def __init__(self, seed: int | torch.Generator):
        if not isinstance(seed, torch.Generator):
            seed = torch.Generator().manual_seed(operator.index(seed))  # numpy's integers too
        self.generator = seed

    def draw(self, shape: tuple[int, ...]) -> Tensor:
        """Standard normal float32 of shape (1, *shape) on the CPU, as the official code draws it."""
        return torch.randn(1, *shape, generator=self.generator)


def draw_all(samples: list[SampleNoise], shape: tuple[int, ...]) -> Tensor:
    """One draw of every sample, stacked: [b, *shape]."""
    return torch.cat([sample.draw(shape) for sample in samples])
