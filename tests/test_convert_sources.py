"""Checkpoints as people have them: wrapped names, averaged weights, shards, our own exports, full disks."""

import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from i2vgen import cli
from i2vgen.adapt import lora
from i2vgen.files import checkpoint, records
from i2vgen.settings import config, merge
from i2vgen.settings.config import LAB
from weights_conversion import __main__ as command
from weights_conversion import rules, unet_vgen

UNET = config.UNet(
    base_width=16,
    width_multipliers=(1, 2),
    attention_levels=(True, False),
    blocks_per_level=1,
    head_width=8,
    first_temporal_heads=8,
    context_width=40,  # no multiple of the 16 heads of the usual text tower
    image_vector_width=24,
    norm_groups=8,
    local_grid=8,
)
SETTINGS = ["unet.head_width=8", "unet.norm_groups=8", "unet.local_grid=8"]


def run(*words):
    return cli.run(lambda: command.main([str(word) for word in words]))


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


@pytest.fixture(scope="module")
def ours():
    with torch.device("meta"):
        unet = checkpoint.construct("unet", config.Config(unet=UNET, clip=clip(), sample=sample()))
    return dict(checkpoint.random_state(unet, seed=1))


def clip():
    base = config.Clip()
    return config.Clip(embed_dim=24, vision=base.vision, text={**base.text, "width": 40, "heads": 8})


def sample():
    return config.Sample(width=64, height=64)


@pytest.fixture(scope="module")
def theirs(ours):
    return rules.to_theirs(unet_vgen.rows(UNET, config.Use()), ours)


@pytest.fixture
def converted(tmp_path, capsys):
    """converted(source, *words): its UNet under our names, and what was printed."""

    def convert(source, *words):
        status = run("convert", source, tmp_path / "out", *words, *SETTINGS)
        said = capsys.readouterr()
        assert status == 0, said.err
        return load_file(tmp_path / "out" / "unet.safetensors"), said.out

    return convert


# --- names


PREFIXED = {
    "module.": lambda name: f"module.{name}",
    "_orig_mod.": lambda name: f"_orig_mod.{name}",
    "model.": lambda name: f"model.{name}",
    "model.diffusion_model.": lambda name: f"model.diffusion_model.{name}",
    "_orig_mod.module.": lambda name: f"module._orig_mod.{name}",
    "network.": lambda name: f"network.{name}",
    "base_model.model.": lambda name: f"base_model.model.{name}",
    "_orig_mod. inside": lambda name: name.replace("middle_block.0.", "middle_block.0._orig_mod."),
}


@pytest.mark.parametrize("prefix", PREFIXED)
@pytest.mark.parametrize("wrapper", [None, "state_dict"])
def test_prefixes_of_wrappers_are_left_out_and_told(converted, ours, theirs, tmp_path, prefix, wrapper):
    state = {PREFIXED[prefix](name): tensor for name, tensor in theirs.items()}
    torch.save(state if wrapper is None else {wrapper: state, "step": 3}, tmp_path / "u.pth")
    got, said = converted(tmp_path / "u.pth")
    assert same(got, ours)
    assert f"note: u.pth: the names' prefix {prefix.split(' ')[0]} was left out" in said
    assert run("inspect", tmp_path / "u.pth") == 0


def test_tensors_without_the_prefix_are_told(converted, ours, theirs, tmp_path):
    state = {f"model.{name}": tensor for name, tensor in theirs.items()} | {"loss.weight": torch.ones(2)}
    torch.save(state, tmp_path / "u.pth")
    got, said = converted(tmp_path / "u.pth")
    assert same(got, ours) and "also left out: 1 tensor without it, such as loss.weight" in said


def test_names_both_with_and_without_a_prefix_are_refused(theirs, tmp_path, capsys):
    torch.save({**theirs, "_orig_mod.out.2.bias": torch.ones(4)}, tmp_path / "u.pth")
    assert run("convert", tmp_path / "u.pth", tmp_path / "out", *SETTINGS) == 2
    assert "holds tensors twice" in capsys.readouterr().err


