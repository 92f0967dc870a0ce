"""Score a model on clips of the procedural world that are never used in training.

    i2vgen evaluate [config.yaml] [weights=FOLDER] [clips=N] [first_seed=S] [json=OUT.json]
    [output=FOLDER] [sweep=NAME] [setting=value ...]

    i2vgen evaluate clips=64 json=outputs/scores.json
    i2vgen evaluate weights=outputs/mine/weights steps=20 guidance=3 output=outputs/mine/scores
    i2vgen evaluate sweep=conditions output=outputs/conditions
    i2vgen evaluate clips=8 sweep=quality output=outputs/quality
    i2vgen evaluate weights=FOLDER things=i2vgen/assets/things clips=64 output=outputs/pictures

    weights=        native weights folder (default: the shipped model); it determines the sizes
    clips=          number of seeds, default 64; each gives three clips, see docs/evaluation.md
    first_seed=     the first seed, default 0
    json=           file for all scores, with intervals and settings
    output=         folder for index.html (one page with clips), clips.png (a contact sheet of the first 32
                    clips of any kind, unselected), scores.json, table.md
    sweep=          guidance, steps, eta: also score other values; conditions: remove one at a time;
                    quality, samplers: presets, or solvers x network calls, against a 200-step reference
    things=         what the clips show: "shapes" (flat ones), or pictures of things, from a folder of PNG
                    cut-outs with alpha, named as they show (i2vgen/assets/things), or from a colour-emoji
                    font, of which it takes those that training never shows. Default: what the weights were
                    trained on, with the shipped things
    backgrounds=    with things=: also put them on the photographs of this folder
    plugins=        a Python file that changes the model before its weights are loaded, docs/laboratory.md
    batch=          batch size, default 8; affects memory and speed only

    torchrun --nproc-per-node 4 -m i2vgen evaluate ...      the processes share the clips

All settings and their defaults are in i2vgen/settings/config.py.
"""

from __future__ import annotations

import dataclasses

from tqdm import tqdm

from i2vgen import cli, pipeline
from i2vgen.evaluation import evaluate, pages
from i2vgen.evaluation.evaluate import Plan
from i2vgen.fast import processes, runtime
from i2vgen.fast.processes import Crew
from i2vgen.files import whole
from i2vgen.settings.config import Config
from i2vgen.settings.merge import load_config

BATCH = 8
NUMBERS, TEXTS = ("clips", "first_seed"), ("sweep", "json", "things", "backgrounds")


def main(argv: list[str]) -> int:
    with processes.crew() as crew, crew.quiet():
        return score(argv, crew)


def score(argv: list[str], crew: Crew) -> int:
    file, overrides, _ = cli.split(argv)
    own, overrides = take(overrides)
    plan = Plan(**{name: own[name] for name in own if name != "json"})
    config = batched(load_config(file, overrides, sampling=True), overrides)
    if job := [name for name in ("image", "prompt", "items") if getattr(config, name)]:
        raise ValueError(f"{job[0]}= has no effect here: pictures and prompts come from the world's clips")
    config = crew.place(config)
    plan = evaluate.suited(plan, config)
    rows = evaluate.check(config, plan)
    json_path = cli.check_file("json", own["json"], argv) if "json" in own else None
    folder = whole.check_results("output=", config.output, pages.FILES) if config.output else None

    cli.tell_plugins(config)
    runtime.apply(config.runtime)
    model = pipeline.load_parts(config)
    shared = crew if model.ranks is None else processes.ALONE  # or all of them compute every clip
    total = -(-rows * 3 * plan.clips // shared.world)
    with tqdm(total=total, unit="clip", mininterval=0.5, disable=crew.rank > 0) as bar:
        found = evaluate.evaluate(
            model, plan, on_clips=lambda row, count: advance(bar, row, count), crew=shared
        )
    if crew.rank > 0:
        return 0
    print(pages.summary(found))
    if note := evaluate.seen_in_training(plan):
        print(f"note: {note}")
    for table in pages.tables(found):
        print(f"\n{table}")
    if json_path is not None:
        whole.write_json(json_path, found.to_dict(), allow_nan=False)
        print(f"\nscores in {cli.shown(json_path)}")
    if folder is not None:
        print(f"\npage in {cli.shown(pages.write_report(found, folder))}")
    return 0


def take(overrides: list[str]) -> tuple[dict, list[str]]:
    """name=value words -> this command's own options by name, and the rest, which are settings"""
    for word in overrides:
        if word.startswith(("seed=", "sample.seed=")):
            raise ValueError(
                f"{word} has no effect here: the noise of a clip uses the clip's own seed; use first_seed="
            )
    return cli.take(overrides, numbers=NUMBERS, texts=TEXTS)


def batched(config: Config, overrides: list[str]) -> Config:
    """`i2vgen generate` defaults to one clip at a time; here there are many."""
    if config.runtime.batch > 1 or any(w.startswith(("batch=", "runtime.batch=")) for w in overrides):
        return config
    return dataclasses.replace(config, runtime=dataclasses.replace(config.runtime, batch=BATCH))


def advance(bar: tqdm, row: str, count: int) -> None:
    bar.set_description(row, refresh=False)
    bar.update(count)
