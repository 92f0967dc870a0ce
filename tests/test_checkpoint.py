"""checkpoint.py: weights folders that hold exactly the model, and loading that accepts nothing else."""

import dataclasses
import json
import os

import pytest
import torch
from safetensors.torch import load_file

from i2vgen.adapt import lora
from i2vgen.files import checkpoint
from i2vgen.files.safefile import write_safetensors
from i2vgen.memory import storage as eight_bits
from i2vgen.model.unet import UNet
from i2vgen.settings import config, merge
from i2vgen.settings.config import STRUCTURAL_SWITCHES, Config, Use

RELEASED_PARAMETERS = 1_420_469_224


@pytest.fixture
def settings(tiny, small):
    """A configuration whose UNet is the small one; its CLIP widths fit."""
    unet = dataclasses.replace(
        small, context_width=tiny.unet.context_width, image_vector_width=tiny.unet.image_vector_width
    )
    return dataclasses.replace(tiny, unet=unet)


@pytest.fixture
def state(settings):
    return dict(checkpoint.random_state(checkpoint.build("unet", settings), seed=0))


@pytest.fixture
def folder(tmp_path, settings, state):
    """A weights folder that holds a UNet."""
    return checkpoint.save(tmp_path / "weights", {"unet": state}, settings, origin={"source": "a test"})


def load_unet(folder, settings, dtype=torch.float32):
    return checkpoint.load(
        "unet", dataclasses.replace(settings, weights=str(folder)), device="cpu", dtype=dtype
    )


def same_bits(a, b):
    return a.keys() == b.keys() and all(
        a[n].dtype == b[n].dtype and a[n].shape == b[n].shape and a[n].equal(b[n]) for n in a
    )


def names_beside(folder):
    return sorted(path.name for path in folder.parent.iterdir())


# --- there and back