# --- averaged weights


def flat(state):
    return {f"model_ema.{name.replace('.', '')}": 2 * tensor for name, tensor in state.items()}


def below(prefix, state):
    return {prefix + name: tensor for name, tensor in state.items()}


def doubled(state):
    return {name: 2 * tensor for name, tensor in state.items()}


BOTH = {
    "model and ema": lambda s: {"model": s, "ema": doubled(s), "optimizer": {"state": {0: torch.ones(3)}}},
    "state dicts": lambda s: {"state_dict": s, "ema_state_dict": doubled(s)},
    "params": lambda s: {"params": s, "params_ema": doubled(s)},
    "module inside": lambda s: {"model": {"module": s}, "model_ema": {"module": doubled(s)}},
    "beside the tensors": lambda s: {**s, "ema": doubled(s)},
    "flat names": lambda s: {"state_dict": s | flat(s)},
    "prefixes": lambda s: below("model.", s) | below("ema_model.module.", doubled(s)),
    "one prefix": lambda s: s | below("ema.", doubled(s)) | {"ema.decay": torch.tensor(0.9)},
    "SWA": lambda s: {"model": below("module.", s), "swa_model": below("module.", doubled(s))},
    "average": lambda s: {"model": s, "averaged_model": doubled(s)},
}


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("name", BOTH)
def test_averaged_weights_are_told_and_can_be_chosen(converted, ours, theirs, tmp_path, name, legacy):
    torch.save(BOTH[name](theirs), tmp_path / "u.pth", _use_new_zipfile_serialization=not legacy)
    got, said = converted(tmp_path / "u.pth")
    assert same(got, ours) and "also holds averaged weights" in said and "--ema takes them" in said
    got, said = converted(tmp_path / "u.pth", "--ema")
    assert same(got, doubled(ours)) and "the averaged weights were taken" in said


@pytest.mark.parametrize("wrapped", [True, False])
def test_averaged_weights_in_a_list_are_told(converted, ours, theirs, tmp_path, wrapped):
    """`shadow_params` of torch-ema and diffusers: nothing says which is which."""
    held = {"shadow_params": list(doubled(theirs).values()), "decay": 0.99}
    torch.save({"model": theirs, **({"ema": held} if wrapped else held)}, tmp_path / "u.pth")
    got, said = converted(tmp_path / "u.pth")
    assert same(got, ours) and "also holds averaged weights without names" in said


def test_averaged_weights_alone_are_taken_and_told(converted, ours, theirs, tmp_path):
    torch.save({"ema": theirs}, tmp_path / "u.pth")
    got, said = converted(tmp_path / "u.pth")
    assert same(got, ours) and "the averaged weights were taken (ema)" in said


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.complex64, torch.bool])
def test_numbers_that_are_no_weights_are_refused(theirs, tmp_path, capsys, dtype):
    name = next(iter(theirs))
    torch.save({**theirs, name: theirs[name].to(dtype)}, tmp_path / "u.pth")
    assert run("convert", tmp_path / "u.pth", tmp_path / "out", *SETTINGS) == 2
    assert f"is {str(dtype)[6:]}; quantised weights are not read" in capsys.readouterr().err


def test_ema_without_averaged_weights_is_refused(theirs, tmp_path, capsys):
    torch.save(theirs, tmp_path / "u.pth")
    assert run("convert", tmp_path / "u.pth", tmp_path / "out", "--ema", *SETTINGS) == 2
    assert "no source holds averaged weights" in capsys.readouterr().err


# --- shards


@pytest.fixture
def shards(theirs, tmp_path):
    folder, names = tmp_path / "shards", sorted(theirs)
    folder.mkdir()
    files = [f"unet-0000{i}-of-00002.safetensors" for i in (1, 2)]
    for i, file in enumerate(files):
        save_file({name: theirs[name].contiguous() for name in names[i::2]}, folder / file)
    weight_map = {name: files[i % 2] for i, name in enumerate(names)}
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "unet.safetensors.index.json").write_text(json.dumps(index))
    return folder


