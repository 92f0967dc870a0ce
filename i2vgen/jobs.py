"""The clips that one command makes: pictures and prompts paired item by item, each pair once per seed."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from i2vgen import pipeline
from i2vgen.diffusion.sampler import OnStep
from i2vgen.files import images, lists, records, video
from i2vgen.settings import config as settings
from i2vgen.settings.config import Config

ITEM_FIELDS = ("image", "prompt", "seed", "output", "refine_prompt")


@dataclass(frozen=True)
class Job:
    """One clip to make."""

    image: str
    prompt: str
    seed: int
    output: Path
    refine_prompt: str = ""

    def settings(self, config: Config) -> Config:
        """The configuration with this job's own text for the second stage."""
        return dataclasses.replace(config, refine_prompt=self.refine_prompt)

    def done(self, config: Config) -> bool:
        """Its file is there, whole, and its record names the same settings (where to run may differ)."""
        record = records.read(self.output)
        if record is None or not self.output.exists() or record.get("sha256") != records.sha256(self.output):
            return False
        config = self.settings(config)
        wanted = records.settings_of(config, self.image, self.prompt, self.seed, self.output).to_dict()
        have = dict(record.get("settings", {}))
        for settings_ in (wanted, have):
            settings_.pop("runtime", None)
        return have == wanted


def make(
    model: pipeline.I2VGenXL, batch: Sequence[Job], on_step: OnStep | None = None
) -> Iterator[tuple[Job, pipeline.Video]]:
    """The clips of one batch, each with the settings that its record is to hold."""
    clips = model.generate(
        [job.image for job in batch],
        [job.prompt for job in batch],
        [job.seed for job in batch],
        on_step=on_step,
    )
    for job, clip in zip(batch, clips, strict=True):
        yield job, dataclasses.replace(clip, config=job.settings(clip.config))


def plan(config: Config) -> list[Job]:
    """All jobs of a configuration, checked: pictures are readable, outputs writable, names distinct."""
    refuse_idle(config)
    if config.items and (config.image or config.prompt):
        raise ValueError("items= was given together with image= or prompt=; use either")
    if config.video:
        items = [{"image": "", "prompt": ""}]
    else:
        items = list(read_items(config.items)) if config.items else pair(config)
    jobs = []
    total = sum(len(item.get("seed", config.sample.seed)) for item in items)
    for item in items:
        for seed in item.get("seed", config.sample.seed):
            output = item.get("output") or config.output or default_output(item["image"] or config.video)
            if total > 1 and not ("output" in item and len(item.get("seed", config.sample.seed)) == 1):
                output = numbered(output, len(jobs), seed)
            refine_prompt = item.get("refine_prompt", config.refine_prompt)
            if config.refine_weights and not refine_prompt:
                refine_prompt = "".join(config.prompt) if config.video else item["prompt"]
            jobs.append(Job(item["image"], item["prompt"], seed, Path(output), refine_prompt))
    check(jobs, config)
    return jobs


def refuse_idle(config: Config) -> None:
    """ValueError for parts of a job that contradict each other or that nothing would read."""
    if config.video and (config.image or config.items):
        raise ValueError(
            "video= refines a clip that is there, image= and items= make a new one; use either of them"
        )
    if config.video and not config.refine_weights:
        raise ValueError(
            f"video={config.video} needs a refiner: refine_weights=FOLDER (docs/cascade.md), or "
            "refine_weights=random to try the program without weights"
        )
    if config.video and len(config.prompt) > 1:
        raise ValueError("video= is one clip and takes one text; give refine_prompt= once, or prompt= once")
    if config.refine_prompt and not config.refine_weights:
        raise ValueError("refine_prompt= is read by the second stage, which needs refine_weights=FOLDER")


def pair(config: Config) -> list[dict]:
    """image= and prompt= item by item; one of either serves all."""
    pictures, prompts = config.image, config.prompt
    if not pictures:
        raise ValueError("no picture given; write image=PATH")
    if not all(pictures):
        raise ValueError("image= is empty; write image=PATH")
    if not prompts:
        raise ValueError(
            'no prompt given; write prompt="what should happen" (prompt= alone is an empty prompt)'
        )
    n = max(len(pictures), len(prompts))
    if len(pictures) not in (1, n) or len(prompts) not in (1, n):
        raise ValueError(
            f"{len(pictures)} pictures and {len(prompts)} prompts cannot be paired; give as many of each, "
            "or one of either"
        )
    pictures, prompts = (values * n if len(values) == 1 else values for values in (pictures, prompts))
    return [{"image": image, "prompt": prompt} for image, prompt in zip(pictures, prompts, strict=True)]


def read_items(path: str) -> Iterator[dict]:
    """Records of a JSONL file: `image` and `prompt`, perhaps `seed` (one or a list) and `output`.

    Pictures are relative to the working folder or to the list's.
    """
    item = None
    for number, item in lists.json_rows(path, expected="image and prompt", setting="items="):
        where = f"{path}, line {number}"
        if not {"image", "prompt"} <= item.keys() <= set(ITEM_FIELDS):
            raise ValueError(
                f"{where}: expected an object with image and prompt and maybe seed, output, refine_prompt; "
                f"it has {', '.join(map(repr, item)) or 'nothing'}"
            )
        for name in ("image", "prompt", "output", "refine_prompt"):
            if not isinstance(item.get(name, ""), str):
                raise ValueError(f"{where}: {name} is {item[name]!r}, expected text")
        for name in ("image", "output"):
            if "\0" in item.get(name, ""):
                raise ValueError(f"{where}: {name} is {item[name]!r}, but a path holds no \\0")
        if "seed" in item:
            seeds = item["seed"] if isinstance(item["seed"], list) else [item["seed"]]
            if not seeds or any(type(s) is not int or not 0 <= s <= settings.MAX_SEED for s in seeds):
                raise ValueError(f"{where}: seed is {item['seed']!r}, expected 0 to {settings.MAX_SEED}")
            item["seed"] = seeds
        item["image"] = str(lists.resolved(path, item["image"]))
        yield item
    if item is None:
        raise ValueError(f"items={path} holds no records")


def check(jobs: list[Job], config: Config) -> None:
    outputs = [job.output for job in jobs]
    beside = [os.path.abspath(records.path_of(path)) for path in outputs]  # clip.mp4, clip.gif share one
    if len(set(beside)) < len(beside):
        twice = next(path for path, record in zip(outputs, beside, strict=True) if beside.count(record) > 1)
        raise ValueError(
            f"two clips would be written to {twice} or to its record; give each its own output name"
        )
    given = (*(job.image for job in jobs), config.items, config.video)
    read = {os.path.abspath(path): path for path in given if path}
    for output, record in zip(outputs, beside, strict=True):
        if taken := {os.path.abspath(output), record} & read.keys():
            raise ValueError(f"output {output} would overwrite {read[taken.pop()]}; choose another name")
    for path in dict.fromkeys(job.image for job in jobs if job.image):
        images.open_picture(path, exif=config.preprocess.exif, alpha=config.preprocess.alpha)
    made = config.refine if config.refine_weights else config.sample
    for path in outputs:
        size = config.save.enlarge * made.width, config.save.enlarge * made.height
        video.check_output(path, fps=config.save.fps, size=size)


def default_output(source: str) -> str:
    return f"outputs/{Path(source).stem}.mp4"


def numbered(output: str, index: int, seed: int) -> str:
    """clip.mp4 -> clip-003-seed8888.mp4"""
    path = Path(output)
    return str(path.with_name(f"{path.stem}-{index:03}-seed{seed}{path.suffix}"))
