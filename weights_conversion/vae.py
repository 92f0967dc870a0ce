"""Autoencoder: CompVis' names (the Stable Diffusion checkpoint) and diffusers' names <-> ours."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from i2vgen.settings import config
from weights_conversion.rules import Place, Row, Table, expand

# Prefix of the autoencoder in the checkpoint, which also holds a UNet and a text model that we do not use.
PREFIX = "first_stage_model."

RES_BLOCK: Table = tuple((name, name, "affine") for name in ("norm1", "conv1", "norm2", "conv2"))
COMPVIS_ATTENTION: Table = (
    ("norm", "norm", "affine"),
    ("q", "to_q", "squeeze2"),
    ("k", "to_k", "squeeze2"),
    ("v", "to_v", "squeeze2"),
    ("proj_out", "to_out", "squeeze2"),
)
DIFFUSERS_ATTENTION: Table = (
    ("group_norm", "norm", "affine"),
    ("to_q", "to_q", "affine"),
    ("to_k", "to_k", "affine"),
    ("to_v", "to_v", "affine"),
    ("to_out.0", "to_out", "affine"),
)
HIDDEN = ("scale", "norm_groups", "resolution")  # settings that no shape shows
QUANT: Table = (("quant_conv", "quant_conv", "affine"), ("post_quant_conv", "post_quant_conv", "affine"))


def rows(vae: config.VAE) -> list[Row]:
    """Rows for CompVis' names, without PREFIX."""
    return expand(places(vae))


def places(vae: config.VAE) -> Iterator[Place]:
    """Every block of the autoencoder, under CompVis' prefix and ours."""
    for half in ("encoder", "decoder"):
        ends = ("conv_in", "norm_out", "conv_out")
        yield half, tuple((name, name, "affine") for name in ends), half
        yield f"{half}.mid.block_1", RES_BLOCK, f"{half}.mid.block1"
        yield f"{half}.mid.attn_1", COMPVIS_ATTENTION, f"{half}.mid.attention"
        yield f"{half}.mid.block_2", RES_BLOCK, f"{half}.mid.block2"
    for half, side, level, block, skip in _blocks(vae):
        theirs, ours = f"{half}.{side}.{level}", f"{half}.{side}.{level}"
        table = (*RES_BLOCK, ("nin_shortcut", "skip", "affine")) if skip else RES_BLOCK
        yield f"{theirs}.block.{block}", table, f"{ours}.blocks.{block}"
        if _attends(vae, level):
            yield f"{theirs}.attn.{block}", COMPVIS_ATTENTION, f"{ours}.attentions.{block}"
    for half, side, level in _resamples(vae):
        name = "downsample" if side == "down" else "upsample"
        yield (
            f"{half}.{side}.{level}.{name}",
            (("conv", "conv", "affine"),),
            f"{half}.{side}.{level}.resample",
        )
    yield "", QUANT, ""


def diffusers_rows(vae: config.VAE) -> list[Row]:
    """Rows for diffusers' names; ValueError for settings that its AutoencoderKL cannot express."""
    if vae.attention_resolutions:
        raise ValueError(
            f"vae.attention_resolutions is {vae.attention_resolutions}; diffusers' AutoencoderKL has "
            "attention only in the middle"
        )
    if vae.embed_dim != vae.z_channels:
        raise ValueError(
            f"vae.embed_dim is {vae.embed_dim} and vae.z_channels {vae.z_channels}; diffusers' AutoencoderKL "
            "requires them to be equal"
        )
    return expand(diffusers_places(vae))