@pytest.mark.parametrize("shard_bytes", [None, 1_000_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_what_is_saved_comes_back_bit_for_bit(tmp_path, settings, state, dtype, shard_bytes):
    state = {name: tensor.to(dtype) for name, tensor in state.items()}
    folder = checkpoint.save(tmp_path / "w", {"unet": state}, settings, shard_bytes=shard_bytes)
    assert same_bits(load_unet(folder, settings, dtype).state_dict(), state)
    shards = list(folder.glob("unet-*-of-*.safetensors"))
    if shard_bytes is None:
        assert not shards and (folder / "unet.safetensors").exists()
    else:
        assert len(shards) > 2 and not (folder / "unet.safetensors").exists()
        index = json.loads((folder / "unet.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == sum(t.nbytes for t in state.values())
        for path in shards:
            held = load_file(path)
            assert all(index["weight_map"][name] == path.name for name in held)
            assert len(held) == 1 or sum(t.nbytes for t in held.values()) <= shard_bytes


def test_models_and_state_dicts_save_alike(tmp_path, settings, state):
    unet = checkpoint.build("unet", settings)
    checkpoint.fill(unet, state)
    one = checkpoint.save(tmp_path / "a", {"unet": unet}, settings)
    two = checkpoint.save(tmp_path / "b", {"unet": state}, settings)
    assert (one / "unet.safetensors").read_bytes() == (two / "unet.safetensors").read_bytes()


def test_all_parts_of_a_model(tmp_path, tiny_model):
    folder = checkpoint.save(tmp_path / "w", tiny_model.parts, tiny_model.config)
    assert checkpoint.missing_parts(folder) == []
    loaded = merge.load_config(weights=str(folder))
    for part, model in tiny_model.parts.items():
        again = checkpoint.load(part, loaded, device="cpu", dtype=torch.float32)
        assert same_bits(checkpoint.inner(again).state_dict(), checkpoint.inner(model).state_dict())
        assert not again.training and not any(p.requires_grad for p in again.parameters())


@pytest.mark.parametrize("storage", ["int8", "float8", "adapter", "compiled"])
def test_a_model_that_stores_its_weights_otherwise_saves_what_it_computes_with(
    tmp_path, settings, state, storage
):
    unet = checkpoint.build("unet", settings)
    checkpoint.fill(unet, state)
    if storage == "adapter":
        torch.nn.init.normal_(lora.attach(unet, ["mid1.spatial.*"], rank=2).part("mid1.spatial.proj_in").b)
    elif storage == "compiled":
        unet.compile()
    else:
        eight_bits.store(unet.requires_grad_(False), storage)
    folder = checkpoint.save(tmp_path / "w", {"unet": unet}, settings)
    loaded = load_unet(folder, settings)
    changed = [path for path, weight in loaded.named_parameters() if not weight.equal(state[path])]
    assert all(weight.equal(unet.get_submodule(path.rpartition(".")[0]).weight)
               for path, weight in loaded.named_parameters() if path in changed)  # fmt: skip
    assert bool(changed) == (storage != "compiled")


def test_settings_ride_along_without_the_job(tmp_path, settings, state):
    job = dataclasses.replace(
        settings,
        weights="secret",
        image=("a",),
        prompt=("b",),
        negative_prompt="no: stripes",
        runtime=config.Runtime(device="cpu", dtype="float64"),
    )
    folder = checkpoint.save(tmp_path / "w", {"unet": state}, job, origin={"note": "é"})
    stored = merge.read_stored_settings(folder)
    assert set(stored) & {*config.LITERALS, "runtime"} == {*config.KEPT_TEXTS}
    loaded = merge.load_config(weights=str(folder))
    kept = {"negative_prompt": "no: stripes", "runtime": config.Runtime()}
    assert loaded == dataclasses.replace(settings, weights=str(folder), **kept)
    assert merge.load_config(None, ["negative_prompt="], weights=str(folder)).negative_prompt == ""
    assert json.loads((folder / checkpoint.ORIGIN_FILE).read_text()) == {"note": "é"}


def test_weights_are_cast_on_the_way_in(folder, settings, state):
    loaded = load_unet(folder, settings, torch.bfloat16).state_dict()
    assert same_bits(loaded, {name: tensor.bfloat16() for name, tensor in state.items()})


# --- strictness


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s.pop("conv_in.bias"), "1 tensor: missing conv_in.bias"),
        (lambda s: s.update(extra=torch.zeros(1)), "1 tensor: unexpected extra"),
        (lambda s: s.update({"conv_in.bias": torch.zeros(3)}), "1 tensor: conv_in.bias has shape (3,)"),
        (lambda s: s.clear(), "missing stem.fps.linear1.weight"),
    ],
    ids=["missing", "unexpected", "shape", "empty"],
)
def test_what_does_not_fit_is_listed(settings, state, change, words):
    change(state)
    unet = checkpoint.build("unet", settings)
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        checkpoint.fill(unet, state, source="the file")
    assert str(caught.value).startswith("the file does not fit") and words in str(caught.value)


def test_several_problems_are_counted(settings, state):
    for name in ("conv_in.bias", "conv_out.bias"):
        state.pop(name)
    state["extra"] = torch.zeros(1)
    with pytest.raises(ValueError, match=r"in 3 tensors: unexpected extra; missing .*; missing "):
        checkpoint.fill(checkpoint.build("unet", settings), state)


def test_weights_of_other_settings_do_not_fit(folder, settings):
    other = dataclasses.replace(settings, unet=dataclasses.replace(settings.unet, base_width=64))
    with pytest.raises(ValueError, match=r"unet of .*weights does not fit .*the model's is"):
        load_unet(folder, other)


def test_a_full_checkpoint_has_no_leftovers_for_a_full_model(settings):
    assert checkpoint.ablation(settings.unet, Use()) == checkpoint.NO_CHANGE


def test_missing_parts_are_named(folder, settings, tmp_path):
    assert checkpoint.missing_parts(folder) == ["vae", "clip"]
    loaded = dataclasses.replace(settings, weights=str(folder))
    with pytest.raises(ValueError, match=r"lacks the vae; it needs vae\.safetensors"):
        checkpoint.load("vae", loaded, device="cpu", dtype=torch.float32)
    with pytest.raises(ValueError, match="there is no part 'refiner'"):
        checkpoint.build("refiner", settings)
    with pytest.raises(ValueError, match="there is no part 'refiner'"):
        checkpoint.save(tmp_path / "other", {"refiner": {}}, settings)


# --- damage


@pytest.mark.parametrize(
    "damage",
    [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b"\xff" * 64],
    ids=["cut", "empty", "junk"],
)
def test_a_damaged_file(folder, settings, damage):
    path = folder / "unet.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=r"unet\.safetensors is missing or damaged .*convert the weights"):
        load_unet(folder, settings)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "3", "{}", *(f'{{"weight_map": {bad}}}' for bad in ("[]", '{"a": 3}', '{"a": [1]}'))],
)
def test_a_damaged_index(folder, settings, text):
    (folder / "unet.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match=r"index\.json is damaged .*convert the weights again"):
        load_unet(folder, settings)


@pytest.mark.parametrize("name", ["../unet.safetensors", "/etc/passwd", "sub/unet.safetensors"])
def test_an_index_that_points_outside_its_folder(folder, settings, name):
    index = {"weight_map": {"conv_in.weight": name}}
    (folder / "unet.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=rf"names files outside its folder: {name}"):
        load_unet(folder, settings)


def test_an_index_whose_shard_is_gone(tmp_path, settings, state):
    folder = checkpoint.save(tmp_path / "w", {"unet": state}, settings, shard_bytes=2_000_000)
    next(folder.glob("unet-00002-*")).unlink()
    with pytest.raises(ValueError, match=r"unet-00002-.* is missing or damaged"):
        load_unet(folder, settings)


def test_a_pickle_is_never_opened(folder, settings, tmp_path):
    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "sprung"), "w"))

    torch.save({"conv_in.weight": Trap()}, folder / "unet.safetensors")
    with pytest.raises(ValueError, match="missing or damaged"):
        load_unet(folder, settings)
    assert not (tmp_path / "sprung").exists()


