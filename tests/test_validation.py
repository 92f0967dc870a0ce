"""Validation: held-out clips are never trained on, their loss never changes by chance, the best is kept."""

import dataclasses
import json
import os
import shutil
import socket
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import PATHS
from PIL import Image
from test_prepare import CPU, RUN, SIZE, log, run, write_clips  # noqa: F401 (run is a fixture)

from i2vgen.files import checkpoint, fingerprint
from i2vgen.settings.config import LAB
from i2vgen.training import copies, data, diffusion, loop, validation
from i2vgen.training.settings import Bucket, load_settings

BANDS = [f"validation_loss_{low}_{low + 200}" for low in range(0, 1000, 200)]
WORDS = (f"weights={LAB}", *RUN, "train.steps=4", "train.save_every=2", "train.validate_every=1")


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    return write_clips(tmp_path_factory.mktemp("clips") / "videos")


def opened(*words):
    config, train = load_settings(None, [f"weights={LAB}", *SIZE, *words])
    return config, train, data.open_source(config, train)


def measured(folder):
    """The validation lines of a log, by step, checked for what each must hold."""
    lines = {line["step"]: line for line in log(folder) if "validation_loss" in line}
    for step, line in lines.items():
        assert set(line) == {"step", "validation_loss", *BANDS, "best_step"}
        assert line["validation_loss"] == pytest.approx(np.mean([line[band] for band in BANDS]))
        best = min(range(1, step + 1), key=lambda k: lines[k]["validation_loss"])
        assert line["best_step"] == best
    return lines


# --- through the command


@pytest.mark.parametrize("words", [(), ("train.lora_rank=2",)], ids=["UNet", "adapter"])
@pytest.mark.parametrize("kind", ["videos", "prepared"])
def test_held_out_clips_are_measured_shown_and_the_best_is_kept(run, clips, tmp_path, kind, words):  # noqa: F811
    shutil.copytree(clips, "videos")
    if kind == "prepared":
        run("prepare", "data=videos", "output=prepared", *SIZE, "batch=2", "encode_chunk=4")
    run(
        "train",
        *WORDS,
        *words,
        f"train.data={kind}",
        "output=out",
        "train.validate=0.4",
        "train.sample_every=4",
    )
    lines = measured(tmp_path / "out")
    assert list(lines) == [1, 2, 3, 4]
    strip = np.asarray(Image.open(tmp_path / "out/samples/00000004.png"))
    assert strip.shape == (2 * 2 * 16, 4 * 16, 3)  # two clips, sampled and true, of four frames
    held = opened(f"train.data={kind}", "train.validate=0.4")[2].held_out
    said = (tmp_path / "out/samples/prompts.txt").read_text().splitlines()
    assert said == [one.captions[0] for one in held.fixed(Bucket(4, 8, 2))] and len(said) == 2
    if kind == "videos":  # the true clips are those of the files
        first = next(held.fixed(Bucket(4, 8, 2))).pixels[0]
        shown = strip[16:32].reshape(16, 4, 16, 3).transpose(3, 1, 0, 2) / 127.5 - 1
        assert np.abs(shown - first.numpy()).max() < 0.01
    if lines[4]["best_step"] == 4:
        name = "adapter/adapter_model" if words else "weights/unet"
        best = "best/adapter_model" if words else "best/unet"
        assert (tmp_path / f"out/{name}.safetensors").read_bytes() == (
            tmp_path / f"out/{best}.safetensors"
        ).read_bytes()
    assert words or checkpoint.missing_parts(tmp_path / "out/best") == []


