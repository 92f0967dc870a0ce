"""Generate the samples for the public benchmark VBench-I2V, with the file names it expects.

    i2vgen vbench [config.yaml] info=vbench2_i2v_full_info.json images=CROP_FOLDER output=FOLDER
    [dimensions=NAME,NAME] [samples=5] [ratio=16-9] [share=1/4] [setting=value ...]

    i2vgen vbench info=vbench2_i2v_full_info.json images=crop output=outputs/vb weights=weights/xl
    i2vgen vbench ... dimensions=i2v_subject,i2v_background share=2/4

    info=         the benchmark's own list of prompts and pictures
    images=       its folder `crop`; of 1-1, 8-5, 7-4, 16-9 the aspect ratio nearest to the clips' is used
    output=       folder: videos/ is for the benchmark, clips/ holds the same files with their records
    dimensions=   use only the prompts of these dimensions
    ratio=        another aspect ratio than the nearest
    samples=      clips per prompt; the benchmark reads 5
    share=        1/4 to 4/4: every fourth clip, to split the work over four machines writing to one folder
    seed=         seed of the first clip; later clips in the list count up from it

An interrupted run continues where it stopped. All settings and their defaults: i2vgen/settings/config.py.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

from tqdm import tqdm

from i2vgen import cli, jobs, pipeline
from i2vgen.fast import runtime
from i2vgen.files import whole
from i2vgen.scoring import vbench
from i2vgen.settings.config import Config
from i2vgen.settings.merge import load_config
from i2vgen.settings.wording import counted

TEXTS = ("info", "images", "dimensions", "ratio", "share")


def main(argv: list[str]) -> int:
    file, words, _ = cli.split(argv)
    own, rest = cli.take(words, numbers=("samples",), texts=TEXTS)
    config = load_config(file, rest, sampling=True)
    samples, ratio = plan(own, config)
    todo = share(own.get("share", "1/1"), samples)
    jobs.check([sample.job for sample in todo], config)
    whole.check_folder("output=", Path(config.output) / "videos")
    left = [sample for sample in todo if not sample.job.done(config)]
    print(f"{counted(len(todo), 'clip')}, {len(todo) - len(left)} of them done")
    if left:
        make(config, left)
    folder = vbench.link_samples(samples, Path(config.output))
    there = sum((folder / sample.name).exists() for sample in samples)
    print(f"{there} of {len(samples)} samples in {folder}; the benchmark's call for each dimension:")
    print(f"python evaluate_i2v.py --videos_path {folder} --ratio {ratio} --dimension NAME")
    return 0


def plan(own: dict, config: Config) -> tuple[list[vbench.Sample], str]:
    """All samples of the benchmark, and the shape of its pictures."""
    for name in ("info", "images"):
        if not own.get(name):
            raise ValueError(f"no {name} given; write info=LIST.json images=CROP_FOLDER output=FOLDER")
    if not config.output:
        raise ValueError("no output given; write output=FOLDER")
    for name in ("image", "prompt", "items", "video", "refine_weights"):
        if getattr(config, name):
            raise ValueError(f"{name}= has no effect here: pictures and prompts are the benchmark's")
    samples = cli.at_least_one("samples", own.get("samples", vbench.SAMPLES))
    dimensions = tuple(name for name in own.get("dimensions", "").split(",") if name)
    entries = vbench.read_info(own["info"], dimensions)
    pictures, ratio = vbench.crops(
        own["images"], config.sample.width, config.sample.height, own.get("ratio", "")
    )
    output = Path(config.output)
    if odd := vbench.other_files(output / "videos"):
        raise ValueError(
            f"{output / 'videos'} holds {odd[0]}, which is no sample; the benchmark assumes one "
            "file extension for the whole folder: move it away"
        )
    return vbench.plan(entries, pictures, output, config, samples), ratio


def share(text: str, samples: list[vbench.Sample]) -> list[vbench.Sample]:
    """ "2/4": the second of every four."""
    if not (match := re.fullmatch(r"(\d+)/(\d+)", text)) or not 1 <= int(match[1]) <= int(match[2]):
        raise ValueError(f"share={text}: write 1/4 for the first of four")
    return samples[int(match[1]) - 1 :: int(match[2])]


def make(config: Config, todo: list[vbench.Sample]) -> None:
    size = min(config.runtime.batch, len(todo))
    config = dataclasses.replace(config, runtime=dataclasses.replace(config.runtime, batch=size))
    runtime.apply(config.runtime)
    model = pipeline.load_parts(config, tell=lambda estimate: print(f"memory: {estimate}"))
    with tqdm(total=len(todo), unit="clip", mininterval=0.5) as bar:
        for start in range(0, len(todo), size):
            batch = [sample.job for sample in todo[start : start + size]]
            jobs.save(jobs.make(model, batch), lambda clip, path: bar.update())
