"""The official UNet checkpoint (VGen's names) <-> ours."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from i2vgen import config
from weights_conversion.rules import Place, Row, Table, expand

MLP: Table = (("0", "linear1", "affine"), ("2", "linear2", "affine"))
LOCAL_TOKENS: Table = (("0", "conv1", "affine"), ("3", "conv2", "affine"), ("5", "conv3", "affine"))
CONCAT: Table = (("0", "conv1", "affine"), ("2", "conv2", "affine"), ("4", "conv3", "affine"))
FRAME_ENCODER: Table = (
    ("0.norm", "norm", "affine"),
    ("0.fn.to_qkv", ("attention.to_q", "attention.to_k", "attention.to_v"), "split"),
    ("0.fn.to_out.0", "attention.to_out", "affine"),
    ("1.net.0.0", "linear1", "affine"),
    ("1.net.2", "linear2", "affine"),
)
RES_BLOCK: Table = (
    ("in_layers.0", "norm1", "affine"),
    ("in_layers.2", "conv1", "affine"),
    ("emb_layers.1", "embedding", "affine"),
    ("out_layers.0", "norm2", "affine"),
    ("out_layers.3", "conv2", "affine"),
)
SKIP: Table = (("skip_connection", "skip", "affine"),)
# The misspelling is the checkpoint's. The first stage has no dropout, so its convolution sits one place
# earlier.
TEMPORAL_CONV: Table = (
    ("conv1.0", "stages.0.norm", "affine"),
    ("conv1.2", "stages.0.conv", "squeeze"),
    ("conv2.0", "stages.1.norm", "affine"),
    ("conv2.3", "stages.1.conv", "squeeze"),
    ("conv3.0", "stages.2.norm", "affine"),
    ("conv3.3", "stages.2.conv", "squeeze"),
    ("conv4.0", "stages.3.norm", "affine"),
    ("conv4.3", "stages.3.conv", "squeeze"),
)


def attention(theirs: str, ours: str) -> Table:
    return (
        *((f"{theirs}.to_{x}", f"{ours}.to_{x}", "weight") for x in "qkv"),
        (f"{theirs}.to_out.0", f"{ours}.to_out", "affine"),
    )


# What lies inside `transformer_blocks.0`, shared with diffusers' layout.
FEED_FORWARD: Table = (
    ("norm3", "norm3", "affine"),
    ("ff.net.0.proj", "feed_forward.proj_in", "affine"),
    ("ff.net.2", "feed_forward.proj_out", "affine"),
)
SPATIAL_INSIDE: Table = (
    ("norm1", "norm1", "affine"),
    *attention("attn1", "self_attention"),
    ("norm2", "norm2", "affine"),
    *attention("attn2", "cross_attention"),
    *FEED_FORWARD,
)
TEMPORAL_INSIDE: Table = (("norm1", "norm1", "affine"), *attention("attn1", "attention1"), *FEED_FORWARD)
TEMPORAL_SECOND: Table = (("norm2", "norm2", "affine"), *attention("attn2", "attention2"))
SPATIAL_ENDS: Table = (
    ("norm", "norm", "affine"),
    ("proj_in", "proj_in", "affine"),
    ("proj_out", "proj_out", "affine"),
)
TEMPORAL_ENDS: Table = (
    ("norm", "norm", "affine"),
    ("proj_in", "proj_in", "squeeze"),
    ("proj_out", "proj_out", "squeeze"),
)


def rows(unet: config.UNet, use: config.Use) -> list[Row]:
    return expand(places(unet, use))


def places(unet: config.UNet, use: config.Use) -> Iterator[Place]:
    yield "time_embed", MLP, "time"
    yield from stem(unet, use)
    yield "", (("input_blocks.0.0", "conv_in", "affine"),), ""
    if use.temporal_attention:
        yield from temporal("input_blocks.0.1", "temporal_in", use)
    widths, depth = unet.widths, len(unet.widths)

    index, width, skips = 1, unet.base_width, [unet.base_width]
    for level in range(depth):
        for i in range(unet.blocks_per_level):
            attends = unet.attention_levels[level]
            yield from block(
                f"input_blocks.{index}", f"down.{level}.blocks.{i}", use, attends, width != widths[level]
            )
            width = widths[level]
            skips.append(width)
            index += 1
        if level < depth - 1:
            yield f"input_blocks.{index}", (("op", "conv", "affine"),), f"down.{level}.resample"
            skips.append(width)
            index += 1

    # The official middle is one entry: ResBlock, spatial, temporal, ResBlock; ours are two blocks.
    yield from block("middle_block", "mid1", use, True, False)
    yield from res_block(f"middle_block.{3 if use.temporal_attention else 2}", "mid2", use, False)

    index = 0
    for level in reversed(range(depth)):
        attends = unet.attention_levels[level]
        for i in range(unet.blocks_per_level + 1):
            skip = width + skips.pop() != widths[level]
            yield from block(f"output_blocks.{index}", f"up.{level}.blocks.{i}", use, attends, skip)
            width = widths[level]
            index += 1
        if level > 0:
            # The upsampling is the last part of the level's last entry, after whatever stands in it.
            part = 1 + attends + (attends and use.temporal_attention)
            yield f"output_blocks.{index - 1}.{part}", (("conv", "conv", "affine"),), f"up.{level}.resample"
    yield "out", (("0", "norm_out", "affine"), ("2", "conv_out", "affine")), ""


def stem(unet: config.UNet, use: config.Use) -> Iterator[Place]:
    if use.fps:
        yield "fps_embedding", MLP, "stem.fps"
    if use.global_tokens:
        yield "context_embedding", MLP, "stem.global_tokens.mlp"
    if use.local_tokens:
        yield "local_image_embedding", LOCAL_TOKENS, "stem.local_tokens"
    if use.concat:
        yield "local_image_concat", CONCAT, "stem.concat"
        if use.concat_temporal:
            for layer in range(unet.concat_layers):
                yield (
                    f"local_temporal_encoder.layers.{layer}",
                    FRAME_ENCODER,
                    f"stem.concat.frames.layers.{layer}",
                )


def block(theirs: str, ours: str, use: config.Use, attends: bool, skip: bool) -> Iterator[Place]:
    yield from res_block(f"{theirs}.0", ours, use, skip)
    if attends:
        yield f"{theirs}.1", SPATIAL_ENDS, f"{ours}.spatial"
        yield f"{theirs}.1.transformer_blocks.0", SPATIAL_INSIDE, f"{ours}.spatial"
        if use.temporal_attention:
            yield from temporal(f"{theirs}.2", f"{ours}.temporal", use)


def res_block(theirs: str, ours: str, use: config.Use, skip: bool) -> Iterator[Place]:
    yield theirs, RES_BLOCK, f"{ours}.res"
    if skip:
        yield theirs, SKIP, f"{ours}.res"
    if use.temporal_convolution:
        yield f"{theirs}.temopral_conv", TEMPORAL_CONV, f"{ours}.temporal_conv"


def temporal(theirs: str, ours: str, use: config.Use) -> Iterator[Place]:
    yield theirs, TEMPORAL_ENDS, ours
    yield f"{theirs}.transformer_blocks.0", TEMPORAL_INSIDE, ours
    if use.temporal_second_attention:
        yield f"{theirs}.transformer_blocks.0", TEMPORAL_SECOND, ours


# Constructor arguments that the released configuration leaves to the class, which then takes these.
CLASS_DEFAULTS = {
    "num_tokens": 4,
    "adapter_transformer_layers": 1,
    "temporal_attention": True,
    "dropout": 0.1,
    "dim": 512,
    "attn_scales": (1 / 2, 1 / 4, 1 / 8),
}


def settings(arguments: Mapping[str, Any]) -> tuple[config.UNet, config.Use]:
    """The official class's constructor arguments -> our settings. What it hard-codes takes its value here."""
    arguments = {**CLASS_DEFAULTS, **arguments}
    in_dim, dim, multipliers = arguments["in_dim"], arguments["dim"], tuple(arguments["dim_mult"])
    scales = arguments["attn_scales"]
    unet = config.UNet(
        in_channels=in_dim,
        out_channels=arguments["out_dim"],
        base_width=dim,
        width_multipliers=multipliers,
        blocks_per_level=arguments["num_res_blocks"],
        attention_levels=tuple(1 / 2**level in scales for level in range(len(multipliers))),
        head_width=arguments["head_dim"],
        first_temporal_heads=arguments["num_heads"],
        context_width=arguments["context_dim"],
        dropout=arguments["dropout"],
        image_vector_width=arguments["y_dim"],
        num_global_tokens=arguments["num_tokens"],
        local_widths=(8 * in_dim, 16 * in_dim),
        concat_channels=in_dim,
        concat_hidden=4 * in_dim,
        concat_layers=arguments["adapter_transformer_layers"],
        concat_head_width=in_dim,
    )
    return unet, config.Use(temporal_attention=arguments["temporal_attention"])