# --- whole or not at all


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()], ids=["error", "interrupt"])
@pytest.mark.parametrize("old", [True, False])
def test_a_save_that_fails_midway_changes_nothing(tmp_path, settings, state, monkeypatch, error, old):
    folder = tmp_path / "weights"
    if old:
        checkpoint.save(folder, {"unet": state}, settings)
    before = {p.name: p.read_bytes() for p in folder.iterdir()} if old else None
    calls = []

    def failing(path, entries, metadata=None, on_bytes=None):
        calls.append(path)
        if len(calls) > 1:
            path.write_bytes(b"half")
            raise error
        write_safetensors(path, entries, metadata=metadata)

    monkeypatch.setattr(checkpoint, "write_safetensors", failing)
    with pytest.raises(type(error)):
        checkpoint.save(folder, {"unet": state}, settings, shard_bytes=1_000_000)
    assert len(calls) == 2
    assert names_beside(folder) == (["weights"] if old else [])
    if old:
        assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


def test_a_replacement_that_fails_brings_the_old_folder_back(folder, settings, state, monkeypatch):
    before = (folder / "unet.safetensors").read_bytes()
    rename = os.rename

    def failing(source, target):
        if ".writing-" in source.name:
            raise OSError("busy")
        return rename(source, target)

    monkeypatch.setattr(os, "rename", failing)
    changed = {name: tensor + 1 for name, tensor in state.items()}
    with pytest.raises(OSError, match="busy"):
        checkpoint.save(folder, {"unet": changed}, settings)
    assert (folder / "unet.safetensors").read_bytes() == before
    assert names_beside(folder) == ["weights"]


def test_an_old_folder_is_replaced_completely(folder, settings, state):
    changed = {name: tensor + 1 for name, tensor in state.items()}
    checkpoint.save(folder, {"unet": changed}, settings, shard_bytes=1_000_000)
    assert same_bits(load_unet(folder, settings).state_dict(), changed)
    assert not (folder / "unet.safetensors").exists() and names_beside(folder) == ["weights"]


def test_a_model_card_stays_when_its_weights_are_replaced(folder, settings, state):
    (folder / "README.md").write_text("words of mine", encoding="utf-8")
    checkpoint.save(folder, {"unet": state}, settings)
    assert (folder / "README.md").read_text(encoding="utf-8") == "words of mine"
    assert checkpoint.missing_parts(folder) == ["vae", "clip"]


def test_other_folders_and_files_are_not_touched(tmp_path, settings, state):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").write_bytes(b"cat")
    (tmp_path / "file").write_bytes(b"text")
    for name in ("photos", "file"):
        with pytest.raises(ValueError, match="exists and is no weights folder"):
            checkpoint.save(tmp_path / name, {"unet": state}, settings)
    assert (tmp_path / "photos" / "cat.png").read_bytes() == b"cat"
    assert (tmp_path / "file").read_bytes() == b"text"
    (tmp_path / "new").mkdir()
    checkpoint.save(tmp_path / "new", {"unet": state}, settings)
    checkpoint.save(tmp_path / "deep" / "er", {"unet": state}, settings)
    assert (tmp_path / "deep" / "er" / "unet.safetensors").exists()


# --- ablated models from full weights


PARTS = [name for name in STRUCTURAL_SWITCHES if getattr(Use(), name)]
ADDITIONS = [name for name in STRUCTURAL_SWITCHES if name not in PARTS]


def without(name):
    return dataclasses.replace(Use(), **{name: False})


@pytest.mark.parametrize("name", PARTS)
def test_an_ablated_model_loads_full_weights_minus_what_it_drops(folder, settings, state, name):
    loaded = load_unet(folder, dataclasses.replace(settings, use=without(name))).state_dict()
    built = checkpoint.build("unet", dataclasses.replace(settings, use=without(name))).state_dict()
    expected = {key: state[key][tuple(slice(n) for n in t.shape)] for key, t in built.items()}
    assert same_bits(loaded, expected) and len(expected) <= len(state)
    assert name == "text" or sum(map(torch.numel, expected.values())) < sum(map(torch.numel, state.values()))


