"""Training a refiner on a first stage's clips; the shipped refiner beats plain upscaling."""

import json
import runpy
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from i2vgen.evaluation import refiner_gain
from i2vgen.refiner import refine
from i2vgen.settings import config
from i2vgen.settings.merge import from_dict, load_config, read_stored_settings
from i2vgen.training import data, diffusion, loop, refiner_clips
from i2vgen.training.settings import Bucket, load_settings

CPU = torch.device("cpu")
HOME = Path(config.SHIPPED_REFINER)
MB = 10**6


def script(root, name, *words):
    """Run scripts/NAME in this process and check that it exits with status 0."""
    before = sys.argv
    sys.argv = [name, *map(str, words)]
    try:
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(root / "scripts" / name), run_name="__main__")
    finally:
        sys.argv = before
    assert not ended.value.code, words


# --- the loss


def test_the_shifted_noise_starts_where_sampling_starts():
    settings = load_config(None, ["schedule.kind=logsnr_cosine", "refine.noise_level=15", "refine.steps=2"])
    draw = torch.Generator().manual_seed(0)
    x0, start, noise = (torch.randn(2, 4, 3, 5, 5, generator=draw, dtype=torch.float64) for _ in range(3))
    last = settings.refine.noise_level - 1
    sampled = refine.levels(settings).noised(start, noise, last)
    shifted = refiner_clips.shifted_noise(noise, x0, start, refiner_clips.start_noise_level(settings))
    table = refiner_clips.schedule(settings)
    t = torch.full((2,), last)
    assert torch.allclose(table.q_sample(x0, t, shifted), sampled, rtol=0, atol=1e-12)
    wrong = refiner_clips.shifted_noise(noise, x0, start, 1.01 * refiner_clips.start_noise_level(settings))
    assert not torch.allclose(table.q_sample(x0, t, wrong), sampled, rtol=0, atol=1e-5)


def test_every_clip_has_the_same_weight():
    draw = torch.Generator().manual_seed(0)
    x0, start, noise = (torch.randn(2, 4, 3, 5, 5, generator=draw) for _ in range(3))
    start[1] = x0[1] + 10 * (start[1] - x0[1])
    shifted = refiner_clips.shifted_noise(noise, x0, start, 0.05)
    errors = shifted.square().flatten(1).mean(1)
    assert errors[1] > 50 * errors[0]
    assert torch.allclose(refiner_clips.weight_per_clip(shifted) * errors, torch.ones(2))


# --- training


WORDS = [
    f"weights={HOME}", f"train.first_stage={config.LAB}", "device=cpu", "train.batch=2",
    "train.num_clips=4", "train.warmup=1", "train.log_every=1",
]  # fmt: skip


def settings(root, *words):
    return load_settings(root / "configs" / "train" / "small_refiner.yaml", [*WORDS, *words])


@pytest.mark.parametrize("kind", ["drawn", "decoded", "made"])
def test_clips_look_like_the_first_stage_output(root, kind):
    shares = {"drawn": (0, 0), "decoded": (1, 0), "made": (0, 1)}[kind]
    words = [f"train.first_stage_vae={shares[0]}", f"train.first_stage_made={shares[1]}"]
    job, train = settings(root, *words)
    first = refiner_clips.load_first_stage(job, train, CPU)
    clips = data.World(job, train)(Bucket(8, 8, 2), [0, 1])
    got = first(clips.pixels, clips.captions)
    assert got.shape == clips.pixels.shape
    errors = (got - clips.pixels).square().mean(dim=(1, 3, 4)).mean(0)  # f
    near, far = {"drawn": (0, 0.002), "decoded": (0.0005, 0.02), "made": (0.0005, 1)}[kind]
    assert near < errors.mean() < far
    if kind == "made":  # the clip starts with the true picture and then drifts away
        assert errors[-1] > errors[0]


def test_a_killed_run_resumes_bit_identically(root, tmp_path):
    words = ["train.steps=3", "train.save_every=1"]

    def fit(folder, on_step=None):
        job, train = settings(root, *words)
        source = data.open_source(job, train)
        part = diffusion.make(job, train, source, CPU)
        loop.fit(part, job, train, source, folder, device=CPU, on_step=on_step)

    def killed(step, _):
        if step == 2:
            raise KeyboardInterrupt

    fit(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "cut", on_step=killed)
    fit(tmp_path / "cut")
    for name in ("log.jsonl", "weights/unet.safetensors"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "cut" / name).read_bytes()


def test_the_script_trains_a_refiner_that_generate_can_use(root, tmp_path):
    """Start from an autoencoder and CLIP only; the loss is relative to the error of the upscaled clip."""
    home = tmp_path / "parts"
    shutil.copytree(HOME, home)
    (home / "unet.safetensors").unlink()
    words = [*WORDS, f"weights={home}", "train.steps=2"]
    script(root, "train.py", root / "configs/train/small_refiner.yaml", *words, f"output={tmp_path}/run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert 0.5 < lines[0]["loss"] < 1.5
    output = tmp_path / "clip.png"
    words = [f"image={root}/i2vgen/assets/star.png", "prompt=a star moves", "device=cpu", "steps=2"]
    words += [f"refine_weights={tmp_path}/run/weights", "save.enlarge=1", f"output={output}"]
    script(root, "generate.py", *words)
    record = json.loads(output.with_name(f"{output.name}.json").read_text())
    assert (record["width"], record["height"]) == (64, 64)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train.first_stage_vae=0.8", "train.first_stage_made=0.3"], "their sum must be at most 1"),
        (["train.first_stage_made=2"], r"train\.first_stage_made is 2\.0; give a probability"),
        (["train.sample_every=5"], r"train\.sample_every = 5 samples from pure noise"),
        (["train.part=vae", "train.cache=false"], r"train\.first_stage needs train\.part=diffusion"),
    ],
)
def test_impossible_settings_are_refused(root, words, message):
    with pytest.raises(ValueError, match=message):
        settings(root, *words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["sample.width=16", "sample.height=16"], "makes 32 x 32 pixels, which a refiner cannot bring to"),
        (["train.frame_lengths=4", "train.sample_fps=4"], "needs clips of the 8 frames"),
        (["train.first_stage=nowhere"], "weights=nowhere does not exist"),
        (["refine.noise_level=2000"], "the total noise level is 2000"),
    ],
)
def test_a_first_stage_that_does_not_fit_is_refused(root, words, message):
    job, train = settings(root, *words)
    with pytest.raises(ValueError, match=message):
        diffusion.make(job, train, data.open_source(job, train), CPU)