def test_a_folder_of_shards_is_joined_and_every_file_is_recorded(converted, ours, shards, tmp_path):
    got, _ = converted(shards)
    assert same(got, ours)
    origin = json.loads((tmp_path / "out" / "origin.json").read_text())
    assert {s["file"]: s["sha256"] for s in origin["sources"]} == {
        file.name: records.sha256(file) for file in shards.iterdir()
    }


def test_the_shards_of_a_diffusers_folder_are_recorded(states_for_diffusers, tmp_path):
    folder = tmp_path / "diffusers"
    assert run("export", states_for_diffusers, folder, "--layout", "diffusers", "--shard-size", "300K") == 0
    assert run("convert", folder, tmp_path / "out") == 0
    origin = json.loads((tmp_path / "out" / "origin.json").read_text())
    files = [*folder.rglob("*.safetensors"), *folder.rglob("*.index.json")]
    assert len(files) > 8
    assert sorted(s["sha256"] for s in origin["sources"]) == sorted(map(records.sha256, files))


def test_a_dangling_link_in_a_diffusers_folder_is_told(states_for_diffusers, tmp_path, capsys):
    folder = tmp_path / "diffusers"
    assert run("export", states_for_diffusers, folder, "--layout", "diffusers") == 0
    assert run("convert", folder, tmp_path / "out", "--variant", "fp16") == 2
    assert "leave the variant out" in capsys.readouterr().err
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.unlink()
    weights.symlink_to("../gone")
    assert run("convert", folder, tmp_path / "out") == 2
    assert "is a link to a file that is not there" in capsys.readouterr().err


def test_incomplete_shards_are_refused(shards, tmp_path, capsys):
    alone = shards / "unet-00001-of-00002.safetensors"
    assert run("convert", alone, tmp_path / "out", *SETTINGS) == 2
    assert "is one of 2 shards; give their index" in capsys.readouterr().err
    (shards / "unet-00002-of-00002.safetensors").rename(tmp_path / "gone")
    assert run("convert", shards, tmp_path / "out", *SETTINGS) == 2
    assert "needs unet-00002-of-00002.safetensors" in capsys.readouterr().err
    (shards / "unet.safetensors.index.json").unlink()
    assert run("convert", shards, tmp_path / "out", *SETTINGS) == 2
    assert "is one of 2 shards" in capsys.readouterr().err


# --- settings


def test_every_setting_that_shapes_do_not_show_is_used(ours, theirs, tmp_path, capsys):
    torch.save(theirs, tmp_path / "u.pth")
    words = [*SETTINGS, "unet.dropout=0", "unet.first_temporal_heads=8"]
    assert run("convert", tmp_path / "u.pth", tmp_path / "out", "--dtype", "float32", *words) == 0
    stored = merge.from_dict(merge.read_stored_settings(tmp_path / "out")).unet
    assert (stored.norm_groups, stored.local_grid, stored.dropout, stored.head_width) == (8, 8, 0, 8)
    assert run("convert", tmp_path / "u.pth", tmp_path / "no", "unet.head_width=8") == 2
    assert "unet.norm_groups" in capsys.readouterr().err


@pytest.mark.parametrize("word", ["unet.norm_groups=x", "unet.head_width=x", "unet.norm_groups=0", "unet=3"])
def test_impossible_overrides_are_one_message(theirs, tmp_path, capsys, word):
    torch.save(theirs, tmp_path / "u.pth")
    assert run("convert", tmp_path / "u.pth", tmp_path / "out", word) == 2
    assert capsys.readouterr().err.startswith("error:")


def test_settings_may_stand_before_and_after_options(theirs, tmp_path):
    torch.save(theirs, tmp_path / "u.pth")
    first, *rest = SETTINGS
    words = [
        "convert",
        first,
        tmp_path / "u.pth",
        "--dtype",
        "bfloat16",
        tmp_path / "out",
        "--partial",
        *rest,
    ]
    assert run(*words) == 0
    assert load_file(tmp_path / "out" / "unet.safetensors")["norm_out.bias"].dtype == torch.bfloat16


