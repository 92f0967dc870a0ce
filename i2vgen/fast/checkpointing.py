"""Gradient checkpointing: keep the inputs of a block's parts and recompute their insides in the backward.

It trades a second forward for the memory of nearly all activations.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from i2vgen.model.unet import Block


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


def run(part: nn.Module, *inputs: Any) -> Tensor:
    if torch.is_grad_enabled():
        return checkpoint(part, *inputs, use_reentrant=False)
    return part(*inputs)


def set_checkpointing(network: nn.Module, on: bool) -> None:
    """Switch it on or off for every block of a network that is exactly ours."""
    wanted = {Block: CheckpointedBlock} if on else {CheckpointedBlock: Block}
    for module in network.modules():
        module.__class__ = wanted.get(type(module), type(module))