def diffusers_places(vae: config.VAE) -> Iterator[Place]:
    """Every block of the autoencoder, under diffusers' prefix and ours."""
    depth = len(vae.width_multipliers)
    for half in ("encoder", "decoder"):
        ends = (("conv_in", "conv_in"), ("conv_norm_out", "norm_out"), ("conv_out", "conv_out"))
        yield half, tuple((theirs, ours, "affine") for theirs, ours in ends), half
        yield f"{half}.mid_block.resnets.0", RES_BLOCK, f"{half}.mid.block1"
        yield f"{half}.mid_block.attentions.0", DIFFUSERS_ATTENTION, f"{half}.mid.attention"
        yield f"{half}.mid_block.resnets.1", RES_BLOCK, f"{half}.mid.block2"

    def theirs(half: str, side: str, level: int) -> str:
        # diffusers numbers the decoder's levels from the coarsest
        return f"{half}.{side}_blocks.{level if side == 'down' else depth - 1 - level}"

    for half, side, level, block, skip in _blocks(vae):
        table = (*RES_BLOCK, ("conv_shortcut", "skip", "affine")) if skip else RES_BLOCK
        yield f"{theirs(half, side, level)}.resnets.{block}", table, f"{half}.{side}.{level}.blocks.{block}"
    for half, side, level in _resamples(vae):
        name = f"{theirs(half, side, level)}.{side}samplers.0"
        yield name, (("conv", "conv", "affine"),), f"{half}.{side}.{level}.resample"
    yield "", QUANT, ""


def settings(ddconfig: Mapping[str, Any], embed_dim: int, scale: float) -> config.VAE:
    """CompVis' `ddconfig` -> our settings."""
    return config.VAE(
        channels=ddconfig["in_channels"],
        base_width=ddconfig["ch"],
        width_multipliers=tuple(ddconfig["ch_mult"]),
        blocks_per_level=ddconfig["num_res_blocks"],
        z_channels=ddconfig["z_channels"],
        embed_dim=embed_dim,
        resolution=ddconfig["resolution"],
        attention_resolutions=tuple(ddconfig["attn_resolutions"]),
        scale=scale,
    )


def settings_from_shapes(
    shapes: Mapping[str, tuple[int, ...]], given: Mapping[str, Any] | None = None
) -> config.VAE:
    """CompVis' tensor shapes (names without PREFIX) -> our settings; ValueError if they are incomplete.

    Shapes do not show the latent scale, the number of norm groups, and the resolution from which attention
    levels are counted; unless `given`, these take our defaults.
    """
    hidden = {name: value for name, value in (given or {}).items() if name in HIDDEN}
    try:
        depth = 1 + max(int(name.split(".")[2]) for name in shapes if name.startswith("encoder.down."))
        widths = [shapes[f"encoder.down.{level}.block.0.conv1.weight"][0] for level in range(depth)]
        base = shapes["encoder.conv_in.weight"][0]
        z_channels, embed_dim = shapes["decoder.conv_in.weight"][1], shapes["post_quant_conv.weight"][1]
        channels = shapes["encoder.conv_in.weight"][1]
    except (KeyError, IndexError, ValueError) as error:
        raise ValueError(
            f"these tensors are not a complete autoencoder in CompVis' layout ({error!r})"
        ) from error
    if wrong := [width for width in widths if width % base]:
        raise ValueError(f"a level has width {wrong[0]}, not a multiple of the first convolution's {base}")
    resolution = hidden.get("resolution", config.VAE().resolution)
    attends = [level for level in range(depth) if f"encoder.down.{level}.attn.0.q.weight" in shapes]
    return config.VAE(
        channels=channels,
        base_width=base,
        width_multipliers=tuple(width // base for width in widths),
        blocks_per_level=len({n.split(".")[4] for n in shapes if n.startswith("encoder.down.0.block.")}),
        z_channels=z_channels,
        embed_dim=embed_dim,
        attention_resolutions=tuple(resolution // 2**level for level in attends),
        **hidden,
    )


def _attends(vae: config.VAE, level: int) -> bool:
    return vae.resolution // 2**level in vae.attention_resolutions


def _blocks(vae: config.VAE) -> Iterator[tuple[str, str, int, int, bool]]:
    """(half, side, level, block, whether it has a skip convolution) of every ResBlock outside the middle."""
    widths = [vae.base_width * m for m in vae.width_multipliers]
    width = vae.base_width
    for level, out in enumerate(widths):
        for block in range(vae.blocks_per_level):
            yield "encoder", "down", level, block, width != out
            width = out
    for level, out in reversed(list(enumerate(widths))):
        for block in range(vae.blocks_per_level + 1):
            yield "decoder", "up", level, block, width != out
            width = out


def _resamples(vae: config.VAE) -> Iterator[tuple[str, str, int]]:
    depth = len(vae.width_multipliers)
    yield from (("encoder", "down", level) for level in range(depth - 1))
    yield from (("decoder", "up", level) for level in range(1, depth))
