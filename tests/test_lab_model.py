"""The lab model, `weights=lab`: its size, and that it does what its card says."""

from __future__ import annotations

import dataclasses
import json
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors import safe_open

from i2vgen import pipeline
from i2vgen.settings import config, merge
from i2vgen.world import drawing, reading

SMALL = Path(config.LAB)
CLIPS = 10
LEAST_RIGHT = 0.8  # docs/evaluation.md has the figures; chance is one in eight
MB = 10**6


@pytest.fixture(scope="module")
def model():
    return pipeline.load("lab", overrides=["device=cpu", "steps=12"])


def clips(kind):
    """Evaluation clips of the model's size, with seeds far below those of training."""
    sample = merge.load_config(weights=str(SMALL)).sample
    size = {"width": sample.width, "height": sample.height, "frames": sample.frames}
    return [drawing.clip(seed, **size, kind=kind) for seed in range(7000, 7000 + CLIPS)]


def generate(model, pictures, captions):
    made = model.generate([Image.fromarray(p) for p in pictures], captions, list(range(len(captions))))
    return [clip.frames for clip in made]


def test_it_is_small_and_half_precision():
    files = sorted(SMALL.glob("*.safetensors"))
    assert [f.stem for f in files] == ["clip", "unet", "vae"]
    assert max(f.stat().st_size for f in files) <= 8 * MB
    for file in files:
        with safe_open(file, "pt") as held:
            dtypes = {held.get_slice(name).get_dtype() for name in held.keys()}  # noqa: SIM118
        assert dtypes == {"F16"}


def test_the_first_frame_is_the_picture_and_the_prompt_decides_the_motion(model):
    true = clips("basic")
    first = [clip.frames[0] for clip in true]
    frames = generate(model, first, [clip.caption for clip in true])
    psnr = [reading_psnr(f[0], p) for f, p in zip(frames, first, strict=True)]
    right = [reading.score(f, c.facts)["motion_right"] for f, c in zip(frames, true, strict=True)]
    assert np.mean(psnr) > 26

    others = [drawing.another_motion(clip.facts, seed) for seed, clip in enumerate(true)]
    captions = [drawing.caption(facts, seed) for seed, facts in enumerate(others)]
    frames = generate(model, first, captions)
    right += [reading.score(f, facts)["motion_right"] for f, facts in zip(frames, others, strict=True)]
    assert np.mean(right) > LEAST_RIGHT


def test_two_objects_move_as_prompted(model):
    """Not always, but far more often than with the motions exchanged."""
    true = [clip for clip in clips("pair") if len({move.kind for move in clip.facts.moves}) == 2]
    frames = generate(model, [clip.frames[0] for clip in true], [clip.caption for clip in true])
    exchanged = [dataclasses.replace(c.facts, moves=c.facts.moves[::-1]) for c in true]
    right = [reading.score(f, c.facts)["motion_right"] for f, c in zip(frames, true, strict=True)]
    wrong = [reading.score(f, facts)["motion_right"] for f, facts in zip(frames, exchanged, strict=True)]
    assert sum(right) >= len(true) / 3 and sum(right) >= 3 * sum(wrong)


def reading_psnr(a, b):
    return 10 * np.log10(255**2 / np.mean((a.astype(float) - b.astype(float)) ** 2))


def test_a_clip_is_saved_enlarged(run_script, root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = [f"image={root}/i2vgen/assets/boat.png", "prompt=a boat rests", "output=clip.png", "steps=2"]
    words.append("weights=lab")
    status, out = run_script("generate.py", *words, "device=cpu")
    assert status == 0, out
    record = json.loads(Path("clip.png.json").read_text())
    assert record["settings"]["weights"] == str(SMALL)
    settings = merge.from_dict(record["settings"])
    size = settings.save.enlarge * settings.sample.width
    assert Image.open("clip.png").size == (size * settings.sample.frames, size)
    assert settings.save.enlarge > 1 and record["width"] == size


def test_a_file_for_another_model_says_which_weights_are_missing(root):
    for name in ("i2vgen_xl", "tiny"):
        with pytest.raises(ValueError, match=r"weights .*small.*weights=FOLDER"):
            pipeline.load(config=root / "configs" / f"{name}.yaml")


def test_unknown_words_are_reported(model, root):
    star = root / "i2vgen" / "assets" / "star.png"
    with pytest.warns(
        UserWarning, match=r"few words \(clip\.words in .*\) and know nothing of: dragon, mordor$"
    ):
        model(star, "A dragon moves to Mordor, left")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(star, "a yellow star moves to the left")
