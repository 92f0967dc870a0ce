"""Settings told by shapes: the whole lineage of official UNets, other sizes, and Stable Diffusion's half."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from i2vgen.files import checkpoint
from i2vgen.model.unet import UNet
from i2vgen.settings import config
from weights_conversion import rules, unet_vgen

KEYS = Path(__file__).parent / "goldens" / "keys"
SMALL = config.UNet(
    base_width=32,
    width_multipliers=(1, 2),
    blocks_per_level=1,
    attention_levels=(True, False),
    head_width=8,
    first_temporal_heads=3,
    context_width=12,
    image_vector_width=10,
)
V1, REFINER = config.V1_USE, config.REFINER_USE


def manifest(name):
    return {key: tuple(shape) for key, shape in json.loads((KEYS / f"{name}.json").read_text()).items()}


def on_meta(unet, use):
    with torch.device("meta"):
        return UNet(unet, use).state_dict()


def shapes_of(unet, use):
    theirs = rules.to_theirs(unet_vgen.rows(unet, use), on_meta(unet, use))
    return {name: tuple(tensor.shape) for name, tensor in theirs.items()}


# ------------------------------------------------------------------------------- the released sizes


@pytest.mark.parametrize(
    ("name", "family", "use"),
    [
        ("vgen_unet_keys", "released", config.Use()),
        ("image_to_video_v1_keys", "v1", V1),
        ("vid2vid_keys", "refiner", REFINER),  # SR600's manifest is the same, name by name
    ],
)
def test_the_lineage_maps_one_to_one(name, family, use):
    shapes = manifest(name)
    assert unet_vgen.lineage(shapes) == family
    assert unet_vgen.settings_from_shapes(shapes) == (config.UNet(), use)
    assert shapes_of(config.UNet(), use) == shapes


def test_the_key_sets_nest():
    refiner, v1, released = (
        set(manifest(n)) for n in ("vid2vid_keys", "image_to_video_v1_keys", "vgen_unet_keys")
    )
    assert refiner < v1 < released
    assert (len(refiner), len(v1), len(released)) == (1480, 1488, 1509)


# -------------------------------------------------------------------------------------- other sizes

VARIANTS = {
    "small": {},
    "one level": {"width_multipliers": (1,), "attention_levels": (True,)},
    "three blocks": {"blocks_per_level": 3},
    "coarse attention": {"width_multipliers": (1, 2, 2), "attention_levels": (False, False, True)},
    "attention nowhere": {"attention_levels": (False, False)},
    "equal levels": {"width_multipliers": (1, 1, 1), "attention_levels": (True, False, True)},
    "other conditions": {"num_global_tokens": 7, "local_widths": (16, 24), "concat_layers": 2},
    "other channels": {
        "in_channels": 5,
        "out_channels": 8,
        "image_channels": 3,
        "concat_channels": 6,
        "concat_hidden": 9,
        "concat_head_width": 5,
    },
}


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_every_size_is_told_by_its_shapes(changes):
    unet = dataclasses.replace(SMALL, **changes)
    shapes = shapes_of(unet, config.Use())
    assert unet_vgen.settings_from_shapes(shapes, head_width=8) == (unet, config.Use())


ABLATED = [
    *(
        dataclasses.replace(config.Use(), **{name: False})
        for name in config.STRUCTURAL_SWITCHES
        if name != "text" and getattr(config.Use(), name)
    ),
    config.Use(local_tokens=False, concat=False),
    config.Use(temporal_attention=False, concat=False),
    V1,
    REFINER,
]


@pytest.mark.parametrize("use", ABLATED, ids=str)
def test_switches_are_told_by_the_names(use):
    shapes = shapes_of(SMALL, use)
    unet, told = unet_vgen.settings_from_shapes(shapes, head_width=8)
    assert shapes_of(unet, told) == shapes
    if unet_vgen.lineage(shapes) != "v1":  # whether a prompt is read leaves no trace; v1 reads none
        assert told == use


def test_what_shapes_cannot_tell_is_asked_for():
    shapes = shapes_of(dataclasses.replace(SMALL, width_multipliers=(1, 3)), config.Use())
    with pytest.raises(ValueError, match=r"width 32 cannot have heads of width 64; give unet\.head_width"):
        unet_vgen.settings_from_shapes(shapes)
    with pytest.raises(ValueError, match="heads of width 7"):
        unet_vgen.settings_from_shapes(shapes, head_width=7)
    with pytest.raises(ValueError, match=r"inner width 24, not a multiple of unet\.head_width = 16"):
        unet_vgen.settings_from_shapes(shapes, head_width=16)


def test_what_is_no_unet_of_the_family_is_refused():
    shapes = shapes_of(SMALL, config.Use())
    with pytest.raises(ValueError, match="not a video UNet"):
        unet_vgen.settings_from_shapes({"encoder.conv_in.weight": (1,)})
    without = {name: shape for name, shape in shapes.items() if name != "out.2.weight"}
    with pytest.raises(ValueError, match=r"out\.2\.weight is missing"):
        unet_vgen.settings_from_shapes(without, head_width=8)
    uneven = {name: s for name, s in shapes.items() if not name.startswith("input_blocks.3.")}
    with pytest.raises(ValueError, match=r"the levels have \[1, 0\] blocks"):
        unet_vgen.settings_from_shapes(uneven, head_width=8)
    assert unet_vgen.lineage(["encoder.conv_in.weight"]) is None


# ------------------------------------------------------------------------- Stable Diffusion 2.1's half


def sd_state(unet):
    """A spatial UNet of the size under SD's names, with keyed numbers."""
    ours = {name: torch.empty(tensor.shape) for name, tensor in on_meta(unet, config.Use()).items()}
    ours["conv_in.weight"] = ours["conv_in.weight"][:, : unet.in_channels]
    state = rules.to_theirs(unet_vgen.sd_rows(unet), ours)
    return {name: torch.randn(tensor.shape) for name, tensor in state.items()}