# --- the shipped refiner


@pytest.fixture(scope="module")
def measured(root, tmp_path_factory):
    """Run scripts/refine_gain.py on a few seeds -> function giving the mean of a measure."""
    out = tmp_path_factory.mktemp("gain")
    words = ["clips=8", "first_seed=200", "sources=drawn,decoded", "save.rounding=nearest", "device=cpu"]
    script(root, "refine_gain.py", *words, f"json={out}/gain.json", f"output={out}/strip.png")
    scores = json.loads((out / "gain.json").read_text())["scores"]
    assert Image.open(out / "strip.png").size == (3 * 4 * 64, 3 * 4 * 64)
    return lambda source, way, name: refiner_gain.mean(scores[source][way][name])


def test_the_shipped_refiner_is_small(root):
    files = [f for f in HOME.rglob("*") if f.is_file()]
    assert {f.stem for f in files if f.suffix == ".safetensors"} == {"clip", "unet", "vae"}
    assert sum(f.stat().st_size for f in files) <= 8 * MB


@pytest.mark.parametrize("source", ["drawn", "decoded"])
@pytest.mark.parametrize("plain", ["bilinear", "bicubic"])
def test_the_shipped_refiner_beats_plain_upscaling(measured, source, plain):
    for name in ("psnr", "ssim"):
        assert measured(source, "refined", name) > measured(source, plain, name), name
    assert measured(source, "refined", "sharpness") > measured(source, plain, "sharpness")


@pytest.mark.parametrize("source", ["drawn", "decoded"])
def test_the_shipped_refiner_adds_no_flicker(measured, source):
    """Where the true clip stands still, the refined clip changes no more than its input."""
    assert measured(source, "refined", "still") <= 1.05 * measured(source, "bicubic", "still")
    assert measured("drawn", "refined", "flicker") <= 1.05 * measured("drawn", "truth", "flicker")


def test_measures_see_blur_noise_and_flicker():
    """Every measure separates a deliberately degraded clip from the true one."""
    job = load_config(None, [], weights=config.LAB)
    truth, _ = refiner_gain.draw(300, job, (64, 64))
    same = refiner_gain.scores(truth, truth)
    noise = np.random.default_rng(0).integers(-20, 21, truth.shape)
    noisy = refiner_gain.scores(truth, np.clip(truth + noise, 0, 255).astype(np.uint8))
    small, _ = refiner_gain.draw(300, job, (32, 32))
    blurred = refiner_gain.scores(truth, refiner_gain.upscaled(small, (64, 64), "bilinear"))
    for degraded in (noisy, blurred):
        assert degraded["psnr"] < same["psnr"] and degraded["ssim"] < same["ssim"]
    assert blurred["sharpness"] < same["sharpness"] < noisy["sharpness"]
    assert noisy["flicker"] > same["flicker"]
    assert noisy["still"] > 5 > same["still"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["clips=1"], "clips is 1; give 2 or more"),
        (["clips=many"], "clips is a whole number"),
        (["sources=drawn,lost"], "no source 'lost'; choose from drawn, decoded, made"),
        ([f"first_seed={2**40}"], "where training begins"),
        (["refine_weights=nowhere"], "nowhere does not exist"),
        ([f"refine_weights={config.LAB}"], "holds no refiner"),
    ],
)
def test_what_is_refused(root, words, message, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["refine_gain.py", *words])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(root / "scripts" / "refine_gain.py"), run_name="__main__")
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_the_cascade_of_shipped_weights_runs(root, tmp_path, monkeypatch):
    monkeypatch.chdir(root)
    output = tmp_path / "clip.png"
    script(root, "generate.py", root / "configs/cascade_small.yaml", "image=i2vgen/assets/star.png",
           "prompt=a star moves left", "steps=2", "device=cpu", f"output={output}")  # fmt: skip
    record = json.loads(output.with_name(f"{output.name}.json").read_text())
    assert (record["width"], record["height"]) == (6 * 64, 6 * 64)


def test_shipped_settings_are_those_of_the_training_files(root):
    # Settings added since the file was written are at their defaults.
    stored = from_dict(read_stored_settings(HOME)).to_dict()
    assert 0.1 < stored["vae"].pop("scale") < 10  # measured in training
    made, _ = load_settings(root / "configs" / "train" / "small_refiner_vae.yaml")
    wanted = made.to_dict()
    wanted["vae"].pop("scale")
    for section in ("unet", "vae", "clip", "use"):
        assert stored[section] == wanted[section], section
    assert stored["schedule"]["kind"] == "logsnr_cosine"
