"""The examples, as a reader would call them, on the shipped model and with few steps."""

import ast
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import PATHS
from PIL import Image

import i2vgen
from i2vgen.files import video
from i2vgen.world import drawing

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
QUICK = ("steps=4", "device=cpu", "save.enlarge=1")


def load(name):
    return runpy.run_path(str(ROOT / "examples" / f"{name}.py"))


def call(name, *words):
    before = sys.argv
    sys.argv = [name, *map(str, words)]
    try:
        runpy.run_path(str(ROOT / "examples" / f"{name}.py"), run_name="__main__")
    finally:
        sys.argv = before


@pytest.fixture(scope="module")
def clip():
    """A true clip of the shipped model's size, its first frame in other colours, and its caption."""
    seed = next(s for s in range(99) if drawing.sample_facts(s, kind="basic").moves[0].kind == "right")
    made = drawing.clip(seed, width=32, height=32, frames=8, kind="basic")
    return made.frames, Image.fromarray(made.frames[0][..., ::-1].copy()), made.caption


def test_all_are_short_and_in_the_docs():
    table = (ROOT / "docs" / "laboratory.md").read_text()
    for file in EXAMPLES:
        assert f"examples/{file.name}" in table
        assert len(file.read_text().splitlines()) <= 115, file.name
        assert ast.get_docstring(ast.parse(file.read_text()))


def test_edit_video(clip, tmp_path):
    frames, picture, caption = clip
    video.save(frames, tmp_path / "clip", fps=8, enlarge=3)  # as the shipped settings save
    picture.save(tmp_path / "edited.png")
    call("edit_video", tmp_path / "clip", tmp_path / "edited.png", caption, tmp_path / "out", *QUICK)
    edited = video.load(tmp_path / "out")[0]
    assert edited.shape == frames.shape and not np.array_equal(edited, frames)

    # What is injected matters: without it the same noise gives another clip.
    edit = load("edit_video")["edit"]
    model = i2vgen.load(overrides=QUICK)
    alone = edit(model, frames, picture, caption, share=0.0).frames
    assert np.array_equal(edit(model, frames, picture, caption).frames, edited)
    assert not np.array_equal(alone, edited)


def test_first_and_last(clip, tmp_path):
    frames, _, caption = clip
    for name, frame in (("first", frames[0]), ("last", frames[-1])):
        Image.fromarray(frame).save(tmp_path / f"{name}.png")
    call("first_and_last", tmp_path / "first.png", tmp_path / "last.png", caption, tmp_path / "out", *QUICK)
    made = video.load(tmp_path / "out")[0]
    plain = i2vgen.load(overrides=QUICK)(Image.fromarray(frames[0]), "a circle stands still", seed=0).frames

    def error(clip):
        return np.square(clip[-1].astype(float) - frames[-1]).mean()

    assert error(made) < error(plain) / 2


def test_long_clip(clip, tmp_path):
    frames, _, caption = clip
    Image.fromarray(frames[0]).save(tmp_path / "first.png")
    call("long_clip", tmp_path / "first.png", caption, tmp_path / "out", "windows=2", *QUICK)
    assert video.load(tmp_path / "out")[0].shape == (15, 32, 32, 3)

    # One window noised not at all is what generate makes.
    model = i2vgen.load(overrides=QUICK)
    example = load("long_clip")
    made = example["long_clip"](model, Image.fromarray(frames[0]), caption, windows=1, strength=0)
    assert np.array_equal(made, model(Image.fromarray(frames[0]), caption, seed=0).frames)
    with torch.no_grad():
        smoothed = example["smooth"](model, made, caption, 0, 0.3)
    assert smoothed.shape == made.shape and np.abs(smoothed.astype(int) - made).mean() < 20


def test_lora_one_motion(tmp_path):
    words = [tmp_path / "out", "motion=rotate", "steps=2", "clips=4"]
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / "lora_one_motion.py", *words],
        cwd=ROOT, capture_output=True, text=True, check=False,
        env={"PYTHONPATH": PATHS, "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    before, after = (video.load(tmp_path / "out" / f"{name}.gif")[0] for name in ("before", "after"))
    assert before.shape == after.shape == (8, 192, 192, 3)
    assert len(list((tmp_path / "out" / "clips").glob("*.gif"))) == 4


def test_control(tmp_path):
    call("control", tmp_path, "steps=2")
    made = {name: video.load(tmp_path / f"{name}.gif")[0] for name in ("edges", "with", "without")}
    assert made["with"].shape == made["edges"].shape and not np.array_equal(made["with"], made["without"])
    assert (tmp_path / "adapter.safetensors").stat().st_size < 500_000


def test_extra_tokens(tmp_path):
    call("extra_tokens", tmp_path, "steps=2")
    names = ("still", "right", "up", "grow", "between")
    made = [video.load(tmp_path / f"{name}.gif")[0] for name in names]
    assert all(clip.shape == (8, 192, 192, 3) for clip in made)
    assert not any(np.array_equal(made[0], clip) for clip in made[1:])
    assert (tmp_path / "tokens.safetensors").stat().st_size < 500_000

    numbers = load("extra_tokens")["numbers"]
    for kind, told in (("up", (0, -1, 0, 0)), ("grow", (0, 0, 1, 0)), ("rotate", (0, 0, 0, 1))):
        facts = next(
            facts
            for facts in (drawing.sample_facts(s, kind="basic") for s in range(999))
            if (facts.moves[0].kind, facts.moves[0].speed) == (kind, "quickly")
        )
        amount = {"up": 0.72, "grow": np.log(1.85), "rotate": np.radians(110.0)}[kind]
        assert numbers(facts).tolist() == pytest.approx([amount * one for one in told], abs=1e-6)
