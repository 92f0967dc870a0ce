"""docs/finetune.md, small: a folder of clips becomes prepared data, an adapter, a model, a study, clips."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from i2vgen.files import reading, video
from i2vgen.world import drawing

ENDINGS = (".mp4", ".gif", ".webp", "")  # "": a folder of PNGs
SMALL = ["weights=lab", "device=cpu", "train.batch=2", "train.warmup=1", "train.log_every=1"]
KILLED_AFTER, STEPS = 2, 6


def write_clips(folder, count, first):
    """Clips of the drawn world as somebody's own: four formats, two sizes, three lengths, with captions."""
    folder.mkdir()
    rows = ["file,caption"]
    for number in range(count):
        side, frames = (32, 48)[number % 2], (8, 9, 12)[number % 3]
        clip = drawing.clip(first + number, width=side, height=side, frames=frames, kind="basic")
        name = f"clip{number}{ENDINGS[number % 4]}"
        video.save(clip.frames, folder / name, fps=8)
        rows.append(f'{name},"{clip.caption}"')
    (folder / "captions.csv").write_text("\n".join(rows))


def steps_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.fixture
def run(run_script, tmp_path, monkeypatch):
    """run(script, *words) in an empty folder -> what it printed; it must succeed."""
    monkeypatch.chdir(tmp_path)

    def checked(script, *words):
        status, out = run_script(f"{script}.py", *words)
        assert not status, out
        return out

    return checked


def test_the_road_from_clips_to_a_shared_model(run, run_script):
    write_clips(Path("clips"), 9, first=0)
    write_clips(Path("held_out"), 3, first=100)
    for name in ("clips", "held_out"):
        run("prepare", f"data={name}", f"output=prepared_{name}", "weights=lab", "device=cpu")

    held = ["train.validate=prepared_held_out", "train.validate_every=2"]
    adapter = ["train.data=prepared_clips", "train.lora_rank=2", "train.steps=2", "train.sample_every=2"]
    run("train", *SMALL, *adapter, *held, "output=lora")
    assert 0 < steps_of(Path("lora"))[-1]["validation_loss"] < 10
    strip = Image.open(next(Path("lora/samples").glob("*.png")))
    assert strip.width >= 8 * 32 and Path("lora/best").is_dir()

    full = [*SMALL, "train.data=prepared_clips", f"train.steps={STEPS}", "train.save_every=1", *held]
    killed = subprocess.Popen([sys.executable, "-m", "i2vgen", "train", *full, "output=full"])
    until = time.monotonic() + 120
    while not Path(f"full/checkpoint-{KILLED_AFTER:08d}").is_dir():
        assert killed.poll() is None and time.monotonic() < until
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    run("train", *full, "output=full")
    told = steps_of(Path("full"))
    assert [line["step"] for line in told if "loss" in line] == list(range(1, STEPS + 1))
    assert [line["step"] for line in told if "validation_loss" in line] == [2, 4, 6]

    Path("study.yaml").write_text(
        "# Does a higher rank learn my clips better?\n"
        "measures: [trained]\n"
        "variants: {rank 2: [train.lora_rank=2], rank 4: [train.lora_rank=4]}\n"
        "start: weights\n"
        "train: {data: prepared_clips, learning_rate: 0.001}\n"
        "evaluate: {videos: held_out, metrics: [first_frame_psnr, reference_psnr]}\n"
    )
    out = run("ablate", "study.yaml", "budget=smoke", "output=study", "workers=1")
    assert "rank 4" in out and "held-out clips of held_out" in Path("study/index.html").read_text()

    picture = drawing.clip(100, width=32, height=32, frames=1, kind="basic").frames[0]
    Image.fromarray(picture).save("picture.png")
    words = ["image=picture.png", "prompt=it grows", "steps=2", "device=cpu"]
    run("generate", *words, "weights=lab", "adapter=lora/best", "output=one.mp4")
    run("generate", *words, "weights=full/best", "output=two.mp4")
    frames = [reading.load(Path(name))[0] for name in ("one.mp4", "two.mp4")]
    assert frames[0].shape == frames[1].shape and not np.array_equal(*frames)
