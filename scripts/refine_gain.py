"""What a second stage gains over plain upscaling of the same clips, measured on the procedural world.

    python scripts/refine_gain.py [refine_weights=FOLDER] [weights=FOLDER] [clips=N] [first_seed=S]
    [sources=NAME,NAME] [json=OUT.json] [output=STRIP.png] [setting=value ...]

    python scripts/refine_gain.py clips=64 json=outputs/gain.json
    python scripts/refine_gain.py refine_weights=outputs/train/small_refiner/weights refine.steps=4 clips=16

    refine_weights= the second stage; none given: the small refiner that comes with the package
    weights=        the first stage; none given: the small model that comes with the package
    clips=          seeds of the world, 32; first_seed= the first of them, 0
    sources=        kinds of small clips: drawn (the world's), decoded (those through the first stage's
                    autoencoder), made (by the first stage, from first frame and caption); none given: all
    json=           all scores, per clip
    output=         a picture: truth, bilinear, bicubic, refined of the first clips, in lines

PSNR and SSIM are against the world's clip of the same seed at the large size; sharpness and flicker are parts
of that clip's; still is the change from frame to frame, in levels of 255, where that clip stands still.
"""

from __future__ import annotations

import sys
from pathlib import Path

from tqdm import tqdm

from i2vgen import cli
from i2vgen.evaluation import pages, refiner_gain
from i2vgen.evaluation.pages import Table
from i2vgen.evaluation.refiner_gain import Plan
from i2vgen.fast import runtime
from i2vgen.settings.config import SHIPPED, SHIPPED_REFINER
from i2vgen.settings.merge import load_config

FLAGS = ("--help",)
NUMBERS, TEXTS = ("clips", "first_seed"), ("sources", "json")
SHOWN = 4  # clips in the picture


def main() -> int:
    file, words, flags = cli.split(["--help" if w == "-h" else w for w in sys.argv[1:]], FLAGS)
    if "--help" in flags:
        print(__doc__)
        return 0
    own, words = cli.take(words, numbers=NUMBERS, texts=TEXTS)
    out = own.pop("json", None)
    if "sources" in own:
        own["sources"] = tuple(own["sources"].split(","))
    plan = Plan(**own)
    if not any(word.startswith("refine_weights=") for word in words):
        words.append(f"refine_weights={SHIPPED_REFINER}")
    config = load_config(file, words, default_weights=SHIPPED)
    refiner_gain.check(config)
    path = pages.check_file("json", Path(out)) if out else None
    picture = pages.check_file("output", Path(config.output)) if config.output else None

    runtime.apply(config.runtime)
    with tqdm(total=plan.clips * len(plan.sources), unit="clip", mininterval=0.5) as bar:
        found = refiner_gain.measure(config, plan, shown=SHOWN if picture else 0, on_clip=bar.update)
    print(pages.as_text(Table("", refiner_gain.HEAD, tuple(refiner_gain.rows(found)), words=(0, 1))))
    if path is not None:
        pages.write_json(found.to_dict(), path)
        print(f"\nscores in {path}")
    if picture is not None:
        refiner_gain.strip(found, plan.sources[-1], frame=-1).save(picture)
        print(f"\npicture in {picture}")
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