def test_sd_inherits_682_tensors():
    rows = unet_vgen.sd_rows(config.UNet())
    model = on_meta(config.UNet(), config.Use())
    targets = [name for row in rows for name in row.ours]
    assert len(rows) == len(set(targets)) == 682
    assert sum(model[name].numel() for name in targets) == 863_871_684
    names = {row.theirs for row in rows}
    assert unet_vgen.lineage([*names, "time_embed.0.weight"]) == "sd"
    assert unet_vgen.lineage([unet_vgen.SD_PREFIX + name for name in [*names, "time_embed.0.weight"]]) == "sd"
    # the names where SD's lists are of another length than VGen's
    assert {
        "input_blocks.3.0.op.weight",
        "output_blocks.2.1.conv.weight",
        "output_blocks.5.2.conv.weight",
    } <= names
    assert "middle_block.2.in_layers.2.weight" in names and not any(n.startswith("time_embed") for n in names)


def test_sd_names_are_those_of_the_reference_script(sd_names):
    assert {row.theirs for row in unet_vgen.sd_rows(config.UNet())} == sd_names


@pytest.fixture
def sd_names():
    """SD 2.1's names by the rule of its own block lists, written out independently of the table."""
    res = ["in_layers.0", "in_layers.2", "emb_layers.1", "out_layers.0", "out_layers.3"]
    attention = [f"attn{n}.to_{x}.weight" for n in (1, 2) for x in "qkv"]
    inside = [*attention, *pairs("attn1.to_out.0", "attn2.to_out.0", "ff.net.0.proj", "ff.net.2")]
    inside += pairs("norm1", "norm2", "norm3")
    spatial = [*pairs("norm", "proj_in", "proj_out"), *(f"transformer_blocks.0.{name}" for name in inside)]
    names = set(pairs("input_blocks.0.0", "out.0", "out.2"))
    for i in (1, 2, 4, 5, 7, 8, 10, 11):
        names |= {
            f"input_blocks.{i}.0.{n}" for n in pairs(*res, *(["skip_connection"] if i in (4, 7) else []))
        }
        names |= {f"input_blocks.{i}.1.{n}" for n in spatial} if i < 10 else set()
    names |= {f"input_blocks.{i}.0.op.{kind}" for i in (3, 6, 9) for kind in ("weight", "bias")}
    names |= {f"middle_block.{i}.{n}" for i in (0, 2) for n in pairs(*res)}
    names |= {f"middle_block.1.{n}" for n in spatial}
    for i in range(12):
        names |= {f"output_blocks.{i}.0.{n}" for n in pairs(*res, "skip_connection")}
        names |= {f"output_blocks.{i}.1.{n}" for n in spatial} if i > 2 else set()
    return names | set(pairs("output_blocks.2.1.conv", "output_blocks.5.2.conv", "output_blocks.8.2.conv"))


def pairs(*modules):
    return [f"{module}.{kind}" for module in modules for kind in ("weight", "bias")]


@pytest.mark.parametrize(
    "changes", [{}, {"width_multipliers": (1, 2, 2), "attention_levels": (True, True, False)}]
)
def test_sd_there_and_back(changes):
    unet = dataclasses.replace(SMALL, **changes)
    theirs = sd_state(unet)
    ours = rules.to_ours(unet_vgen.sd_rows(unet), theirs)
    back = rules.to_theirs(unet_vgen.sd_rows(unet), ours)
    assert theirs.keys() == back.keys() and all(torch.equal(theirs[name], back[name]) for name in theirs)


def test_the_new_input_channels_start_at_zero():
    plain = torch.randn(32, 4, 3, 3)
    wide = unet_vgen.widen_conv_in(plain, SMALL, config.Use())
    assert wide.shape == on_meta(SMALL, config.Use())["conv_in.weight"].shape
    assert torch.equal(wide[:, :4], plain) and not wide[:, 4:].any()
    assert torch.equal(unet_vgen.widen_conv_in(plain, SMALL, REFINER), plain)
    with pytest.raises(ValueError, match=r"reads 8 channels; unet\.in_channels is 4"):
        unet_vgen.widen_conv_in(wide, SMALL, config.Use())


def test_an_initialised_unet_is_complete():
    """Inherited tensors over fresh ones fill the model strictly."""
    unet, use = SMALL, config.Use()
    with torch.device("meta"):
        model = UNet(unet, use)
    state = dict(checkpoint.random_state(model, seed=0))
    inherited = rules.to_ours(unet_vgen.sd_rows(unet), sd_state(unet))
    inherited["conv_in.weight"] = unet_vgen.widen_conv_in(inherited["conv_in.weight"], unet, use)
    checkpoint.fill(model, state | inherited)