@pytest.mark.parametrize("name", STRUCTURAL_SWITCHES)
def test_an_ablated_checkpoint_comes_back(tmp_path, settings, name):
    use = dataclasses.replace(Use(), **{name: name in ADDITIONS})
    ablated = dataclasses.replace(settings, use=use)
    state = dict(checkpoint.random_state(checkpoint.build("unet", ablated), seed=1))
    folder = checkpoint.save(tmp_path / "w", {"unet": state}, ablated)
    loaded = merge.load_config(weights=str(folder))
    assert loaded.use == ablated.use
    assert same_bits(load_unet(folder, loaded).state_dict(), state)


@pytest.mark.parametrize("name", ADDITIONS)
def test_an_addition_starts_as_built_beside_full_weights(folder, settings, state, name):
    """And what has learned goes with its switch, without a word."""
    use = dataclasses.replace(Use(), **{name: True})
    loaded = merge.load_config(None, [f"use.{name}=true"], weights=str(folder))
    assert loaded.use == use
    with pytest.warns(UserWarning, match=r"lacks \d+ tensors that the settings add .* starts untrained"):
        unet = load_unet(folder, loaded)
    torch.manual_seed(0)
    fresh, got = checkpoint.construct("unet", loaded).state_dict(), unet.state_dict()
    assert same_bits(got, {**fresh, **state})
    saved = checkpoint.save(folder.parent / "added", {"unet": unet}, loaded)
    plain = merge.load_config(None, [f"use.{name}=false"], weights=str(saved))
    assert same_bits(load_unet(saved, plain).state_dict(), state)


def test_a_full_model_does_not_load_ablated_weights(tmp_path, settings):
    ablated = dataclasses.replace(settings, use=without("fps"))
    state = dict(checkpoint.random_state(checkpoint.build("unet", ablated), seed=1))
    folder = checkpoint.save(tmp_path / "w", {"unet": state}, ablated)
    with pytest.raises(ValueError, match=r"in 4 tensors: missing stem\.fps"):
        load_unet(folder, settings)


# --- meta and random


@pytest.mark.parametrize("part", checkpoint.PARTS)
def test_nothing_stays_on_meta(tiny, tiny_model, part):
    built = checkpoint.build(part, tiny)
    assert all(t.is_meta for t in (*built.parameters(), *built.buffers()))
    filled = tiny_model.parts[part]
    tensors = {**dict(filled.named_parameters()), **dict(filled.named_buffers())}
    assert tensors and not [name for name, tensor in tensors.items() if tensor.is_meta]
    assert {tuple(t.shape) for t in tensors.values()} == {
        tuple(t.shape) for t in (*built.parameters(), *built.buffers())
    }


def test_the_causal_mask_is_made_anew(tiny_model):
    open_clip = pytest.importorskip("open_clip")
    clip = tiny_model.config.clip
    real = open_clip.CLIP(
        clip.embed_dim, open_clip.CLIPVisionCfg(**clip.vision), open_clip.CLIPTextCfg(**clip.text)
    )
    assert tiny_model.clip.model.attn_mask.equal(real.attn_mask)


def test_the_released_unet_has_its_parameters():
    unet = checkpoint.build("unet", Config())
    assert all(p.is_meta for p in unet.parameters())
    assert sum(p.numel() for p in unet.parameters()) == RELEASED_PARAMETERS


def test_random_weights_follow_from_name_and_shape_alone(settings):
    unet = checkpoint.build("unet", settings)
    one = dict(checkpoint.random_state(unet, seed=0))
    torch.manual_seed(99)
    again = dict(checkpoint.random_state(UNet(settings.unet, settings.use), seed=0))
    assert same_bits(one, again)
    wider = checkpoint.build(
        "unet", dataclasses.replace(settings, unet=dataclasses.replace(settings.unet, blocks_per_level=2))
    )
    both = dict(checkpoint.random_state(wider, seed=0))
    shared = [n for n in one if n in both and one[n].shape == both[n].shape]
    assert len(shared) > 100 and all(one[n].equal(both[n]) for n in shared)
    assert not any(one[n].equal(t) for n, t in checkpoint.random_state(unet, seed=1))
    assert len({tuple(t.flatten()[:4].tolist()) for t in one.values()}) == len(one)  # no name's numbers twice


def test_random_weights_hide_nothing(settings):
    for name, tensor in checkpoint.random_state(checkpoint.build("unet", settings), seed=0):
        assert tensor.isfinite().all() and tensor.count_nonzero() == tensor.numel(), name


def test_building_on_meta_leaves_other_tensors_alone():
    """A plugin may fill tensors of its own while a network is built."""
    with checkpoint.on_meta():
        assert torch.nn.Linear(2, 3).weight.is_meta
        filled = torch.zeros(3, device="cpu").fill_(2)
        torch.nn.init.normal_(drawn := torch.zeros(3, device="cpu"))
    assert filled.tolist() == [2, 2, 2] and drawn.all()