def test_raw_and_prepared_measure_the_same(run, clips, tmp_path):  # noqa: F811
    """In two buckets, which share the clips that are measured."""
    kinds = ("frame_lengths=[2,4]", "sample_fps=[8,8]")
    run("prepare", f"data={clips}", "output=prepared", *SIZE, "batch=2", "encode_chunk=2", *kinds)
    words = ("train.data=world", "train.encode_chunk=2", "train.batch=2", "train.validate_clips=7")
    found = []
    for held in (clips, "prepared"):
        config, train, source = opened(*words, *(f"train.{kind}" for kind in kinds), f"train.validate={held}")
        part = diffusion.make(config, train, source, CPU)
        sizes = [(len(batch.mean), batch.mean.shape[2]) for batch in part.held_out.batches]
        assert sizes == [(2, 2), (2, 2), (2, 4), (1, 4)]
        part.step.eval()
        assert list(part.held_out.measure(part.step, device=CPU)) == ["validation_loss", *BANDS]
        same = dataclasses.replace(part.held_out, batches=part.held_out.batches[2:])  # a single start each
        found.append(same.measure(part.step, device=CPU))
    assert found[0] == pytest.approx(found[1], rel=1e-6)


def test_a_killed_run_resumes_with_the_same_log_and_the_same_best(run, clips, tmp_path):  # noqa: F811
    config, train, source = opened(f"train.data={clips}", "train.validate=0.4", *WORDS)

    def fit(folder, **how):
        part = diffusion.make(config, train, source, CPU)
        loop.fit(part, config, train, source, folder, device=CPU, **how)

    def killed(step, _):
        if step == 3:
            raise KeyboardInterrupt

    fit(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "cut", on_step=killed)
    fit(tmp_path / "cut")
    for name in ("log.jsonl", "best/unet.safetensors", "weights/unet.safetensors"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "cut" / name).read_bytes()
    measured(tmp_path / "cut")


def test_the_world_validates_on_clips_of_its_own(run, tmp_path):  # noqa: F811
    run("train", *WORDS, "output=out", "train.validate=world", "train.validate_clips=3", "train.num_clips=4")
    assert len(measured(tmp_path / "out")) == 4
    _, _, source = opened("train.validate=world", "train.num_clips=4")
    trained = {source(Bucket(4, 8, 1), [k]).pixels.sum().item() for k in range(4)}
    held = source.held_out.fixed(Bucket(4, 8, 1))
    assert trained.isdisjoint({next(held).pixels.sum().item() for _ in range(8)})


# --- what is measured


@pytest.mark.parametrize(
    "words",
    [
        ("train.kinds=[basic]",),
        ("train.num_clips=8", "train.batch=2", "train.cache=true"),
        ("train.flow_weight=1",),
    ],
    ids=lambda words: words[0],
)
def test_the_world_validates_on_a_folder_too(clips, words):
    _, train, source = opened(f"train.validate={clips}", *words)
    assert isinstance(source, data.World) and isinstance(source.held_out, data.Folder)
    assert len(source.held_out) and source.train == train


def test_held_out_clips_are_never_trained_on(clips, tmp_path):
    _, _, source = opened(f"train.data={clips}", "train.validate=0.3")
    held = {clip.captions[0] for clip in source.held_out.fixed(Bucket(4, 8, 1))}
    trained = {source(Bucket(4, 8, 1), [k]).captions[0] for k in range(40)}
    assert len(held) == 2 and held.isdisjoint(trained) and len(trained | held) >= 6
    again = opened(f"train.data={clips}", "train.validate=0.3", "train.seed=7")[2]
    assert again.held_out.files == source.held_out.files  # names decide, not the seed
    assert set(data.contents(source)) == {"clips", "captions", "validation clips", "validation captions"}


def test_the_loss_depends_on_nothing_but_the_network(clips):
    """Not on the batch size, the number of processes, dropout or what was drawn before."""
    config, train, source = opened(f"train.data={clips}", "train.validate=0.5", "train.batch=2")
    part = diffusion.make(config, train, source, CPU)
    found = part.held_out.measure(part.step.eval(), device=CPU)
    torch.manual_seed(5)
    assert part.held_out.measure(part.step, device=CPU) == found
    single = dataclasses.replace(train, batch=1, text_dropout=1.0, image_dropout=1.0)
    other = diffusion.make(config, single, source, CPU)
    assert other.held_out.measure(other.step.eval(), device=CPU) == pytest.approx(found, rel=1e-5)
    sums = dict.fromkeys(found, 0.0)
    mean, torch.distributed.all_reduce = torch.distributed.all_reduce, lambda values: None
    try:
        for rank in (0, 1):
            for name, value in part.held_out.measure(part.step, device=CPU, rank=rank, ranks=2).items():
                sums[name] += value
    finally:
        torch.distributed.all_reduce = mean
    assert sums == pytest.approx(found, rel=1e-6)


