"""Fine-tune the model on one motion with LoRA: a folder of clips, a short training run, a sample.

    python examples/lora_one_motion.py outputs/lora motion=rotate steps=200

Writes OUT/clips (GIFs and captions.csv, in the form your own folder would have), trains OUT/run/adapter, and
samples OUT/before.gif and OUT/after.gif with the same seed. The adapter (peft's format) has a few hundred kB.
"""

import argparse
import csv
import itertools
import subprocess
import sys
from pathlib import Path

from PIL import Image

import i2vgen
from i2vgen.files import video
from i2vgen.settings.config import LAB
from i2vgen.world import drawing


def clips_of(motion):
    """Seed, facts and caption of the world's clips with this motion, from seed 10 million up."""
    for seed in itertools.count(10_000_001):
        facts = drawing.sample_facts(seed, kind="basic")
        if facts.moves[0].kind == motion:
            yield seed, facts, drawing.caption(facts, seed)


def write_clips(folder, clips, sample):
    """Write one GIF per clip, and their captions."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [("file", "caption")]
    for seed, facts, caption in clips:
        frames = drawing.render(facts, width=sample.width, height=sample.height, frames=sample.frames)
        video.save(frames, folder / f"{seed}.gif", fps=sample.fps)
        rows.append((f"{seed}.gif", caption))
    with (folder / "captions.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("settings", nargs="*", help="motion=rotate, steps=200, clips=64")
    given = parser.parse_args()
    options = {"motion": "rotate", "steps": "200", "clips": "64"} | dict(s.split("=") for s in given.settings)
    out, sample = given.output, i2vgen.load("lab").config.sample

    clips = clips_of(options["motion"])
    write_clips(out / "clips", itertools.islice(clips, int(options["clips"])), sample)
    words = ["train.part=diffusion", f"weights={LAB}", f"train.data={out / 'clips'}", "train.lora_rank=8",
             f"train.steps={options['steps']}", "train.batch=4", "train.learning_rate=0.002",
             "train.timestep_power=2", f"output={out / 'run'}"]  # fmt: skip
    subprocess.run([sys.executable, "-m", "i2vgen", "train", *words], check=True)

    _, held_out, caption = next(clips)
    first = drawing.render(held_out, width=sample.width, height=sample.height, frames=1)[0]
    for name, words in (("before", []), ("after", [f"adapter={out / 'run' / 'adapter'}"])):
        clip = i2vgen.load("lab", overrides=words)(Image.fromarray(first), caption, seed=1)
        print(clip.save(out / f"{name}.gif"))


if __name__ == "__main__":
    main()
