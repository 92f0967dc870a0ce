"""UNet: diffusers' `I2VGenXLUNet` <-> ours. It adds the concat branch once, our `use.concat_gain` 1.0."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor

from i2vgen.settings import config
from weights_conversion import rules
from weights_conversion.rules import Place, Row, Table, expand
from weights_conversion.unet_vgen import (
    CONCAT,
    LOCAL_TOKENS,
    MLP,
    SPATIAL_ENDS,
    SPATIAL_INSIDE,
    TEMPORAL_CONV,
    TEMPORAL_INSIDE,
    TEMPORAL_SECOND,
    attention,
)

TIME: Table = (("linear_1", "linear1", "affine"), ("linear_2", "linear2", "affine"))
FRAME_ENCODER: Table = (
    ("norm1", "norm", "affine"),
    *attention("attn1", "attention"),
    ("ff.net.0.proj", "linear1", "affine"),
    ("ff.net.2", "linear2", "affine"),
)
RES_BLOCK: Table = (
    ("norm1", "norm1", "affine"),
    ("conv1", "conv1", "affine"),
    ("time_emb_proj", "embedding", "affine"),
    ("norm2", "norm2", "affine"),
    ("conv2", "conv2", "affine"),
)
SKIP: Table = (("conv_shortcut", "skip", "affine"),)
TEMPORAL_ENDS = SPATIAL_ENDS  # both are Linear here


def rows(unet: config.UNet) -> list[Row]:
    """Rows for diffusers' names; ValueError for settings that its class cannot express."""
    if unet.concat_layers != 1:
        raise ValueError(f"unet.concat_layers is {unet.concat_layers}; diffusers' class always has 1")
    return expand(places(unet))


def to_theirs(unet: config.UNet, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our complete state dict -> the one that diffusers' class loads."""
    return rules.to_theirs(rows(unet), state)


def places(unet: config.UNet) -> Iterator[Place]:
    yield "time_embedding", TIME, "time"
    yield "fps_embedding", MLP, "stem.fps"
    yield "context_embedding", MLP, "stem.global_tokens.mlp"
    yield "image_latents_context_embedding", LOCAL_TOKENS, "stem.local_tokens"
    yield "image_latents_proj_in", CONCAT, "stem.concat"
    yield "image_latents_temporal_encoder", FRAME_ENCODER, "stem.concat.frames.layers.0"
    yield "", (("conv_in", "conv_in", "affine"),), ""
    yield from temporal("transformer_in", "temporal_in")
    widths, depth = unet.widths, len(unet.widths)

    width, skips = unet.base_width, [unet.base_width]
    for level in range(depth):
        for i in range(unet.blocks_per_level):
            skip = width != widths[level]
            yield from block(
                f"down_blocks.{level}", i, f"down.{level}.blocks.{i}", unet.attention_levels[level], skip
            )
            width = widths[level]
            skips.append(width)
        if level < depth - 1:
            yield (
                f"down_blocks.{level}.downsamplers.0",
                (("conv", "conv", "affine"),),
                f"down.{level}.resample",
            )
            skips.append(width)
    yield from block("mid_block", 0, "mid1", True, False)
    yield from block("mid_block", 1, "mid2", False, False)
    for level in reversed(range(depth)):
        theirs = f"up_blocks.{depth - 1 - level}"
        for i in range(unet.blocks_per_level + 1):
            skip = width + skips.pop() != widths[level]
            yield from block(theirs, i, f"up.{level}.blocks.{i}", unet.attention_levels[level], skip)
            width = widths[level]
        if level > 0:
            yield f"{theirs}.upsamplers.0", (("conv", "conv", "affine"),), f"up.{level}.resample"
    yield "", (("conv_norm_out", "norm_out", "affine"), ("conv_out", "conv_out", "affine")), ""


def block(theirs: str, i: int, ours: str, attends: bool, skip: bool) -> Iterator[Place]:
    yield f"{theirs}.resnets.{i}", RES_BLOCK + (SKIP if skip else ()), f"{ours}.res"
    yield f"{theirs}.temp_convs.{i}", TEMPORAL_CONV, f"{ours}.temporal_conv"
    if attends:
        yield f"{theirs}.attentions.{i}", SPATIAL_ENDS, f"{ours}.spatial"
        yield f"{theirs}.attentions.{i}.transformer_blocks.0", SPATIAL_INSIDE, f"{ours}.spatial"
        yield from temporal(f"{theirs}.temp_attentions.{i}", f"{ours}.temporal")


def temporal(theirs: str, ours: str) -> Iterator[Place]:
    yield theirs, TEMPORAL_ENDS, ours
    yield f"{theirs}.transformer_blocks.0", TEMPORAL_INSIDE + TEMPORAL_SECOND, ours