def test_every_band_is_measured_within_its_own_timesteps():
    asked = []
    held = validation.HeldOut(
        [torch_batch(2), torch_batch(1)], lambda batch, seeds, t: (t, seeds), 1000, None, None
    )

    def loss(t, seeds):
        asked.append((t.tolist(), seeds))
        return {"loss": t.float().mean()}

    found = held.measure(loss, device=CPU)
    assert list(found) == ["validation_loss", *BANDS] and len(asked) == 10
    for band, name in enumerate(BANDS):
        steps = [t for call in (asked[band], asked[5 + band]) for t in call[0]]
        assert all(200 * band <= t < 200 * band + 200 for t in steps)
        assert found[name] == pytest.approx(np.mean(steps))
    assert len({seed for _, seeds in asked for seed in seeds}) == 15
    assert validation.band_edges(3) == [(0, 1), (1, 2), (2, 3)]


def torch_batch(b):
    return diffusion.Encoded(torch.zeros(b, 1, 1, 1, 1), torch.zeros(b, 1, 1, 1, 1), None, None, 8)


# --- refused


@pytest.mark.parametrize(
    ("trained", "held"),
    [("videos", "videos"), ("videos", "videos/part"), ("videos/part", "videos"), ("prepared", "videos"),
     ("videos", "prepared"), ("videos", "link")],
)  # fmt: skip
def test_a_validation_folder_inside_the_training_folder_is_refused(run, clips, tmp_path, trained, held):  # noqa: F811
    shutil.copytree(clips, "videos")
    shutil.copytree(clips, "videos/part")
    (tmp_path / "link").symlink_to("videos")
    if "prepared" in (trained, held):
        run("prepare", "data=videos", "output=prepared", *SIZE)
    said = run.refused("train", *WORDS, f"train.data={trained}", f"train.validate={held}", "output=out")
    assert f"train.validate={held} and train.data={trained} overlap" in said
    assert not (tmp_path / "out/log.jsonl").exists()


def test_copies_under_other_names_are_refused(run, clips, tmp_path):  # noqa: F811
    """A file and a folder of frames, raw or prepared on either side; clips that only look alike are not."""
    shutil.copytree(clips, "videos")
    held = write_clips(tmp_path / "held", frames=5)
    opened("train.data=videos", "train.validate=held")
    shutil.copy("videos/5.mp4", held / "other.mp4")
    shutil.copytree("videos/4", held / "frames")
    with (held / "captions.jsonl").open("a") as file:
        file.writelines(json.dumps({"file": name, "caption": "x"}) + "\n" for name in ("other.mp4", "frames"))
    for name in ("videos", "held"):
        run("prepare", f"data={name}", f"output=ready {name}", *SIZE)
    said = run.refused("train", *WORDS, "train.data=videos", "train.validate=held", "output=out")
    assert "train.validate=held holds 2 of the clips of train.data=videos: " in said
    assert not (tmp_path / "out/log.jsonl").exists()
    for words in (("ready videos", "held"), ("videos", "ready held"), ("ready videos", "ready held")):
        with pytest.raises(ValueError, match=r"holds 2 of the clips of .*: frames is 4, byte for byte"):
            opened(f"train.data={words[0]}", f"train.validate={words[1]}")


