"""The converter's command line: all sources, exact inverses, errors that leave no files."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from i2vgen.files import checkpoint
from i2vgen.settings import config, merge
from weights_conversion import __main__ as command
from weights_conversion import clip as clip_tables
from weights_conversion import rules, unet_diffusers, unet_vgen
from weights_conversion import vae as vae_tables
from weights_conversion.convert import convert
from weights_conversion.verify import verify

CONFIG = config.Config(
    unet=config.UNet(
        base_width=32,
        width_multipliers=(1, 2),
        attention_levels=(True, False),
        blocks_per_level=1,
        head_width=16,
        first_temporal_heads=8,
        context_width=64,
        image_vector_width=64,
    ),
    vae=config.VAE(base_width=32, width_multipliers=(1, 2), blocks_per_level=1),
    clip=config.Clip(
        embed_dim=64,
        vision={"image_size": 28, "patch_size": 14, "layers": 2, "width": 64, "head_width": 64},
        text={"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 2},
    ),
    sample=config.Sample(width=64, height=64, frames=2, steps=2),
)
HEADS = ["unet.head_width=16"]


@pytest.fixture(scope="session")
def states():
    """Random weights of every part, under our names."""
    return {
        part: dict(checkpoint.random_state(checkpoint.build(part, CONFIG), seed=3))
        for part in checkpoint.PARTS
    }


@pytest.fixture(scope="session")
def official(states, tmp_path_factory):
    """The three official files, with small weights."""
    folder = tmp_path_factory.mktemp("official")
    unet = rules.to_theirs(unet_vgen.rows(CONFIG.unet, CONFIG.use), states["unet"])
    vae = rules.to_theirs(vae_tables.rows(CONFIG.vae), states["vae"])
    torch.save({"state_dict": unet, "step": 854500}, folder / "unet.pth")
    other = {
        "model.diffusion_model.input_blocks.0.0.weight": torch.zeros(32, 4, 3, 3),
        "betas": torch.zeros(4),
    }
    torch.save({"state_dict": {vae_tables.PREFIX + k: v for k, v in vae.items()} | other}, folder / "sd.ckpt")
    torch.save(states["clip"], folder / "clip.bin")
    return folder


@pytest.fixture
def native(official, tmp_path):
    convert(
        [official / "unet.pth", official / "sd.ckpt", official / "clip.bin"],
        tmp_path / "native",
        overrides=HEADS,
    )
    return tmp_path / "native"


def run(*words) -> int:
    """Run the command as from a shell -> exit status."""
    from i2vgen import cli

    return cli.run(lambda: command.main([str(word) for word in words]))


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


def test_official_files_become_a_model(official, states, tmp_path, capsys):
    out = tmp_path / "out"
    files = [official / name for name in ("unet.pth", "sd.ckpt", "clip.bin")]
    assert run("convert", *files, out, *HEADS) == 0
    report = capsys.readouterr().out
    assert "CLIP with both towers" in report and "missing" not in report and "sha256" in report
    for part in checkpoint.PARTS:
        assert same(load_file(out / f"{part}.safetensors"), states[part])
    stored = merge.from_dict(merge.read_stored_settings(out))
    assert stored.unet == CONFIG.unet and stored.use == CONFIG.use
    assert stored.vae == dataclasses.replace(CONFIG.vae) and stored.clip == CONFIG.clip
    origin = json.loads((out / "origin.json").read_text())
    assert origin["extra"]["unet.pth"]["step"] == 854500
    assert {s["file"] for s in origin["sources"]} == {"unet.pth", "sd.ckpt", "clip.bin"}
    assert any("non-commercial" in note for note in origin["licence"])


def test_a_single_part_converts_and_the_report_lists_the_missing_ones(official, tmp_path, capsys):
    assert run("convert", official / "unet.pth", tmp_path / "out", *HEADS) == 0
    assert "missing for generation: vae, clip" in capsys.readouterr().out
    assert checkpoint.missing_parts(tmp_path / "out") == ["vae", "clip"]


def test_vgen_round_trip_is_the_identity(native, official, tmp_path):
    assert run("export", native, tmp_path / "vgen", "--layout", "vgen") == 0
    for name, original in (
        ("i2vgen_xl_00854500.pth", "unet.pth"),
        ("open_clip_pytorch_model.bin", "clip.bin"),
    ):
        got = torch.load(tmp_path / "vgen" / name, weights_only=True)
        want = torch.load(official / original, weights_only=True)
        assert got.get("step") == want.get("step")
        assert same(got.get("state_dict", got), want.get("state_dict", want))
    vae = torch.load(tmp_path / "vgen" / "v2-1_512-ema-pruned.ckpt", weights_only=True)["state_dict"]
    want = torch.load(official / "sd.ckpt", weights_only=True)["state_dict"]
    assert same(vae, {k: v for k, v in want.items() if k.startswith(vae_tables.PREFIX)})
    # torch.save writes whole storages; a view of a mapped file must not include the whole file
    assert (tmp_path / "vgen" / "i2vgen_xl_00854500.pth").stat().st_size < 1.2 * (
        official / "unet.pth"
    ).stat().st_size


@pytest.mark.parametrize("flags", [[], ["--no-fold"]], ids=["folded", "plain"])
def test_diffusers_round_trip_is_the_identity(native, states, tmp_path, flags):
    assert run("export", native, tmp_path / "diffusers", "--layout", "diffusers", *flags) == 0
    assert run("convert", tmp_path / "diffusers", tmp_path / "again") == 0
    for part in ("unet", "vae"):
        assert same(load_file(tmp_path / "again" / f"{part}.safetensors"), states[part])
    clip = load_file(tmp_path / "again" / "clip.safetensors")
    kept = [name for name in clip if name not in clip_tables.ABSENT]
    assert same({k: clip[k] for k in kept}, {k: states["clip"][k] for k in kept})
    assert verify(native, tmp_path / "again").passed, "what transformers' towers lack is not compared"
    lines = "".join(verify(tmp_path / "diffusers", native).lines)
    assert ("hold in conv_in, 2 and 1; diffusers itself" in lines) == (not flags)
    stored = merge.from_dict(merge.read_stored_settings(tmp_path / "again"))
    assert stored.unet.head_width == 16 and stored.use.concat_gain == 2.0 and stored.vae.scale == 0.18215


def test_sharded_and_cast(native, states, tmp_path):
    assert run("convert", native, tmp_path / "out", "--dtype", "bfloat16", "--shard-size", "300K") == 0
    index = json.loads((tmp_path / "out" / "unet.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    got = dict(checkpoint.read_part(tmp_path / "out", "unet"))
    assert same(got, {k: v.bfloat16() for k, v in states["unet"].items()})
    assert verify(tmp_path / "out", tmp_path / "out").passed


def test_eight_bits_are_off_by_half_a_step_at_most(native, states, tmp_path):
    out = tmp_path / "out"
    assert run("convert", native, out, "dtype=int8", "shard_size=100K") == 0
    state = states["unet"]
    got = dict(checkpoint.read_part(out, "unet"))
    assert got.keys() == state.keys()
    rounded = 0
    for name, exact in state.items():
        if exact.ndim > 1 and exact.numel() >= 1024:
            step = exact.abs().amax(dim=tuple(range(1, exact.ndim)), keepdim=True) / 127
            assert ((got[name] - exact).abs() <= 0.6 * step).all(), name
            rounded += exact.numel()
        else:
            assert torch.equal(got[name], exact.half()), name
    assert rounded > 0.9 * sum(t.numel() for t in state.values())
    sizes = {f: sum(p.stat().st_size for p in f.glob("unet*.safetensors")) for f in (native, out)}
    assert sizes[out] < 0.35 * sizes[native]
    # All that reads a folder reads these: the converter, the exporter, and the check of both.
    assert run("convert", out, tmp_path / "wide", "dtype=float32") == 0
    assert same(dict(checkpoint.read_part(tmp_path / "wide", "unet")), {n: t.float() for n, t in got.items()})
    assert run("export", out, tmp_path / "theirs", "--layout", "vgen") == 0
    assert verify(out, out).passed


def test_eight_bits_without_their_scale_are_refused(native, tmp_path):
    assert run("convert", native, tmp_path / "out", "dtype=int8") == 0
    file = tmp_path / "out" / "vae.safetensors"
    held = load_file(file)
    gone = next(name for name in held if name.endswith(".scale"))
    save_file({name: tensor for name, tensor in held.items() if name != gone}, file)
    with pytest.raises(ValueError, match=r"stored in eight bits and lacks its scale"):
        dict(checkpoint.read_part(tmp_path / "out", "vae"))


def test_a_native_source_passes_on_its_record(native, tmp_path):
    """Shapes do not show the origin: a model trained from scratch has no foreign licence terms."""
    assert run("convert", native, tmp_path / "again", "--dtype", "bfloat16") == 0
    again = json.loads((tmp_path / "again" / "origin.json").read_text())
    assert again["before"] == [json.loads((native / "origin.json").read_text())]
    assert any("non-commercial" in note for note in again["licence"])
    (native / "origin.json").write_text(json.dumps({"trained": "unet", "steps": 3}))
    assert run("convert", native, tmp_path / "own", "--dtype", "bfloat16") == 0
    own = json.loads((tmp_path / "own" / "origin.json").read_text())
    assert own["before"] == [{"trained": "unet", "steps": 3}]
    assert not any("non-commercial" in note for note in own["licence"])


def test_dry_run_writes_nothing(official, tmp_path, capsys):
    assert run("convert", official / "unet.pth", tmp_path / "out", *HEADS, "--dry-run") == 0
    assert "nothing written" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_an_ablated_configuration_names_what_it_drops(official, states, tmp_path, capsys):
    out = tmp_path / "out"
    assert run("convert", official / "unet.pth", out, *HEADS, "use.concat=false", "use.fps=false") == 0
    assert "dropped" in capsys.readouterr().out
    origin = json.loads((out / "origin.json").read_text())
    assert (
        "fps_embedding.0.weight" in origin["dropped"] and "local_image_concat.0.weight" in origin["dropped"]
    )
    got = load_file(out / "unet.safetensors")
    assert torch.equal(got["conv_in.weight"], states["unet"]["conv_in.weight"][:, :4])
    assert not any(name.startswith(("stem.concat", "stem.fps")) for name in got)
    cfg = merge.from_dict(merge.read_stored_settings(out))
    checkpoint.fill(checkpoint.build("unet", cfg), got)


def test_spatial_initialisation_from_stable_diffusion(states, tmp_path, capsys):
    cfg = config.Config()
    rows = unet_vgen.sd_rows(cfg.unet)
    meta = checkpoint.build("unet", cfg).state_dict()
    assert len(rows) == 682
    assert all(name in meta for row in rows for name in row.ours)


def test_spatial_initialisation_must_be_requested(official):
    with pytest.raises(ValueError, match="spatial-init"):
        convert([_sd_unet(official.parent)], official.parent / "never")


def _sd_unet(folder):
    path = folder / "sd_unet.safetensors"
    save_file({"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(32, 4, 3, 3)}, path)
    return path


# --- errors: exit status 2, one line, nothing written, the old result unchanged

MISTAKES = {
    "a tensor is missing": (lambda s: s.pop("out.2.bias"), "missing"),
    "a tensor too many": (lambda s: s.update(extra=torch.zeros(2)), "unexpected"),
    "another shape": (lambda s: s.update({"out.0.weight": torch.zeros(7)}), "shape"),
    "NaN": (lambda s: s["out.0.weight"].fill_(float("nan")), "NaN"),
    "no local branch": (
        lambda s: [s.pop(k) for k in list(s) if k.startswith("local_")],
        "local branch",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_errors_leave_no_files(official, tmp_path, capsys, name):
    spoil, words = MISTAKES[name]
    content = torch.load(official / "unet.pth", weights_only=True)
    spoil(content["state_dict"])
    torch.save(content, tmp_path / "unet.pth")
    old = tmp_path / "out"
    convert([official / "unet.pth"], old, overrides=HEADS)
    before = {p.name: p.read_bytes() for p in old.iterdir()}
    assert run("convert", tmp_path / "unet.pth", old, *HEADS) == 2
    error = capsys.readouterr().err
    import re

    assert error.count("error:") == 1 and "Traceback" not in error and re.search(words, error), error
    assert {p.name: p.read_bytes() for p in old.iterdir()} == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "unet.pth"]
    assert run("convert", tmp_path / "unet.pth", tmp_path / "new", *HEADS) == 2
    assert not (tmp_path / "new").exists()


def test_nonfinite_and_partial_if_requested(official, tmp_path, capsys):
    content = torch.load(official / "unet.pth", weights_only=True)
    content["state_dict"]["out.0.weight"].fill_(float("nan"))
    torch.save(content, tmp_path / "nan.pth")
    assert run("convert", tmp_path / "nan.pth", tmp_path / "a", *HEADS, "--allow-nonfinite") == 0
    assert load_file(tmp_path / "a" / "unet.safetensors")["norm_out.weight"].isnan().all()
    del content["state_dict"]["out.0.weight"]
    torch.save(content, tmp_path / "part.pth")
    assert run("convert", tmp_path / "part.pth", tmp_path / "b", *HEADS, "--partial") == 0
    assert "freshly initialised 1 tensor: norm_out.weight" in capsys.readouterr().out
    assert torch.equal(load_file(tmp_path / "b" / "unet.safetensors")["norm_out.weight"], torch.ones(32))


def test_the_same_part_twice_is_refused(official, tmp_path):
    with pytest.raises(ValueError, match="found twice"):
        convert([official / "unet.pth", official / "unet.pth"], tmp_path / "out", overrides=HEADS)


def test_a_full_disk_leaves_the_old_result(official, tmp_path, monkeypatch):
    out = tmp_path / "out"
    convert([official / "unet.pth"], out, overrides=HEADS)
    before = {p.name: p.read_bytes() for p in out.iterdir()}

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_safetensors", full)
    assert run("convert", official / "unet.pth", out, *HEADS) == 2
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


# --- verify and inspect


def test_verify_names_the_first_difference(native, official, tmp_path, capsys):
    assert run("verify", native, official / "unet.pth", *HEADS) == 1  # one side lacks parts of the other
    state = load_file(native / "unet.safetensors")
    state["mid1.res.conv1.weight"][0, 0, 0, 0] += 1e-3
    other = tmp_path / "other"
    checkpoint.save(other, {"unet": state}, merge.from_dict(merge.read_stored_settings(native)))
    capsys.readouterr()
    assert run("verify", official / "unet.pth", other, *HEADS) == 1
    assert "1 of" in (said := capsys.readouterr().out) and "mid1.res.conv1.weight" in said
    convert([official / "unet.pth"], tmp_path / "fresh", overrides=HEADS)
    assert run("verify", official / "unet.pth", tmp_path / "fresh", *HEADS) == 0


@pytest.mark.reference
def test_verify_compares_with_diffusers(native, tmp_path, capsys):
    pytest.importorskip("diffusers")
    assert run("export", native, tmp_path / "d", "--layout", "diffusers", "--no-fold") == 0
    assert run("verify", native, tmp_path / "d", "--reference", "diffusers") == 0
    assert "outputs in float64" in capsys.readouterr().out
    unet = tmp_path / "d" / "unet" / "diffusion_pytorch_model.safetensors"
    state = load_file(unet)
    state["mid_block.resnets.0.conv1.bias"] += 0.1
    save_file(state, unet, metadata={"format": "pt"})
    assert run("verify", native, tmp_path / "d", "--reference", "diffusers") == 1
    assert "first divergence at mid1.res.conv1" in capsys.readouterr().out


def test_inspect_names_the_contents(official, native, capsys):
    assert run("inspect", official / "unet.pth") == 0
    assert "UNet in vgen layout" in (said := capsys.readouterr().out) and "854500" in said
    assert run("inspect", native) == 0


def test_diffusers_rows_and_vgen_rows_agree_on_ours():
    ours = {n for row in unet_vgen.rows(CONFIG.unet, CONFIG.use) for n in row.ours}
    assert ours == {n for row in unet_diffusers.rows(CONFIG.unet) for n in row.ours}


# --- single components, other lineages


@pytest.mark.parametrize("flags", [[], ["--no-fold"]], ids=["folded", "plain"])
def test_a_component_folder_provides_its_settings(native, states, tmp_path, flags):
    assert run("export", native, tmp_path / "d", "--layout", "diffusers", *flags) == 0
    for part, folders in (("unet", ["unet"]), ("vae", ["vae"]), ("clip", ["text_encoder", "image_encoder"])):
        assert run("convert", *(tmp_path / "d" / name for name in folders), tmp_path / part) == 0
        got = load_file(tmp_path / part / f"{part}.safetensors")
        kept = [name for name in got if name not in clip_tables.ABSENT]
        assert (
            same({k: got[k] for k in kept}, {k: states[part][k] for k in kept}) and len(kept) >= len(got) - 2
        )
    assert merge.from_dict(merge.read_stored_settings(tmp_path / "unet")).unet == CONFIG.unet


def test_a_full_transformers_clip_keeps_its_projection(states, tmp_path):
    text, vision = clip_tables.transformers_configs(CONFIG.clip)
    folder = tmp_path / "clip_model"
    folder.mkdir()
    card = {"text_config": text, "vision_config": vision, "projection_dim": 64, "model_type": "clip"}
    (folder / "config.json").write_text(json.dumps(card))
    state = rules.to_ours(clip_tables.full_rows(CONFIG.clip), states["clip"])
    save_file({k: v.contiguous() for k, v in state.items()}, folder / "model.safetensors")
    assert run("convert", folder, tmp_path / "out") == 0
    assert same(load_file(tmp_path / "out" / "clip.safetensors"), states["clip"])


SR600 = dataclasses.replace(config.REFINER_USE, skip_filter="sr600")
LINEAGES = {  # their switches, and the settings that no tensor shows
    "v1": (config.V1_USE, {"schedule.kind": "linear_sd", "sample.width": 448, "sample.noise_offset": 0.1}),
    "refiner": (config.REFINER_USE, {"schedule.kind": "logsnr_cosine", "refine.noise_level": 600}),
    "sr600": (SR600, {"schedule.kind": "logsnr_cosine", "refine.noise_level": 700, "refine.guidance": 9.0}),
}


@pytest.mark.parametrize("name", LINEAGES)
def test_earlier_lineages_convert_and_invert(name, tmp_path, capsys):
    use, expected = LINEAGES[name]
    shape = {"sample": dataclasses.replace(CONFIG.sample, height=80)} if name != "v1" else {}
    cfg = dataclasses.replace(CONFIG, use=use, **shape)
    state = dict(checkpoint.random_state(checkpoint.build("unet", cfg), seed=5))
    theirs = rules.to_theirs(unet_vgen.rows(cfg.unet, cfg.use), state)
    torch.save({"state_dict": theirs}, tmp_path / "base.pth")
    said = ["use.skip_filter=sr600"] if name == "sr600" else []
    assert run("convert", tmp_path / "base.pth", tmp_path / "out", *HEADS, *said) == 0
    assert ("that this refiner is" in capsys.readouterr().out) == (name != "v1")
    assert same(load_file(tmp_path / "out" / "unet.safetensors"), state)
    origin = json.loads((tmp_path / "out" / "origin.json").read_text())
    assert any("never redistribute" in note for note in origin["licence"])
    stored = merge.from_dict(merge.read_stored_settings(tmp_path / "out"))
    assert stored.use == cfg.use
    for setting, value in expected.items():
        section, field = setting.split(".")
        assert getattr(getattr(stored, section), field) == value
    assert ("no blur" in stored.refine_suffix) == (name == "sr600")
    assert run("export", tmp_path / "out", tmp_path / "back", "--layout", "vgen") == 0
    (file,) = (tmp_path / "back").iterdir()
    assert same(torch.load(file, weights_only=True)["state_dict"], theirs)
    assert run("export", tmp_path / "out", tmp_path / "no", "--layout", "diffusers") == 2
    assert "error:" in capsys.readouterr().err and not (tmp_path / "no").exists()


# --- a native folder as a source


def test_a_native_source_is_audited_like_any_other(native, states, tmp_path, capsys):
    assert run("convert", native, tmp_path / "less", "use.concat=false") == 0
    assert "dropped" in capsys.readouterr().out
    got = load_file(tmp_path / "less" / "unet.safetensors")
    assert torch.equal(got["conv_in.weight"], states["unet"]["conv_in.weight"][:, :4])
    assert not any(name.startswith("stem.concat") for name in got)
    for setting in ("unet.base_width=64", "unet.head_width=8", "vae.scale=0.5", "clip.text.heads=2"):
        assert run("convert", native, tmp_path / "no", setting) == 2
        assert setting.split("=")[0] in (said := capsys.readouterr().err) and "native" in said
        assert not (tmp_path / "no").exists()


def test_flags_without_effect_are_refused(native, official, tmp_path, capsys):
    for flag in (["--compat", "diffusers"], ["--variant", "fp16"], ["--spatial-init"]):
        assert run("convert", native, tmp_path / "out", *flag) == 2
        assert flag[0] in capsys.readouterr().err
    assert run("export", native, tmp_path / "out", "--layout", "vgen", "--no-fold") == 2
    assert not (tmp_path / "out").exists()


def test_an_unwritable_output_fails_before_anything_is_read(official, tmp_path, monkeypatch, capsys):
    from weights_conversion import readers

    monkeypatch.setattr(readers, "open_file", lambda *_, **__: pytest.fail("a source was read"))
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "below", official):
        assert run("convert", official / "unet.pth", out, *HEADS) == 2
        assert "error:" in capsys.readouterr().err


def test_a_place_that_cannot_be_written_is_told_before_anything_is_read(
    official, native, tmp_path, monkeypatch, capsys
):
    from weights_conversion import readers

    monkeypatch.setattr(readers, "open_file", lambda *_, **__: pytest.fail("a source was read"))
    monkeypatch.setattr(checkpoint, "read_part", lambda *_, **__: pytest.fail("a source was read"))

    def refuse(self, **how):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(type(tmp_path), "touch", refuse)
    assert run("convert", official / "unet.pth", tmp_path / "out", *HEADS) == 2
    assert "Read-only file system" in capsys.readouterr().err
    assert run("export", native, tmp_path / "out", "--layout", "vgen") == 2
    assert "Read-only file system" in capsys.readouterr().err


def test_a_folder_with_other_files_is_not_replaced(native, tmp_path, capsys):
    project = tmp_path / "project"
    project.mkdir()
    (project / "settings.json").write_text('{"editor": 1}')  # not of weights
    (project / "mine.py").write_text("precious")
    assert run("convert", native, project) == 2
    assert "exists and is no weights folder" in capsys.readouterr().err
    assert run("convert", native, tmp_path / "copy") == 0
    (tmp_path / "copy" / "clip.mp4").write_text("precious")
    assert run("convert", native, tmp_path / "copy") == 2
    assert "also holds clip.mp4, which would be lost" in capsys.readouterr().err
    assert (project / "mine.py").exists() and (tmp_path / "copy" / "clip.mp4").exists()


def test_a_source_inside_the_output_is_kept(native, tmp_path, capsys):
    assert run("convert", native, tmp_path / "copy") == 0
    assert run("convert", tmp_path / "copy" / "unet.safetensors", tmp_path / "copy") == 2
    assert "would overwrite" in capsys.readouterr().err
    assert run("convert", tmp_path / "copy", tmp_path / "copy", "--dtype", "float16") == 0  # in place


def test_verify_compares_settings_too(native, tmp_path, capsys):
    stored = merge.from_dict(merge.read_stored_settings(native))
    other = dataclasses.replace(stored, vae=dataclasses.replace(stored.vae, scale=0.5))
    parts = {part: dict(checkpoint.read_part(native, part)) for part in checkpoint.PARTS}
    checkpoint.save(tmp_path / "other", parts, other)
    assert run("verify", native, tmp_path / "other") == 1
    assert "vae.scale 0.18215 and 0.5" in capsys.readouterr().out


@pytest.mark.reference
def test_verify_runs_diffusers_with_the_weights_as_stored(native, tmp_path, capsys):
    pytest.importorskip("diffusers")
    assert run("export", native, tmp_path / "folded", "--layout", "diffusers") == 0
    assert run("verify", native, tmp_path / "folded", "--reference", "diffusers") == 0
    assert "note: the first side" not in capsys.readouterr().out
    assert run("export", native, tmp_path / "plain", "--layout", "diffusers", "--no-fold") == 0
    assert run("verify", native, tmp_path / "plain", "--reference", "diffusers") == 0
    assert "use.concat_gain=2.0, but diffusers uses 1.0" in capsys.readouterr().out
