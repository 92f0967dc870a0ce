"""Clips that are encoded once: the same training as from videos, never mixed with other parts, resumable."""

import json
import shutil
import time

import media_files
import numpy as np
import pytest
import torch

from i2vgen.files import checkpoint, video
from i2vgen.files.rows import RowFile
from i2vgen.files.safefile import Entry, write_safetensors
from i2vgen.settings.config import LAB
from i2vgen.settings.merge import load_config
from i2vgen.training import data, diffusion, prepare, prepared
from i2vgen.training.settings import Bucket, load_settings

# Smaller than the shipped model's size; its parts fit.
SIZE = ("width=16", "height=16", "frames=4", "fps=8", "device=cpu")
RUN = (*SIZE, "train.steps=3", "train.batch=2", "train.log_every=1", "train.warmup=1", "train.save_every=3",
       "train.encode_chunk=4", "train.learning_rate=1e-3", "sample.steps=2")  # fmt: skip
CPU = torch.device("cpu")


def moving(count, number):
    y, x = np.mgrid[:32, :40]
    frames = [
        np.stack([6 * x + 9 * number * k, 7 * y + 20 * number, x + y + 30 * k], -1) for k in range(count)
    ]
    return np.stack(frames).astype(np.uint8)


def write_clips(folder, *, frames=4, count=6):
    """Clips of all kinds, with two captions for the second one and a side in those of the third."""
    folder.mkdir()
    rows = []
    for number in range(count):
        name = f"{number}" + (".mp4", ".gif", ".webm", ".webp", "")[number % 5]
        if number % 5 in (0, 2):
            codec = "libx264" if number % 5 == 0 else "libvpx-vp9"
            media_files.write_video(folder / name, moving(frames, number), rate=8, codec=codec)
        else:
            video.save(moving(frames, number), folder / name, fps=8)
        said = {1: ["a pattern", "a second caption"], 2: ["it turns clockwise"]}.get(
            number, [f"clip {number}"]
        )
        rows += [{"file": name, "caption": said}]
    (folder / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Clips exactly as long as a training clip, so that every crop is the same."""
    return write_clips(tmp_path_factory.mktemp("clips") / "videos")


@pytest.fixture
def run(run_script, tmp_path, monkeypatch):
    """run(name, *words) -> what the script printed; refused(...) -> what it said against the words."""
    monkeypatch.chdir(tmp_path)

    def run(name, *words, status=0):
        ended, said = run_script(f"{name}.py", *words)
        assert (ended or 0) == status, said
        return said

    run.refused = lambda *words: run(*words, status=2)
    return run


def log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def tree(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# --- the same training


@pytest.mark.parametrize(
    "words",
    [(), ("train.text_encoder=true",), ("train.lora_rank=2", "train.text_dropout=0.5")],
    ids=["UNet", "text tower", "adapter"],
)
def test_losses_are_those_of_the_videos_to_the_bit(run, clips, tmp_path, words):
    """Several captions, mirror images and all file formats included; without a configuration file."""
    run("prepare", f"data={clips}", "output=prepared", *SIZE, "batch=2", "encode_chunk=4", "flip=true")
    common = (f"weights={LAB}", *RUN, "train.flip=true", *words)
    for source, name in ((clips, "raw"), ("prepared", "from prepared")):
        run("train", f"train.data={source}", f"output={name}", *common)
    assert log(tmp_path / "raw") == log(tmp_path / "from prepared")
    if "lora" in str(words):
        assert (tmp_path / "from prepared/adapter/adapter_model.safetensors").is_file()
        return
    for part in checkpoint.PARTS:
        held = [
            dict(checkpoint.read_part(tmp_path / name / "weights", part)) for name in ("raw", "from prepared")
        ]
        assert held[0].keys() == held[1].keys()
        assert all(torch.equal(held[0][name], held[1][name]) for name in held[0])


def test_other_batches_and_chunks_change_only_the_rounding(run, clips, tmp_path):
    run("prepare", f"data={clips}", "output=prepared", *SIZE)
    for source in (clips, "prepared"):
        run(
            "train",
            f"weights={LAB}",
            f"train.data={source}",
            f"output=of {source.name if source == clips else source}",
            *RUN,
        )
    raw, quick = (log(tmp_path / name) for name in ("of videos", "of prepared"))
    for a, b in zip(raw, quick, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)


def test_half_precision_is_half_the_size_and_close(run, clips, tmp_path):
    for name, words in (("whole", []), ("half", ["dtype=float16"])):
        run("prepare", f"data={clips}", f"output={name}", *SIZE, *words)
        run("train", f"weights={LAB}", f"train.data={name}", f"output=of {name}", *RUN)
    sizes = [
        sum(p.stat().st_size for p in (tmp_path / name / "shards").iterdir()) for name in ("whole", "half")
    ]
    assert sizes[1] < 0.6 * sizes[0]
    for a, b in zip(log(tmp_path / "of whole"), log(tmp_path / "of half"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-2)
    assert log(tmp_path / "of whole") != log(tmp_path / "of half")


def test_vae_and_clip_are_not_loaded_for_prepared_data(run, clips, monkeypatch):
    run("prepare", f"data={clips}", "output=prepared", *SIZE)
    loaded, load = [], checkpoint.load
    monkeypatch.setattr(
        checkpoint, "load", lambda part, *given, **how: loaded.append(part) or load(part, *given, **how)
    )
    run("train", f"weights={LAB}", "train.data=prepared", "output=out", *RUN)
    assert loaded == ["unet"]


# --- what is stored


def test_buckets_crops_captions_and_mirror_images(run, tmp_path):
    long = write_clips(tmp_path / "long", frames=11)
    video.save(moving(5, 9), long / "short.gif", fps=8)
    with (long / "captions.jsonl").open("a") as file:
        file.write('{"file": "short.gif", "caption": "short"}\n')
    words = ("frame_lengths=[4,8]", "sample_fps=[8,8]", "crops=3", "flip=true")
    said = run("prepare", "data=long", "output=prepared", *SIZE, *words)
    # 6 clips in 3 crops of 4 and of 8 frames, all but the one that says "clockwise" twice; the short one in
    # the two crops of 4 frames that it has, twice.
    assert "holds 7 clips in 70 crops" in said
    skipped = [json.loads(line) for line in (tmp_path / "prepared/skipped.jsonl").read_text().splitlines()]
    assert [one["file"] for one in skipped] == ["short.gif"] and "too short for 8" in skipped[0]["reason"]
    both = ["train.frame_lengths=[4,8]", "train.sample_fps=[8,8]", "train.flip=true"]
    config, train = load_settings(None, [f"weights={LAB}", "train.data=prepared", *SIZE, *both])
    source = data.open_source(config, train)
    seen = [source(Bucket(4, 8, 1), [k]) for k in range(400)]
    kinds = {caption: {one.mean.sum().item() for one in seen if one.captions == (caption,)}
             for caption in {one.captions[0] for one in seen}}  # fmt: skip
    assert {caption: len(found) for caption, found in kinds.items()} == {
        "a pattern": 6, "a second caption": 6, "it turns clockwise": 3, "clip 0": 6, "clip 3": 6, "clip 4": 6,
        "clip 5": 6, "short": 4,
    }  # fmt: skip
    assert {source(Bucket(8, 8, 1), [k]).mean.shape for k in range(9)} == {(1, 8, 8, 4, 4)}
    starts = RowFile(tmp_path / "prepared/shards/000000.safetensors", "").read("start.0")[:3]
    assert starts.tolist() == sorted(set(starts.tolist())) and starts[0] < 2 <= starts[1] < 5 <= starts[2]


def test_bad_clips_are_skipped_and_counted(run, clips, tmp_path):
    shutil.copytree(clips, "videos")
    (tmp_path / "videos/0.mp4").write_bytes(b"no video")
    said = run("prepare", "data=videos", "output=prepared", *SIZE)
    assert "holds 5 clips in 5 crops; 1 clip skipped, skipped.jsonl says why" in said
    line = json.loads((tmp_path / "prepared/skipped.jsonl").read_text())
    assert line["file"] == "0.mp4" and "cannot be read as a video" in line["reason"]
    config, train = load_settings(None, [f"weights={LAB}", "train.data=prepared", *SIZE])
    source = data.open_source(config, train)
    assert "clip 0" not in {source(Bucket(4, 8, 1), [k]).captions[0] for k in range(20)}


# --- killed, and by several processes


def test_a_killed_run_goes_on_and_processes_share_the_shards(run, clips, tmp_path, monkeypatch):
    words = (f"data={clips}", *SIZE, "batch=2")
    run("prepare", *words, "output=whole")
    whole = tree(tmp_path / "whole")
    assert sorted(whole) == [
        "index.safetensors",
        "prepared.json",
        *(f"shards/00000{k}.safetensors" for k in range(3)),
    ]

    write, written = prepare.write, []

    def killed(path, *given):
        written.append(path)
        if len(written) == 2:
            raise KeyboardInterrupt
        write(path, *given)

    monkeypatch.setattr(prepare, "write", killed)
    run("prepare", *words, "output=cut", status=130)
    assert not (tmp_path / "cut/index.safetensors").exists()
    config, train = load_settings(None, [f"weights={LAB}", "train.data=cut", *SIZE])
    with pytest.raises(ValueError, match=r"cut is not fully prepared; run `i2vgen prepare` again"):
        data.open_source(config, train)
    monkeypatch.setattr(prepare, "write", write)
    (tmp_path / "cut/shards/000000.safetensors").write_bytes(b"cut short")  # what a crash can leave behind
    run("prepare", *words, "output=cut")
    assert tree(tmp_path / "cut") == whole
    for name in ("index.safetensors", "shards/000002.safetensors", "prepared.json"):  # as a message advises
        (tmp_path / "cut" / name).write_bytes(b"damaged")
    (tmp_path / "cut/prepared.json").unlink()
    run("prepare", *words, "output=cut")
    assert tree(tmp_path / "cut") == whole
    assert "holds 6 clips" in run("prepare", *words, "output=cut")  # nothing is left to do
    (tmp_path / "cut/prepared.json").unlink()
    run("prepare", *words, "output=cut", "seed=1")  # makes all anew: the files are of another job
    assert [name for name, held in tree(tmp_path / "cut").items() if whole[name] == held] == []

    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, said in ((0, "1 of 3 shards are still being made"), (1, "holds 6 clips")):
        monkeypatch.setenv("RANK", str(rank))
        assert said in run("prepare", *words, "output=two")
    assert tree(tmp_path / "two") == whole


@pytest.mark.slow  # spawned processes import PyTorch first
def test_workers_change_nothing(run, clips, tmp_path):
    shutil.copytree(clips, "videos")
    (tmp_path / "videos/0.mp4").write_bytes(b"no video")
    for name, workers in (("one", 0), ("several", 2)):
        said = run(
            "prepare", "data=videos", f"output=prepared by {name}", *SIZE, "batch=2", f"workers={workers}"
        )
        assert "1 clip skipped" in said
        run(
            "train",
            f"weights={LAB}",
            "train.data=videos",
            f"output={name}",
            *RUN,
            f"train.workers={workers}",
        )
    assert tree(tmp_path / "prepared by one") == tree(tmp_path / "prepared by several")
    assert log(tmp_path / "one") == log(tmp_path / "several")


# --- never mixed


@pytest.fixture(scope="module")
def ready(clips, tmp_path_factory):
    """The clips, prepared once for the tests below."""
    from i2vgen.__main__ import main

    out = tmp_path_factory.mktemp("ready") / "prepared"
    assert main(["prepare", f"data={clips}", f"output={out}", *SIZE, "batch=2"]) == 0
    return out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("width=32",), "sample.width is 32 here but 16 there"),
        (("preprocess.crop=official",), "preprocess.crop is official here but clean there"),
        (("frames=2",), "holds clips of 4 frames at 8 fps, but the run asks for 2 at 8"),
        (("train.part=vae",), "holds no pictures, which train.part=vae needs"),
        (("train.workers=2",), "train.workers = 2 decode videos, but train.data="),
        (("train.flip=true",), "was prepared without mirror images"),
        (("train.validate=nowhere",), "train.validate=nowhere is not a folder"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(run, ready, words, message):
    given = [word for word in SIZE if word.partition("=")[0] not in words[0]]
    said = run.refused("train", f"weights={LAB}", f"train.data={ready}", "output=out", *given, *words)
    assert message in said


def test_prepared_clips_want_the_weights_that_encoded_them(run, ready):
    for flag in ([], ["--plan"]):
        said = run("train", f"train.data={ready}", "output=run", "train.batch=1", *flag, status=2)
        assert "was prepared with weights=" in said and "give them here too" in said, said


def test_changed_clips_are_prepared_into_another_folder(run, clips, ready, tmp_path):
    shutil.copytree(clips, "videos")
    shutil.copytree(ready, "prepared")
    captions = next((tmp_path / "videos").glob("captions.*"))
    captions.write_text(captions.read_text().replace("it turns", "it goes"))
    said = run.refused("prepare", "data=videos", "output=prepared", *SIZE, "batch=2")
    assert "videos have changed since output=prepared was begun; delete that" in said


@pytest.mark.parametrize(
    ("part", "tensor", "what"),
    [
        ("vae", "quant_conv.bias", "the VAE of"),
        ("clip", "visual.proj", "the CLIP image tower of"),
        ("clip", "ln_final.bias", "the CLIP text tower of"),
    ],
)
def test_another_vae_or_clip_is_refused(run, ready, tmp_path, part, tensor, what):
    parts = {name: dict(checkpoint.read_part(LAB, name)) for name in checkpoint.PARTS}
    checkpoint.save("same", parts, load_config(None, weights=LAB), shard_bytes=10**6)
    run("train", "weights=same", f"train.data={ready}", "output=out", *RUN, "train.steps=1")
    parts[part][tensor] = parts[part][tensor] + 0.01
    checkpoint.save("other", parts, load_config(None, weights=LAB))
    said = run.refused("train", "weights=other", f"train.data={ready}", "output=out 2", *RUN)
    assert f"{what} weights=other is another than that of" in said


def test_damaged_data_is_named(run, ready, tmp_path):
    for name, harm in (
        ("shards/000001.safetensors", lambda path: path.write_bytes(path.read_bytes()[:-9])),
        ("shards/000001.safetensors", lambda path: path.unlink()),
        ("index.safetensors", lambda path: path.write_bytes(path.read_bytes()[:99])),
        ("prepared.json", lambda path: path.write_text("{")),
        ("prepared.json", lambda path: path.write_text('{"format": 9}')),
    ):
        shutil.rmtree(tmp_path / "copy", ignore_errors=True)
        shutil.copytree(ready, tmp_path / "copy")
        harm(tmp_path / "copy" / name)
        said = run.refused("train", f"weights={LAB}", "train.data=copy", "output=out", *SIZE)
        assert name in said and ("run `i2vgen prepare` again with the same words" in said or "format" in said)
        assert "Traceback" not in said


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["output=out"], "no videos given; name a folder with data="),
        (["data={clips}"], "no output given"),
        (["data=world", "output=out"], "data=world is drawn, not read"),
        (["data={ready}", "output=out"], "is prepared already"),
        (["data=nowhere", "output=out"], "data=nowhere is not a folder; give a folder of videos"),
        (["data={clips}", "output={clips}"], "is the folder of videos itself"),
        (["data={clips}", "output=out", "crops=0"], "crops=0; give 1 to 1000"),
        (["data={clips}", "output=out", "dtype=int8"], "dtype=int8; give float32 or float16"),
        (["data={clips}", "output=out", "frames=9"], "none of its clips (6) can be used"),
        (["data={clips}", "output=out", "weights=random", "width=64", "height=64"], "lacks a VAE or CLIP"),
        (["data={clips}", "output={ready}", "crops=2"], "crops is 2 here but 1 there; choose another output"),
        (["data={clips}", "output={ready}", "width=32"], "sample.width is 32 here but 16 there"),
        (["data={clips}", "output=."], "holds other files, such as mine.txt"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_before_any_work(run, ready, clips, tmp_path, words, message):
    (tmp_path / "mine.txt").write_text("mine")
    before = tree(ready)
    words = [word.format(clips=clips, ready=ready) for word in words]
    size = [word for word in SIZE if word.partition("=")[0] not in {w.partition("=")[0] for w in words}]
    assert message in run.refused("prepare", *size, "batch=2", *words)
    assert tree(ready) == before and (tmp_path / "mine.txt").read_text() == "mine"


def test_fewer_clips_than_processes_are_refused(run, clips, ready, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "7")
    assert "gives 6 clips to 7 processes" in run.refused("prepare", f"data={clips}", "output=out", *SIZE)
    config, train = load_settings(None, [f"weights={LAB}", f"train.data={ready}", *SIZE])
    with pytest.raises(ValueError, match="gives 6 clips to 7 processes"):
        data.refuse_too_few(data.open_source(config, train), train, 7)


# --- many clips, and fast


def test_many_clips_start_quickly_in_little_memory(ready, tmp_path):
    """An index of 100,000 clips; a million takes ten times as much of both."""
    count, per = 100_000, 500
    facts = prepared.read_facts(ready) | {"count": count, "per_shard": per}
    (tmp_path / "shards").mkdir()
    for number in range(count // per):
        (tmp_path / prepared.shard_name(number)).write_bytes(b"12345678")
    (tmp_path / prepared.FACTS).write_text(json.dumps(facts))
    ones = torch.ones(count, dtype=torch.int32)
    index = {"rows.0": ones, "captions": ones, "flipped": torch.zeros(count, dtype=torch.uint8)}
    index |= {"name": torch.randint(0, 2**32, (count,)), "shard_bytes": torch.full((count // per,), 8)}
    index["negative"] = RowFile(ready / prepared.INDEX, "").read("negative")
    entries = [Entry(n, tuple(t.shape), t.dtype, lambda t=t: t) for n, t in index.items()]
    write_safetensors(tmp_path / prepared.INDEX, entries, metadata={"plan": prepared.plan(facts)})
    config, train = load_settings(
        None, [f"weights={LAB}", f"train.data={tmp_path}", *SIZE, "train.validate=0.1"]
    )
    began = time.process_time()
    source = data.open_source(config, train)
    assert time.process_time() - began < 1
    arrays = [a for a in vars(source).values() if isinstance(a, np.ndarray)]
    arrays += source.rows + source.first_row
    assert sum(a.nbytes for a in arrays) < 50 * count
    assert (len(source), len(source.held_out)) == (90_000, 10_000)


def test_only_what_is_asked_for_is_read(ready):
    """The last shards that were read stay open; a source can be sent to another process all the same."""
    import pickle

    config, train = load_settings(None, [f"weights={LAB}", f"train.data={ready}", *SIZE])
    source = data.open_source(config, train)
    first = source(Bucket(4, 8, 2), [0, 1])
    again = pickle.loads(pickle.dumps(source))(Bucket(4, 8, 2), [0, 1])
    assert torch.equal(first.mean, again.mean) and first.captions == again.captions


@pytest.mark.slow  # encodes clips of 256 x 256 pixels
def test_reading_is_twenty_times_as_fast_as_encoding(run, tmp_path):
    size = ("width=256", "height=256", "frames=16", "fps=8", "device=cpu")
    (tmp_path / "videos").mkdir()
    frames = np.random.default_rng(0).integers(0, 256, (16, 256, 256, 3), np.uint8)
    media_files.write_video(tmp_path / "videos/a.mp4", frames, rate=8, options={"crf": "23"})
    (tmp_path / "videos/captions.csv").write_text("file,caption\na.mp4,noise\n")
    run("prepare", "data=videos", "output=prepared", *size, "batch=1")
    seconds = []
    for folder in ("videos", "prepared"):
        config, train = load_settings(None, [f"weights={LAB}", f"train.data={folder}", *size])
        source = data.open_source(config, train)
        encoding = diffusion.make(config, train, source, CPU).inputs
        encoding.ready(source(Bucket(16, 8, 1), [0]))
        began = time.process_time()
        encoding.ready(source(Bucket(16, 8, 1), [1]))
        seconds.append(time.process_time() - began)
    print(f"a clip takes {seconds[0]:.3f} s decoded and encoded, {seconds[1]:.4f} s prepared")
    assert seconds[0] > 20 * seconds[1]
