"""The model that runs if none is named: its size, and that it does what the README shows."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from i2vgen import pipeline
from i2vgen.evaluation import evaluate
from i2vgen.files import checkpoint
from i2vgen.settings import config, merge, shipped

SHIPPED = Path(config.SHIPPED)
CLIPS = 3
LEAST_RIGHT = 0.6  # docs/evaluation.md has the figures; chance is one in eight
MB = 10**6


@pytest.fixture(scope="module")
def model():
    return pipeline.load(config.SHIPPED, overrides=["device=cpu"])


def test_all_that_ships_is_small():
    files = [f for f in SHIPPED.parent.rglob("*") if f.is_file()]
    assert {f.stem for f in SHIPPED.glob("*.safetensors")} == set(checkpoint.PARTS)
    assert sum(f.stat().st_size for f in files) <= 24 * MB
    assert max(f.stat().st_size for f in files) <= 10 * MB


def test_unet_and_clip_are_in_eight_bits():
    for part, dtype in (("unet", "I8"), ("clip", "I8"), ("vae", "F16")):
        with safe_open(SHIPPED / f"{part}.safetensors", "pt") as held:
            slices = [held.get_slice(name) for name in held.keys()]  # noqa: SIM118
        of_all = sum(np.prod(one.get_shape()) for one in slices)
        assert sum(np.prod(one.get_shape()) for one in slices if one.get_dtype() == dtype) > 0.9 * of_all


@pytest.mark.parametrize(("folder", "name"), [(config.LAB, "small"), (config.SHIPPED, "pictures")])
def test_the_settings_are_those_of_the_training_files(root, folder, name):
    from i2vgen.training.settings import load_settings

    # Settings added since the file was written are at their defaults.
    stored = merge.from_dict(merge.read_stored_settings(folder)).to_dict()
    made, _ = load_settings(root / "configs" / "train" / f"{name}_vae.yaml")
    assert 0.1 < stored["vae"].pop("scale") < 10  # measured in training
    for section in ("unet", "vae", "clip", "use", "schedule"):
        wanted = made.to_dict()[section]
        wanted.pop("scale", None)
        assert stored[section] == wanted, section


def test_it_runs_if_no_weights_are_named(root):
    code = "from i2vgen.__main__ import main; import sys; sys.exit(main(['generate', '--print-config']))"
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0 and f"weights: {SHIPPED}\n" in done.stdout, done.stderr


def test_the_first_frame_is_the_picture_and_the_prompt_decides_the_motion(model):
    plan = evaluate.Plan(clips=CLIPS, first_seed=7000, things=evaluate.SHIPPED_THINGS)
    found = evaluate.evaluate(model, plan).scores.values
    assert found["motion_accuracy_basic"] > LEAST_RIGHT and found["other_motion_accuracy"] > LEAST_RIGHT
    assert found["first_frame_psnr"] > 26 and found["shape_kept"] > 0.6
    assert found["clip_psnr"] > found["still_psnr"] + 1


def test_the_shipped_pictures_become_other_clips_by_their_sentence(model):
    picture = Image.open(shipped.PICTURE)
    up, left = (
        model(picture, f"{shipped.SUBJECT} {way}").frames for way in ("moves up", "moves to the left")
    )
    rows, columns = np.mgrid[: up.shape[1], : up.shape[2]]

    def place(frame):
        red = frame[..., 0].astype(float) - frame[..., 1:].max(-1) > 60
        return rows[red].mean(), columns[red].mean()

    (y, x), (_, x_left), (y_up, _) = place(up[0]), place(left[-1]), place(up[-1])
    assert y_up < y - 5 and x_left < x - 5


@pytest.mark.parametrize("folder", [config.LAB, config.SHIPPED])
def test_other_pictures_give_a_complete_clip(root, folder):
    model = pipeline.load(folder, overrides=["device=cpu"])
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 200, 3), np.uint8))
    for picture in (root / "i2vgen" / "assets" / "boat.png", noise):
        frames = model(picture, "a zebra juggles three lemons in the rain", seed=3).frames
        assert frames.shape[0] == model.config.sample.frames and frames.std() > 1


@pytest.mark.parametrize(("folder", "name"), [(config.LAB, "small"), (config.SHIPPED, "pictures")])
def test_training_continues_from_it(root, tmp_path, folder, name):
    from i2vgen.training import data, diffusion, loop
    from i2vgen.training.settings import load_settings

    words = [f"weights={folder}", "train.steps=1", "train.batch=1", "train.num_clips=1", "device=cpu"]
    if name == "pictures":
        (tmp_path / "things").mkdir()
        for thing, shown in (("anchor", "turtle"), ("apple", "rocket")):  # names that training draws
            shutil.copy(f"{evaluate.SHIPPED_THINGS}/{shown}.png", tmp_path / "things" / f"{thing}.png")
        words += [f"train.things={tmp_path / 'things'}", "train.backgrounds=''"]
    settings, train = load_settings(root / "configs" / "train" / f"{name}_diffusion.yaml", words)
    source = data.open_source(settings, train)
    part = diffusion.make(settings, train, source, torch.device("cpu"))
    made = loop.fit(part, settings, train, source, tmp_path, device=torch.device("cpu"))
    assert checkpoint.missing_parts(made) == []
    line = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[0])
    assert line["loss"] < 0.5  # an untrained network's is about 1
