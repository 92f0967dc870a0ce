"""Score your own videos, from any model: fidelity to the picture, steadiness, motion.

    i2vgen score videos=FOLDER [against=FOLDER] [reference=FOLDER] [metrics=NAME,NAME]
    [json=OUT.json] [output=FOLDER] [setting=value ...]

    i2vgen score videos=outputs/mine
    i2vgen score videos=outputs/mine against=outputs/theirs metrics=flicker,motion
    i2vgen score videos=clips.jsonl reference=true clip_weights=weights/xl json=outputs/scores.json

    videos=         a folder of videos, one video, or a list (.jsonl, .csv) of file, image, prompt; for clips
                    of `i2vgen generate` the folder is enough, since each has a record beside it
    against=        videos of another model, paired by name: prints differences with intervals
    reference=      true videos with the same names; fit=crop prepares those of another size like pictures
    metrics=        names, see --list (default: all whose requirements are met)
    frames=         use only the first so many frames of every clip
    clip_weights=   native weights folder whose CLIP is the judge
    clip_model=, clip_checkpoint=   another judge: name of an open_clip model, and the file of its weights
    lpips_network=, fvd_network=    FILE.py:NAME, MODULE:NAME or a TorchScript file
    device=         auto, cpu, cuda
    json=           file for all results, per clip and overall
    output=         folder for index.html (one page with the scores and the first clips) and scores.json
    --list          print every metric with its definition, and stop

A network for LPIPS or FVD is a program: use only your own or one you trust. See docs/evaluation.md.
"""

from __future__ import annotations

import dataclasses

from tqdm import tqdm

from i2vgen import cli
from i2vgen.files import whole
from i2vgen.scoring import report, scores
from i2vgen.scoring.scores import Plan

FLAGS = ("--list",)
TEXTS = tuple(f.name for f in dataclasses.fields(Plan) if f.name != "frames")


def main(argv: list[str]) -> int:
    file, words, flags = cli.split(argv, FLAGS)
    if "--list" in flags:
        print(report.listing())
        return 0
    if file is not None:
        raise ValueError(f"{file} is no setting; write videos={file}")
    given = cli.take_all(words, numbers=("frames",), texts=(*TEXTS, "json", "output"))
    json_path = cli.check_file("json", given.pop("json"), argv) if "json" in given else None
    folder = given.pop("output", None)
    folder = whole.check_results("output=", folder, report.FILES) if folder else None
    if "videos" not in given:
        raise ValueError("no videos given; write videos=FOLDER")
    if "metrics" in given:
        given["metrics"] = tuple(given["metrics"].split(","))
    job = scores.prepare(Plan(**given))
    judges = scores.load_judges(job)

    with tqdm(total=sum(len(model.clips) for model in job.models), unit="clip", mininterval=0.5) as bar:
        found = scores.run(job, judges, on_clip=bar.update)
    print(report.describe(found))
    print(report.table(found, job.names))
    for line in report.notes(job, found):
        print(line)
    if json_path is not None:
        whole.write_json(json_path, report.to_dict(job, found), allow_nan=False)
        print(f"scores in {cli.shown(json_path)}")
    if folder is not None:
        print(f"page in {cli.shown(report.write_page(job, found, folder))}")
    return 0