def test_copies_within_a_folder_are_told(clips, tmp_path, caplog):
    folder = shutil.copytree(clips, tmp_path / "videos")
    rows = [json.loads(line) for line in (folder / "captions.jsonl").read_text().splitlines()]
    for number in range(6):
        shutil.copy(folder / "0.mp4", folder / f"again{number}.mp4")
        rows.append({"file": f"again{number}.mp4", "caption": "x"})
    (folder / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    opened(f"train.data={folder}", "train.validate=0.4")
    assert "clips trained on under another name, such as" in caplog.text


def test_files_of_one_size_are_read_only_as_far_as_they_agree(tmp_path, monkeypatch):
    """Of the size of nothing else, of one size only, the same here and there, and the same everywhere."""
    size = 2**20
    for folder, at in (("trained", 3), ("held", 5)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / f"{folder} alone").write_bytes(bytes(at))
        (tmp_path / folder / "begins differently").write_bytes(bytes([at]) + bytes(size - 1))
        (tmp_path / folder / "differs once").write_bytes(bytes(99_999) + bytes([at]) + bytes(size))
        (tmp_path / folder / f"{folder} twin").write_bytes(b"a" * size)
    made = [copies.Files(tmp_path / f, sorted(os.listdir(tmp_path / f))) for f in ("held", "trained")]
    read, of_content = [], fingerprint.of_content

    def noted(path, *, spots=0):
        read.append((path.name, "spots" if spots else "all"))
        return of_content(path, spots=spots)

    monkeypatch.setattr(fingerprint, "of_content", noted)
    assert copies.shared(*made) == [("held twin", "trained twin")]
    whole = {name for name, how in read if how == "all"}
    assert whole == {"differs once", "held twin", "trained twin"}
    assert not any("alone" in name for name, _ in read)


def test_what_cannot_be_held_out_is_refused(run, clips, tmp_path):  # noqa: F811
    shutil.copytree(clips, "videos")
    first = (tmp_path / "videos/captions.jsonl").read_text().splitlines()[0]
    (tmp_path / "videos/captions.jsonl").write_text(first + "\n")
    said = run.refused("train", *WORDS, "train.data=videos", "train.validate=0.5", "output=out")
    assert "holds out a share of videos, which holds a single clip" in said
    write_clips(tmp_path / "short", frames=2)
    said = run.refused("train", *WORDS, "train.data=videos", "train.validate=short", "output=out")
    assert "train.validate=short: none of its clips (6) can be used" in said


def test_another_validation_folder_needs_resume(run, clips, tmp_path):  # noqa: F811
    shutil.copytree(clips, "videos")
    write_clips(tmp_path / "held", frames=5)
    words = (*WORDS, "train.data=videos", "train.validate=held", "output=out", "train.steps=2")
    run("train", *words)
    (tmp_path / "held/captions.jsonl").write_text(json.dumps({"file": "1.gif", "caption": "x"}) + "\n")
    said = run.refused("train", *words)
    assert "train.validate=held holds other validation clips than when" in said
    run("train", *words, "train.steps=3", "--resume")
    assert "best_step" in log(tmp_path / "out")[-1]


def test_two_processes_validate_as_one(run, clips, tmp_path, monkeypatch, root):  # noqa: F811
    """On prepared data: two batches in two processes are two accumulated ones in one."""
    run("prepare", f"data={clips}", "output=prepared", *SIZE)
    words = (*WORDS, "train.steps=2", "train.validate_every=2", "train.data=prepared", "train.validate=0.5")
    run("train", *words, "output=one", "train.accumulate=2", "train.batch=1", "train.precision=float32")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": 2, "RANK": 0}.items():
        monkeypatch.setenv(name, str(value))
    words = (*words, "output=two", "train.batch=1", "train.precision=float32")
    env = {**os.environ, "RANK": "1", "LOCAL_RANK": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": PATHS}
    script = [sys.executable, str(root / "scripts/train.py"), *words]
    other = subprocess.Popen(script, env=env, stderr=subprocess.PIPE, text=True)
    try:
        run("train", *words)
        assert other.wait(60) == 0, other.stderr.read()
    finally:
        other.kill()
        other.communicate()
    one, two = log(tmp_path / "one"), log(tmp_path / "two")
    assert len(one) == len(two) == 3
    for a, b in zip(one, two, strict=True):
        assert a == pytest.approx(b, rel=1e-4)
