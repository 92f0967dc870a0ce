"""A plugin: learned register tokens for cross-attention, attention over near frames only, one part less.

    i2vgen train configs/train/tiny_diffusion.yaml plugins=examples/plugin.py weights=FOLDER output=OUT
    i2vgen generate plugins=examples/plugin.py weights=OUT/weights

Registers are context tokens that belong to the network instead of the prompt. Untrained, they are noise:
train them before you look at clips.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from i2vgen.model.conditioning import Conditions, ConditionStem, Prepared

REGISTERS, NEAR = 4, 2  # tokens, frames

# The tensors that the model has more and less after `change`, as PART.NAME; checked against what it did.
ADDS = ("unet.stem.registers",)
DROPS = ("unet.mid1.temporal.*",)


class StemWithRegisters(ConditionStem):
    def prepare(self, conditions: Conditions, frames: int, dtype: torch.dtype) -> Prepared:
        prepared = super().prepare(conditions, frames, dtype)
        tokens = self.registers.to(dtype).expand(len(prepared.context), -1, -1)
        return prepared._replace(context=torch.cat([prepared.context, tokens], dim=1))


def near(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of a frame to those at most NEAR frames away: q, k, v [n m f d] -> same"""
    place = torch.arange(q.shape[-2], device=q.device)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=(place[:, None] - place).abs() <= NEAR)


def change(parts: dict[str, nn.Module], config) -> None:
    unet = parts["unet"]
    unet.stem.__class__ = StemWithRegisters
    unet.stem.registers = nn.Parameter(0.02 * torch.randn(REGISTERS, config.unet.context_width))
    unet.mid1.temporal = None
    for block in unet.blocks():
        if block.temporal is not None:
            block.temporal.attention1.backend = near