def test_a_single_part_does_not_ask_for_settings_of_the_others(theirs, tmp_path, capsys):
    torch.save(theirs, tmp_path / "u.pth")
    assert run("convert", tmp_path / "u.pth", tmp_path / "out", *SETTINGS) == 0
    stored = merge.from_dict(merge.read_stored_settings(tmp_path / "out"))
    assert stored.clip.text["width"] == 40 and stored.clip.embed_dim == 24
    capsys.readouterr()


# --- our own exports


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported") / "vgen"
    assert run("export", LAB, folder, "--layout", "vgen") == 0
    return folder


def parts_of(folder):
    return {part: dict(checkpoint.read_part(folder, part)) for part in checkpoint.PARTS}


def settings_of(folder):
    """Those that were added since the folder was written are at their defaults."""
    return merge.from_dict(merge.read_stored_settings(folder)).to_dict()


def test_the_shipped_model_comes_back_from_its_own_export(exported, tmp_path, capsys):
    assert run("convert", exported, tmp_path / "back") == 0
    want, got = parts_of(LAB), parts_of(tmp_path / "back")
    assert all(same(got[part], want[part]) for part in checkpoint.PARTS)
    assert settings_of(tmp_path / "back") == settings_of(LAB)
    origin = json.loads((tmp_path / "back" / "origin.json").read_text())
    assert origin["before"] == [checkpoint.read_origin(LAB)]
    assert run("verify", LAB, exported) == 0
    assert run("convert", exported, tmp_path / "no", "unet.norm_groups=4") == 2
    assert "unet.norm_groups is 4" in capsys.readouterr().err
    files = sorted(exported.iterdir())
    assert run("convert", *files, tmp_path / "by-file") == 0
    assert settings_of(tmp_path / "by-file") == settings_of(LAB)


@pytest.mark.parametrize("layout", ["vgen", "diffusers"])
def test_parts_that_a_layout_has_no_place_for_are_refused(tmp_path, capsys, layout):
    assert run("export", config.SHIPPED, tmp_path / "out", "--layout", layout) == 2
    message = capsys.readouterr().err
    assert "use.frame_positions is true" in message and "share the native folder itself" in message
    assert not (tmp_path / "out").exists()


def test_an_adapter_for_weights_that_diffusers_cannot_build_is_refused(tmp_path, capsys):
    unet = checkpoint.load("unet", merge.load_config(weights=LAB), device="cpu", dtype=torch.float32)
    lora.attach(unet, ["*.to_q"], rank=1).save(tmp_path / "adapter")
    assert (
        run("export", tmp_path / "adapter", tmp_path / "out", "--layout", "diffusers", f"weights={LAB}") == 2
    )
    message = capsys.readouterr().err
    assert "which diffusers cannot build: unet.first_temporal_heads is 2" in message
    assert not (tmp_path / "out").exists()


