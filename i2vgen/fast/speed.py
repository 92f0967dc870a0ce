"""Exact savings: the same numbers up to rounding, in less time and memory. Each has its switch in `runtime`.

The modules keep their plain form, which is what they do unless told otherwise here; `apply` tells those that
know a faster form. A module that a researcher changed or replaced knows none and runs as it was written.
"""

from __future__ import annotations

import torch
from torch import nn

from i2vgen.fast import kernels
from i2vgen.model.attention import Attention, FrameAttention, lay_side_by_side
from i2vgen.model.layers import Conv, FeedForward, GroupNorm
from i2vgen.model.spatial import Downsample, ResBlock, SpatialTransformer, Upsample
from i2vgen.model.temporal import TemporalConv, TemporalTransformer
from i2vgen.model.unet import UNet
from i2vgen.settings.config import Runtime

WITH_KERNELS = (GroupNorm, FeedForward, FrameAttention, SpatialTransformer, TemporalTransformer)
IN_CHUNKS = (ResBlock, SpatialTransformer, Downsample, Upsample, TemporalConv, TemporalTransformer)


def apply(model: nn.Module, runtime: Runtime, device: torch.device | None = None) -> None:
    """Give every module of a network the form that the settings ask for; `share_prefix` is the pipeline's.

    `device`: where it will compute, if its weights still wait elsewhere.
    """
    kernel = kernels.choose(runtime.kernels, device or next(model.parameters()).device)
    for module in model.modules():
        if isinstance(module, WITH_KERNELS):
            module.kernel = kernel
        if isinstance(module, SpatialTransformer | TemporalTransformer):
            module.sum_in_place = runtime.sum_in_place
        if isinstance(module, TemporalTransformer):
            module.fold = runtime.fold_products
        if isinstance(module, UNet):
            module.project_once, module.together = runtime.project_once, runtime.batch_guidance
        elif isinstance(module, Attention):
            module.fused = runtime.fuse_projections
        elif isinstance(module, FeedForward):
            module.in_place, module.chunk = runtime.in_place, runtime.feed_forward_chunk
        elif isinstance(module, IN_CHUNKS):
            module.tokens = runtime.token_chunk
            if isinstance(module, Upsample):
                module.subpixel = runtime.subpixel_upsampling
        elif isinstance(module, GroupNorm):
            module.in_place = runtime.in_place
        elif isinstance(module, Conv):
            module.product = runtime.convolution_products
    if runtime.weight_layout:
        lay_out(model, side_by_side=runtime.fuse_projections)


def lay_out(model: nn.Module, *, side_by_side: bool) -> None:
    """Put weights into memory as the kernels read them: the same numbers in another order, no byte more.

    A convolution's with channels last, those of q, k and v side by side. Changing them in place later is
    heard as ever; weights that are replaced lie as their owner made them, and are copied in every call.
    """
    for module in model.modules():
        if isinstance(module, Conv):
            module.weight.data = module.weight.data.contiguous(memory_format=torch.channels_last)
        elif side_by_side and isinstance(module, Attention):
            layers = (module.to_q, module.to_k, module.to_v)
            widths = {layer.in_features for layer in layers if type(layer) is nn.Linear}
            if len(widths) == 1 and all(type(layer) is nn.Linear for layer in layers):
                lay_side_by_side(layers)
