"""When a saving must leave a call to the plain forward.

A saving reads the weights of the modules inside it instead of calling them, so it is right only while these
modules are exactly the ones it was written for. Each of its forwards asks `diverted` first, in the call
itself and outside compiled code: a hook added at any time is called, and a module that a researcher
replaced, subclassed or gave another forward computes what it was written to compute.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.modules import module as registry
from torch.nn.utils.parametrize import type_before_parametrizations

from i2vgen.model import attention, layers, spatial, temporal, unet, vae

# A weight stored in eight bits is a parametrization: reading it gives the widened weight.
PLAIN = frozenset({
    nn.Linear, nn.LayerNorm, nn.Dropout, nn.Identity, nn.ModuleList,
    layers.Conv, layers.GroupNorm, layers.FeedForward, attention.Attention, attention.FrameAttention,
    spatial.ResBlock, spatial.SpatialTransformer, spatial.Downsample, spatial.Upsample,
    temporal.TemporalConv, temporal.ConvStage, temporal.TemporalTransformer, temporal.FramePositions,
    unet.Block, unet.Level, vae.ResBlock, vae.Upsample, vae.Level, vae.Middle, vae.SelfAttention,
})  # fmt: skip


def diverted(module: nn.Module, *, backward: bool = False) -> bool:
    """Whether this call of a saving's `module` belongs to the plain forward.

    It does where gradients are wanted, unless the saving has a `backward`; where dropout is active; and where
    a module inside is not `ordinary`. Inside compiled code the answer was found before entering it.
    """
    if torch.compiler.is_compiling():
        return False
    if module.training or (torch.is_grad_enabled() and not backward):
        return True
    return not undisturbed(module)


def undisturbed(module: nn.Module) -> bool:
    """Whether everything inside a module is ordinary; of the module itself nothing is asked."""
    if registry._global_forward_hooks or registry._global_forward_pre_hooks:
        return False
    return all(ordinary(part) and undisturbed(part) for part in module._modules.values() if part is not None)


def ordinary(module: nn.Module) -> bool:
    """Whether a module is exactly of a known kind, with no hook on it and no forward of its own."""
    kind = type_before_parametrizations(module)
    if kind not in PLAIN and vars(kind).get("plain") not in PLAIN:
        return False
    return not (module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))
