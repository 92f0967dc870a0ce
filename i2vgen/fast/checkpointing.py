"""Gradient checkpointing: keep the inputs of a block's parts and recompute their insides in the backward.

It trades a second forward for the memory of nearly all activations.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from i2vgen.model.temporal import TemporalTransformer
from i2vgen.model.unet import Block, UNet


class CheckpointedBlock(Block):
    """A block whose parts are checkpointed one by one."""

    def forward(self, x: Tensor, embedding: Tensor, context: Tensor) -> Tensor:
        """x [b f h w c], embedding [b e], context [b k d] -> [b f h w c']"""
        x = run(self.res, x, embedding)
        if self.temporal_conv is not None:
            x = run(self.temporal_conv, x)
        if self.spatial is not None:
            x = run(self.spatial, x, context)
        if self.temporal is not None:
            x = run(self.temporal, x)
        return x


class CheckpointedTemporal(TemporalTransformer):
    """A temporal transformer that is checkpointed as one, for the UNet's first, which is in no block."""

    def forward(self, x: Tensor) -> Tensor:
        """x [b f h w c] -> same"""
        return run(super().forward, x)


def run(part: Callable[..., Tensor], *inputs: Any) -> Tensor:
    if torch.is_grad_enabled():
        return checkpoint(part, *inputs, use_reentrant=False)
    return part(*inputs)


def set_checkpointing(network: nn.Module, on: bool) -> None:
    """Switch it on or off for all transformers and blocks of a UNet that are exactly ours."""
    for module in network.modules():
        if isinstance(module, UNet):
            _switch(module.temporal_in, TemporalTransformer, CheckpointedTemporal, on)
        _switch(module, Block, CheckpointedBlock, on)


def _switch(module: nn.Module | None, plain: type, checkpointed: type, on: bool) -> None:
    if type(module) is (plain if on else checkpointed):
        module.__class__ = checkpointed if on else plain
