"""The conversion tables: complete for the released checkpoints, exact, invertible, with clear errors."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch

from i2vgen.files import checkpoint
from i2vgen.model.unet import UNet
from i2vgen.model.vae import AutoencoderKL
from i2vgen.settings import config
from i2vgen.settings.config import STRUCTURAL_SWITCHES
from weights_conversion import rules, unet_diffusers, unet_vgen
from weights_conversion import vae as vae_tables

KEYS = Path(__file__).parent / "goldens" / "keys"
FULL = config.Use()
PARTS = [name for name in STRUCTURAL_SWITCHES if getattr(FULL, name)]
OFF = {name: dataclasses.replace(FULL, **{name: False}) for name in PARTS}
BARE = dataclasses.replace(FULL, **{name: name == "text" for name in PARTS})


def manifest(name):
    """Names and shapes of a released checkpoint, as tensors without data."""
    shapes = json.loads((KEYS / f"{name}.json").read_text())
    return {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}


def shapes(state):
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def on_meta(kind, *settings):
    with torch.device("meta"):
        return kind(*settings)


# ------------------------------------------------------------------------------- the released sizes

RELEASED = {
    "vgen_unet_keys": ("unet", unet_vgen.rows(config.UNet(), FULL), 1509, 1_420_469_224),
    "diffusers_unet_keys": ("unet", unet_diffusers.rows(config.UNet()), 1511, 1_420_469_224),
    "vgen_vae_keys": ("vae", vae_tables.rows(config.VAE()), 248, 83_653_863),
    "diffusers_vae_keys": ("vae", vae_tables.diffusers_rows(config.VAE()), 248, 83_653_863),
}


@pytest.mark.parametrize("name", RELEASED)
def test_every_released_tensor_is_mapped(name):
    part, mapping, tensors, parameters = RELEASED[name]
    theirs = manifest(name)
    assert len(theirs) == tensors and sum(t.numel() for t in theirs.values()) == parameters
    assert rules.audit(mapping, theirs) == ([], [])
    targets = [target for row in mapping for target in row.ours]
    assert len(targets) == len(set(targets)) and len(mapping) == len({row.theirs for row in mapping})

    ours = checkpoint.build(part, config.Config()).state_dict()
    assert shapes(rules.to_ours(mapping, theirs)) == shapes(ours)
    assert shapes(rules.to_theirs(mapping, ours)) == shapes(theirs)


def test_clip_needs_no_table():
    theirs = manifest("open_clip_vit_h14_keys")
    assert len(theirs) == 686 and sum(t.numel() for t in theirs.values()) == 986_109_441
    ours = checkpoint.inner(checkpoint.build("clip", config.Config())).state_dict()
    assert shapes(ours) == shapes(theirs)


def test_official_arguments_are_our_defaults():
    arguments = {
        "in_dim": 4, "out_dim": 4, "dim": 320, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 2,
        "attn_scales": [1.0, 0.5, 0.25], "head_dim": 64, "num_heads": 8, "context_dim": 1024, "y_dim": 1024,
        "dropout": 0.1,
    }  # fmt: skip
    assert unet_vgen.settings(arguments) == (config.UNet(), config.Use())
    ddconfig = {
        "in_channels": 3, "out_ch": 3, "ch": 128, "ch_mult": [1, 2, 4, 4], "num_res_blocks": 2,
        "z_channels": 4, "resolution": 256, "attn_resolutions": [],
    }  # fmt: skip
    assert vae_tables.settings(ddconfig, 4, 0.18215) == config.VAE()


# ---------------------------------------------------------------------------- other sizes, round trips

SMALL = {
    "in_dim": 4, "out_dim": 4, "dim": 32, "dim_mult": [1, 2], "num_res_blocks": 1, "attn_scales": [1.0],
    "head_dim": 8, "num_heads": 3, "context_dim": 12, "y_dim": 10,
}  # fmt: skip
SHAPES = {
    "small": {},
    "one level": {"dim_mult": [1]},
    "four levels": {"dim_mult": [1, 2, 2, 4], "attn_scales": [1.0, 0.5, 0.25]},
    "equal levels": {"dim_mult": [1, 1, 1]},
    "three blocks": {"num_res_blocks": 3},
    "coarse attention": {"dim_mult": [1, 2, 2], "attn_scales": [0.25]},
    "attention nowhere": {"attn_scales": []},
    "more global tokens": {"num_tokens": 7},
    "eight output channels": {"out_dim": 8},
    "two concat layers": {"adapter_transformer_layers": 2},
    "no temporal attention": {"temporal_attention": False},
    "no temporal attention, coarse": {
        "temporal_attention": False,
        "dim_mult": [1, 2, 2],
        "attn_scales": [0.5, 0.25],
    },
}


def small(changes):
    return unet_vgen.settings(SMALL | changes)


def assert_inverse(mapping, model):
    ours = dict(checkpoint.random_state(model, seed=0))
    theirs = rules.to_theirs(mapping, ours)
    assert sum(t.numel() for t in theirs.values()) == sum(t.numel() for t in ours.values())
    back = rules.to_ours(mapping, theirs)
    again = rules.to_theirs(mapping, back)
    for one, other in ((ours, back), (theirs, again)):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)
    checkpoint.fill(model, back)  # strict in names and shapes


@pytest.mark.parametrize("changes", SHAPES.values(), ids=SHAPES)
def test_unet_round_trip(changes):
    unet, use = small(changes)
    assert_inverse(unet_vgen.rows(unet, use), on_meta(UNet, unet, use))
    if unet.concat_layers == 1 and use == FULL:
        assert_inverse(unet_diffusers.rows(unet), on_meta(UNet, unet, use))


@pytest.mark.parametrize(
    "vae",
    [
        config.VAE(base_width=32),
        config.VAE(base_width=32, width_multipliers=(1,), blocks_per_level=1),
        config.VAE(base_width=32, width_multipliers=(1, 1, 2), blocks_per_level=3),
        config.VAE(base_width=32, width_multipliers=(1, 2), resolution=32, attention_resolutions=(16,)),
        config.VAE(base_width=32, width_multipliers=(1, 2), z_channels=8, embed_dim=5, channels=1),
    ],
    ids=["small", "one level", "three blocks", "attention", "other channels"],
)
def test_vae_round_trip(vae):
    assert_inverse(vae_tables.rows(vae), on_meta(AutoencoderKL, vae))
    if not vae.attention_resolutions and vae.embed_dim == vae.z_channels:
        assert_inverse(vae_tables.diffusers_rows(vae), on_meta(AutoencoderKL, vae))


def test_upsampling_is_the_last_part_of_its_block():
    def upsampling(changes):
        unet, use = small({"dim_mult": [1, 2, 2]} | changes)
        ours = {row.ours[0]: row.theirs for row in unet_vgen.rows(unet, use)}
        return [ours[f"up.{level}.resample.conv.weight"].split(".")[2] for level in (2, 1)]

    assert upsampling({"attn_scales": [0.5]}) == ["1", "3"]
    assert upsampling({"attn_scales": [0.5], "temporal_attention": False}) == ["1", "2"]


def test_fused_rows_are_q_k_v_in_this_order():
    fused = torch.arange(24.0)[:, None].expand(24, 4)
    row = next(row for row in unet_vgen.rows(*small({})) if len(row.ours) == 3)
    assert row.theirs.endswith("to_qkv.weight")
    parts = row.to_ours(fused)
    assert [name.rsplit(".", 2)[1] for name in parts] == ["to_q", "to_k", "to_v"]
    assert [part[0, 0].item() for part in parts.values()] == [0, 8, 16]


# ------------------------------------------------------------------------------------ ablated models


@pytest.mark.parametrize("use", [*OFF.values(), BARE], ids=[*OFF, "all but text"])
def test_an_ablated_model_has_exactly_its_rows(use):
    unet, _ = small({"dim_mult": [1, 2, 2], "attn_scales": [1.0, 0.5]})
    model = on_meta(UNet, unet, use)
    mapping = unet_vgen.rows(unet, use)
    targets = [target for row in mapping for target in row.ours]
    assert len(targets) == len(set(targets)) and set(targets) == set(model.state_dict())
    assert_inverse(mapping, model)

    everything = {target for row in unet_vgen.rows(unet, FULL) for target in row.ours}
    assert everything - checkpoint.ablation(unet, use).dropped == set(targets)


# --------------------------------------------------------------------------------------------- errors


@pytest.fixture
def converted():
    unet, use = small({})
    mapping = unet_vgen.rows(unet, use)
    model = on_meta(UNet, unet, use)
    return mapping, rules.to_theirs(mapping, dict(checkpoint.random_state(model, seed=0))), model


def test_missing_and_unexpected_names_are_named(converted):
    mapping, theirs, _ = converted
    theirs["unknown.weight"] = theirs.pop("input_blocks.0.0.weight")
    with pytest.raises(ValueError, match=r"1 tensor missing \(input_blocks\.0\.0\.weight\)") as caught:
        rules.to_ours(mapping, theirs)
    assert "1 unexpected (unknown.weight)" in str(caught.value)


def test_a_tensor_that_cannot_be_reshaped_is_named(converted):
    mapping, theirs, _ = converted
    name = "input_blocks.0.1.proj_in.weight"
    with pytest.raises(ValueError, match=rf"{name} has shape .*last axis should be of length 1"):
        rules.to_ours(mapping, theirs | {name: theirs[name].expand(-1, -1, 2)})
    name = "local_temporal_encoder.layers.0.0.fn.to_qkv.weight"
    with pytest.raises(ValueError, match=rf"{name} has shape \(23, 4\).*divide into 3"):
        rules.to_ours(mapping, theirs | {name: theirs[name][:23]})


def test_the_strict_load_names_a_wrong_shape(converted):
    mapping, theirs, model = converted
    wrong = rules.to_ours(mapping, theirs | {"out.0.weight": torch.ones(7)})
    with pytest.raises(ValueError, match=r"norm_out\.weight has shape \(7,\), the model's is \(32,\)"):
        checkpoint.fill(model, wrong)


def test_long_lists_of_names_are_shortened(converted):
    mapping, theirs, _ = converted
    with pytest.raises(ValueError, match=rf"{len(theirs)} tensors missing .*, \.\.\.\) and 0 .*\(none\)"):
        rules.to_ours(mapping, {})


def test_what_diffusers_cannot_express_is_refused():
    unet, _ = small({"adapter_transformer_layers": 2})
    with pytest.raises(ValueError, match=r"unet\.concat_layers is 2"):
        unet_diffusers.rows(unet)
    with pytest.raises(ValueError, match=r"vae\.attention_resolutions"):
        vae_tables.diffusers_rows(config.VAE(attention_resolutions=(32,)))
    with pytest.raises(ValueError, match=r"vae\.embed_dim is 3 and vae\.z_channels 4"):
        vae_tables.diffusers_rows(config.VAE(embed_dim=3))


# ------------------------------------------------------------- planted mistakes that must be caught


@pytest.mark.parametrize("table", ["SKIP", "TEMPORAL_CONV", "TEMPORAL_SECOND", "CONCAT", "FRAME_ENCODER"])
def test_a_lost_table_row_is_caught(table, monkeypatch):
    monkeypatch.setattr(unet_vgen, table, getattr(unet_vgen, table)[1:])
    missing, unexpected = rules.audit(unet_vgen.rows(config.UNet(), FULL), manifest("vgen_unet_keys"))
    assert not missing and unexpected


def test_a_wrong_kind_is_caught(monkeypatch):
    plain = tuple((theirs, ours, "affine") for theirs, ours, _ in unet_vgen.TEMPORAL_CONV)
    monkeypatch.setattr(unet_vgen, "TEMPORAL_CONV", plain)
    converted = rules.to_ours(unet_vgen.rows(config.UNet(), FULL), manifest("vgen_unet_keys"))
    ours = checkpoint.build("unet", config.Config()).state_dict()
    assert shapes(converted) != shapes(ours)
    wrong = next(name for name in ours if converted[name].shape != ours[name].shape)
    assert math.prod(converted[wrong].shape) == ours[wrong].numel()
