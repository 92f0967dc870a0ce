"""What one call is asked to make: pictures and prompts paired item by item, every pair once per seed."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from i2vgen import config as settings
from i2vgen import images, pipeline, video
from i2vgen.config import Config

ITEM_FIELDS = ("image", "prompt", "seed", "output")


@dataclass(frozen=True)
class Job:
    """One clip to make."""

    image: str
    prompt: str
    seed: int
    output: Path

    def done(self, config: Config) -> bool:
        """Its file is there, whole, and its record names the same settings (where to run may differ)."""
        try:
            record = json.loads(pipeline.record_path(self.output).read_text())
            same_file = record["sha256"] == pipeline.sha256(self.output)
        except (OSError, ValueError, KeyError, TypeError):
            return False
        wanted = pipeline.recorded_config(config, self.image, self.prompt, self.seed, self.output).to_dict()
        have = dict(record.get("settings", {}))
        for settings_ in (wanted, have):
            settings_.pop("runtime", None)
        return same_file and have == wanted


def plan(config: Config) -> list[Job]:
    """All jobs of a configuration, checked: pictures are readable, outputs writable, names distinct."""
    if config.items and (config.image or config.prompt):
        raise ValueError("items= was given together with image= or prompt=; use either")
    items = list(read_items(config.items)) if config.items else pair(config)
    jobs = []
    total = sum(len(item.get("seed", config.sample.seed)) for item in items)
    for item in items:
        for seed in item.get("seed", config.sample.seed):
            output = item.get("output") or config.output or default_output(item["image"])
            if total > 1 and not ("output" in item and len(item.get("seed", config.sample.seed)) == 1):
                output = numbered(output, len(jobs), seed)
            jobs.append(Job(item["image"], item["prompt"], seed, Path(output)))
    check(jobs, config)
    return jobs


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
    """Records of a JSONL file: `image` and `prompt`, perhaps `seed` (one or a list) and `output`."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"items={path} cannot be read: {error}") from error
    count = 0
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            item = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number} is no JSON: {error}") from error
        if not isinstance(item, dict) or not {"image", "prompt"} <= item.keys() <= set(ITEM_FIELDS):
            raise ValueError(
                f"{path}, line {number}: expected an object with image and prompt and maybe seed, output"
            )
        for name in ("image", "prompt", "output"):
            if not isinstance(item.get(name, ""), str):
                raise ValueError(f"{path}, line {number}: {name} is {item[name]!r}, expected text")
        if "seed" in item:
            seeds = item["seed"] if isinstance(item["seed"], list) else [item["seed"]]
            if not seeds or any(type(s) is not int or not 0 <= s <= settings.MAX_SEED for s in seeds):
                raise ValueError(
                    f"{path}, line {number}: seed is {item['seed']!r}, expected 0 to {settings.MAX_SEED}"
                )
            item["seed"] = seeds
        count += 1
        yield item
    if count == 0:
        raise ValueError(f"items={path} holds no records")


def check(jobs: list[Job], config: Config) -> None:
    outputs = [job.output for job in jobs]
    records = [
        os.path.abspath(pipeline.record_path(path)) for path in outputs
    ]  # clip.mp4, clip.gif share one
    if len(set(records)) < len(records):
        twice = next(path for path, record in zip(outputs, records, strict=True) if records.count(record) > 1)
        raise ValueError(
            f"two clips would be written to {twice} or to its record; give each its own output name"
        )
    read = {os.path.abspath(path): path for path in (*(job.image for job in jobs), config.items) if path}
    for output, record in zip(outputs, records, strict=True):
        if taken := {os.path.abspath(output), record} & read.keys():
            raise ValueError(f"output {output} would overwrite {read[taken.pop()]}; choose another name")
    for path in dict.fromkeys(job.image for job in jobs):
        images.open_picture(path, exif=config.preprocess.exif, alpha=config.preprocess.alpha)
    for path in outputs:
        size = config.save.enlarge * config.sample.width, config.save.enlarge * config.sample.height
        video.check_output(path, fps=config.save.fps, size=size)


def default_output(image: str) -> str:
    return f"outputs/{Path(image).stem}.mp4"


def numbered(output: str, index: int, seed: int) -> str:
    """clip.mp4 -> clip-003-seed8888.mp4"""
    path = Path(output)
    return str(path.with_name(f"{path.stem}-{index:03}-seed{seed}{path.suffix}"))
