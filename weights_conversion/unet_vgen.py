"""UNet: the official checkpoint (VGen's names) and its relatives <-> ours.

One table covers the whole lineage, whose sets of names are nested: the refiners hold the plain video UNet, v1
adds `context_embedding` and `fps_embedding`, the released model adds the local branch. `settings_from_shapes`
finds the settings under which the table maps a checkpoint one to one. The spatial layers of Stable Diffusion
2.1, from which all were initialised, have their own rows (`sd_rows`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from i2vgen.files import checkpoint
from i2vgen.settings import config
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
DOWN: Table = (("op", "conv", "affine"),)
# The misspelling `temopral` is the checkpoint's. The first stage has no dropout, so its convolution has a
# smaller index.
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


# Contents of `transformer_blocks.0`, shared with diffusers' layout.
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
    """Those of the model under these switches, without the tensors that a switch drops."""
    dropped = checkpoint.ablation(unet, use).dropped
    return [row for row in expand(places(unet, use)) if not dropped & {*row.ours}]


def places(unet: config.UNet, use: config.Use) -> Iterator[Place]:
    """Every block of the UNet, under the official prefix and ours."""
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
            yield f"input_blocks.{index}", DOWN, f"down.{level}.resample"
            skips.append(width)
            index += 1

    # The official middle is one entry (ResBlock, spatial, temporal, ResBlock); ours is two blocks.
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
            # The upsampling is the last part of the level's last entry.
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


# Defaults of the official class for arguments that the released configuration omits.
CLASS_DEFAULTS = {
    "num_tokens": 4,
    "adapter_transformer_layers": 1,
    "temporal_attention": True,
    "dropout": 0.1,
    "dim": 512,
    "attn_scales": (1 / 2, 1 / 4, 1 / 8),
}


def settings(arguments: Mapping[str, Any]) -> tuple[config.UNet, config.Use]:
    """Constructor arguments of the official class, and the values that it hard-codes -> our settings."""
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


# ------------------------------------------------------------------------------- settings from shapes

Shapes = Mapping[str, tuple[int, ...]]
Lineage = Literal["released", "v1", "refiner", "sd"]
SD_PREFIX = "model.diffusion_model."
SD_DOWN: Table = (("0.op", "conv", "affine"),)


def lineage(names: Iterable[str]) -> Lineage | None:
    """The family of UNets that the names belong to, with or without SD_PREFIX; None if there is none."""
    roots, temporal = set(), False
    for name in names:
        name = name.removeprefix(SD_PREFIX)
        roots.add(name.split(".")[0])
        temporal |= name.startswith("input_blocks.0.1.") or ".temopral_conv." in name
    if not {"input_blocks", "middle_block", "output_blocks", "time_embed"} <= roots:
        return None
    if not temporal:
        return "sd"
    if roots & {"local_image_concat", "local_image_embedding"}:
        return "released"
    return "v1" if {"fps_embedding", "context_embedding"} <= roots else "refiner"


# What shapes do not show; anyone who knows better can give it.
HIDDEN = (
    "norm_groups", "local_grid", "concat_heads", "dropout", "temporal_conv_dropout", "concat_dropout",
)  # fmt: skip


def settings_from_shapes(
    shapes: Shapes, *, head_width: int | None = None, given: Mapping[str, Any] | None = None
) -> tuple[config.UNet, config.Use]:
    """Shapes of a checkpoint of any lineage except SD -> the settings under which `rows` maps all of it.

    Shapes do not show everything: unless given, the head width is guessed by `_head_width`, and HIDDEN have
    their defaults; `given` is a `unet` section. ValueError if these do not fit the shapes, or if the names
    are not those of a video UNet.
    """
    given = {**(given or {}), **({} if head_width is None else {"head_width": head_width})}
    if lineage(shapes) in (None, "sd"):
        raise ValueError(
            "these tensors are not a video UNet in the official layout (no temporal parts were found); "
            "a Stable Diffusion UNet can only initialise one, with --spatial-init"
        )
    use = _use(shapes)
    widths, blocks, attends = _levels(shapes)
    base_width, in_channels = _shape(shapes, "input_blocks.0.0.weight")[:2]
    multipliers = tuple(width // base_width for width in widths)
    if wrong := [width for width in widths if width % base_width]:
        raise ValueError(
            f"a level has width {wrong[0]}, not a multiple of the first convolution's {base_width}"
        )
    attending = [width for width, on in zip(widths, attends, strict=True) if on] + [widths[-1]]  # middle
    head_width = _head_width(given, attending, shapes)
    unet = {name: given[name] for name in HIDDEN if name in given} | {
        "in_channels": in_channels,
        "out_channels": _shape(shapes, "out.2.weight")[0],
        "base_width": base_width,
        "width_multipliers": multipliers,
        "blocks_per_level": blocks,
        "attention_levels": attends,
        "head_width": head_width,
        "context_width": _shape(shapes, "middle_block.1.transformer_blocks.0.attn2.to_k.weight")[1],
    }
    if use.temporal_attention:
        unet["first_temporal_heads"] = _first_temporal_heads(shapes, head_width)
    if use.global_tokens:
        unet |= _global_tokens(shapes, unet["context_width"])
    if use.local_tokens:
        first, last = (_shape(shapes, f"local_image_embedding.{i}.weight") for i in (0, 3))
        unet |= {"local_widths": (first[0], last[0]), "image_channels": first[1]}
    if use.concat:
        unet |= _concat(shapes, use, given)
        unet["in_channels"] -= unet["concat_channels"]
    return config.UNet(**unet), use


def _use(shapes: Shapes) -> config.Use:
    def has(start: str) -> bool:
        return any(name.startswith(start) for name in shapes)

    concat = has("local_image_concat.")
    return config.Use(
        # only v1 reads no prompt: its cross-attention attends only to image tokens
        text=lineage(shapes) != "v1",
        global_tokens=has("context_embedding."),
        local_tokens=has("local_image_embedding."),
        concat=concat,
        # without the branch, the switch has no effect; keep its default
        concat_temporal=has("local_temporal_encoder.") or not concat,
        fps=has("fps_embedding."),
        temporal_attention=has("input_blocks.0.1."),
        temporal_convolution=any(".temopral_conv." in name for name in shapes),
        temporal_second_attention=has("input_blocks.0.1.transformer_blocks.0.attn2.")
        or not has("input_blocks.0.1."),
        # not visible in shapes: the refiners' levels have an extra row at the top and bottom
        resampling="margin" if lineage(shapes) == "refiner" else "half",
    )


def _levels(shapes: Shapes) -> tuple[list[int], int, tuple[bool, ...]]:
    """-> width of every level, blocks per level, which levels have attention."""
    widths, counts, attends = [], [0], []
    index = 1
    while any(f"input_blocks.{index}.{part}.weight" in shapes for part in ("op", "0.in_layers.0")):
        if f"input_blocks.{index}.op.weight" in shapes:
            counts.append(0)
        else:
            if counts[-1] == 0:
                widths.append(_shape(shapes, f"input_blocks.{index}.0.in_layers.2.weight")[0])
                attends.append(f"input_blocks.{index}.1.transformer_blocks.0.attn2.to_k.weight" in shapes)
            counts[-1] += 1
        index += 1
    if len(set(counts)) != 1 or counts[0] == 0:
        raise ValueError(f"the levels have {counts} blocks; all should have the same number, at least one")
    return widths, counts[0], tuple(attends)


# The released configuration and diffusers' class give the first temporal transformer 8 heads.
USUAL_FIRST_HEADS = 8


def _head_width(given: Mapping[str, Any], widths: list[int], shapes: Shapes) -> int:
    """The head width, unless given: that of so many first temporal heads, of 8 if possible, or 64."""
    head_width = given.get("head_width", config.UNet().head_width)
    first, heads = shapes.get("input_blocks.0.1.proj_in.weight", (0,))[0], given.get("first_temporal_heads")
    if "head_width" not in given and first and first % (heads or USUAL_FIRST_HEADS) == 0:
        share = first // (heads or USUAL_FIRST_HEADS)
        head_width = share if heads or not any(width % share for width in widths) else head_width
    if wrong := [width for width in widths if head_width < 1 or width % head_width]:
        raise ValueError(
            f"attention of width {wrong[0]} cannot have heads of width {head_width}"
            + ("" if "head_width" in given else "; give unet.head_width=..., which shapes do not show")
        )
    return head_width


def _first_temporal_heads(shapes: Shapes, head_width: int) -> int:
    inner = _shape(shapes, "input_blocks.0.1.proj_in.weight")[0]
    if inner % head_width:
        raise ValueError(
            f"the first temporal transformer has inner width {inner}, not a multiple of unet.head_width = "
            f"{head_width}; give unet.head_width=..."
        )
    return inner // head_width


def _global_tokens(shapes: Shapes, context_width: int) -> dict[str, int]:
    out = _shape(shapes, "context_embedding.2.weight")[0]
    if out % context_width:
        raise ValueError(
            f"context_embedding makes {out} numbers, not a multiple of the context's width {context_width}"
        )
    return {
        "image_vector_width": _shape(shapes, "context_embedding.0.weight")[1],
        "num_global_tokens": out // context_width,
    }


def _concat(shapes: Shapes, use: config.Use, given: Mapping[str, Any]) -> dict[str, int]:
    hidden, image_channels = _shape(shapes, "local_image_concat.0.weight")[:2]
    branch = {
        "image_channels": image_channels,
        "concat_hidden": hidden,
        "concat_channels": _shape(shapes, "local_image_concat.4.weight")[0],
    }
    if not use.concat_temporal:
        return branch
    start = "local_temporal_encoder.layers."
    heads = given.get("concat_heads", config.UNet().concat_heads)
    rows = _shape(shapes, f"{start}0.0.fn.to_qkv.weight")[0]
    if rows % (3 * heads):
        raise ValueError(f"{start}0.0.fn.to_qkv.weight has {rows} rows, not q, k, v of {heads} heads")
    layers = {name.removeprefix(start).split(".")[0] for name in shapes if name.startswith(start)}
    return branch | {"concat_layers": len(layers), "concat_head_width": rows // (3 * heads)}


def _shape(shapes: Shapes, name: str) -> tuple[int, ...]:
    if name not in shapes:
        raise ValueError(f"{name} is missing, so this is not a complete UNet in the official layout")
    return tuple(shapes[name])


# ------------------------------------------------------------------ spatial layers of Stable Diffusion 2.1


def sd_rows(unet: config.UNet) -> list[Row]:
    """A Stable Diffusion 2.x UNet (names without SD_PREFIX) -> our inherited tensors, 682 at full size.

    2-D parts of the ResBlocks, spatial transformers, resampling, input and output convolution. SD has no
    temporal parts, so its entries are numbered as in our table with those switched off, and its downsampling
    is a list of one (`.0.op`). Its `time_embed` was not inherited. `conv_in.weight` has only SD's channels;
    `widen_conv_in` adds the others.
    """
    spatial = config.Use(
        global_tokens=False,
        local_tokens=False,
        concat=False,
        fps=False,
        temporal_attention=False,
        temporal_convolution=False,
    )
    inherited = [place for place in places(unet, spatial) if place[0] != "time_embed"]
    return expand((theirs, SD_DOWN if table == DOWN else table, ours) for theirs, table, ours in inherited)


def widen_conv_in(tensor: Tensor, unet: config.UNet, use: config.Use) -> Tensor:
    """SD's input convolution [d c 3 3] -> ours [d c' 3 3], with zeros for the channels of the concat branch.

    At first, the network therefore computes what it inherited; training adds the influence of the picture.
    """
    extra = unet.concat_channels if use.concat else 0
    width, channels, *kernel = tensor.shape
    if channels != unet.in_channels:
        raise ValueError(
            f"input_blocks.0.0.weight reads {channels} channels; unet.in_channels is {unet.in_channels}"
        )
    return torch.cat([tensor, tensor.new_zeros(width, extra, *kernel)], dim=1)