def test_without_its_record_an_export_comes_back_by_overrides(exported, tmp_path, capsys):
    bare = tmp_path / "bare"
    bare.mkdir()
    for file in exported.iterdir():
        content = torch.load(file, weights_only=True)
        torch.save({name: held for name, held in content.items() if name != "i2vgen"}, bare / file.name)
    assert run("convert", bare, tmp_path / "no") == 2
    assert "Traceback" not in capsys.readouterr().err
    stored = merge.read_stored_settings(LAB)
    words = [
        f"{section}.{name}={json.dumps(stored[section][name])}"
        for section, names in {
            "unet": ["head_width", "norm_groups", "local_grid", "first_temporal_heads", "dropout"],
            "vae": ["norm_groups", "scale"],
            "clip": ["words"],
        }.items()
        for name in names
    ]
    words += ["unet.temporal_conv_dropout=0", "unet.concat_dropout=0"]
    words += ["clip.text.heads=4", "clip.vision.head_width=24"]
    for wrong in ("clip.text.heads=x", "clip.vision.head_width=0", "unet.concat_heads=0", "clip.text=3"):
        name = wrong.partition("=")[0]
        others = [word for word in words if not word.startswith(name)]
        assert run("convert", bare, tmp_path / "no", *others, wrong) == 2
        assert name.split(".")[0] in (said := capsys.readouterr().err) and "Traceback" not in said
    assert run("convert", bare, tmp_path / "back", *words) == 0
    want, got = parts_of(LAB), parts_of(tmp_path / "back")
    assert all(same(got[part], want[part]) for part in checkpoint.PARTS)
    back = merge.from_dict(merge.read_stored_settings(tmp_path / "back"))
    before = merge.from_dict(stored)
    assert (back.unet, back.vae, back.clip, back.use) == (before.unet, before.vae, before.clip, before.use)


def test_a_damaged_record_is_one_message(exported, tmp_path, capsys):
    file = next(exported.glob("i2vgen_xl*"))
    content = torch.load(file, weights_only=True)
    for record in ("{", "[]", '{"format": 99, "settings": {}}', '{"format": 1, "settings": 5}'):
        torch.save(content | {"i2vgen": record}, tmp_path / "u.pth")
        assert run("convert", tmp_path / "u.pth", tmp_path / "out") == 2
        assert "its record `i2vgen` is not readable" in capsys.readouterr().err


# --- full disks and kills


SMALL_DISK = """
import resource, sys
from i2vgen import cli
from weights_conversion import __main__ as command
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
sys.exit(cli.run(lambda: command.main(sys.argv[1:])))
"""


@pytest.mark.parametrize("layout", ["vgen", "diffusers"])
def test_a_full_disk_ends_an_export_in_one_message(tmp_path, layout, root, states_for_diffusers):
    source = LAB if layout == "vgen" else states_for_diffusers
    done = subprocess.run(
        [sys.executable, "-c", SMALL_DISK, "export", source, tmp_path / "out", "--layout", layout],
        capture_output=True, text=True, cwd=root,
    )  # fmt: skip
    assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith("error: [Errno 27]"), done.stderr
    assert "Traceback" not in done.stderr and os.listdir(tmp_path) == []


@pytest.fixture
def states_for_diffusers(tmp_path_factory):
    """A native folder that diffusers' classes can express."""
    small = {"base_width": 32, "width_multipliers": (1, 2), "blocks_per_level": 1}
    cfg = config.Config(
        unet=config.UNet(**small, attention_levels=(True, False), head_width=16, first_temporal_heads=8,
                         context_width=64, image_vector_width=64),
        vae=config.VAE(**small),
        clip=config.Clip(
            embed_dim=64,
            vision={"image_size": 28, "patch_size": 14, "layers": 2, "width": 64, "head_width": 64},
            text={"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 2},
        ),
        sample=config.Sample(width=64, height=64, frames=2, steps=2),
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("native") / "weights"
    states = {
        part: dict(checkpoint.random_state(checkpoint.build(part, cfg), seed=3)) for part in checkpoint.PARTS
    }
    checkpoint.save(folder, states, cfg)
    return folder


KILLED = """
import os, signal, sys
from weights_conversion.export import export
kill = lambda done, total: os.kill(os.getpid(), signal.SIGKILL)
export(sys.argv[1], sys.argv[2], layout="vgen", on_bytes=kill)
"""


def test_what_a_killed_export_left_is_swept_by_the_next(tmp_path, root):
    done = subprocess.run([sys.executable, "-c", KILLED, LAB, tmp_path / "out"], cwd=root)
    assert done.returncode == -signal.SIGKILL
    (debris,) = os.listdir(tmp_path)
    assert debris.startswith(".out.writing-")
    assert run("export", LAB, tmp_path / "other", "--layout", "vgen") == 0
    assert os.listdir(tmp_path) == ["other"]
