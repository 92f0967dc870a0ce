"""Measure the gain of a second stage over plain upscaling, on the procedural world.

    i2vgen refine-gain [refine_weights=FOLDER] [weights=FOLDER] [clips=N] [first_seed=S]
    [sources=NAME,NAME] [json=OUT.json] [output=STRIP.png] [setting=value ...]

    i2vgen refine-gain clips=64 json=outputs/gain.json
    i2vgen refine-gain refine_weights=outputs/train/small_refiner/weights refine.steps=4 clips=16

    refine_weights= the second stage (default: the lab model's)
    weights=        the first stage (default: the lab model)
    clips=          number of seeds, default 32; first_seed= is the first of them, default 0
    sources=        kinds of small clips (default: all): drawn (the world's), decoded (the same after the
                    first stage's autoencoder), made (by the first stage, from first frame and caption)
    json=           file for all scores, per clip
    output=         picture of the first clips, in rows: true clip, bilinear, bicubic, refined

PSNR and SSIM compare with the world's clip of the same seed at the large size. Sharpness and flicker are
fractions of that clip's. "Still" is the change from frame to frame, in levels of 255, where that clip does
not move.
"""

from __future__ import annotations

from tqdm import tqdm

from i2vgen import cli
from i2vgen.evaluation import refiner_gain
from i2vgen.evaluation.refiner_gain import Plan
from i2vgen.fast import runtime
from i2vgen.files import whole
from i2vgen.files.tables import Table
from i2vgen.settings.config import LAB, SHIPPED_REFINER
from i2vgen.settings.merge import load_config

NUMBERS, TEXTS = ("clips", "first_seed"), ("sources", "json")
SHOWN = 4  # clips in the picture


def main(argv: list[str]) -> int:
    file, words, _ = cli.split(argv)
    own, words = cli.take(words, numbers=NUMBERS, texts=TEXTS)
    out = own.pop("json", None)
    if "sources" in own:
        own["sources"] = tuple(own["sources"].split(","))
    plan = Plan(**own)
    if not any(word.startswith("refine_weights=") for word in words):
        words.append(f"refine_weights={SHIPPED_REFINER}")
    if not any(word.startswith("weights=") for word in words):
        words.append(f"weights={LAB}")  # the model whose clips the shipped refiner refines
    config = load_config(file, words)
    refiner_gain.check(config)
    path = cli.check_file("json", out, argv) if out else None
    picture = cli.check_picture("output", config.output, argv) if config.output else None

    runtime.apply(config.runtime)
    with tqdm(total=plan.clips * len(plan.sources), unit="clip", mininterval=0.5) as bar:
        found = refiner_gain.measure(config, plan, shown=SHOWN if picture else 0, on_clip=bar.update)
    print(Table("", refiner_gain.HEAD, tuple(refiner_gain.rows(found)), words=(0, 1)))
    if path is not None:
        whole.write_json(path, found.to_dict(), allow_nan=False)
        print(f"\nscores in {path}")
    if picture is not None:
        cli.save_picture(refiner_gain.strip(found, plan.sources[-1], frame=-1), picture)
        print(f"\npicture in {cli.shown(picture)}")
    return 0
