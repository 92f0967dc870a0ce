"""The clips that one command makes: pictures and prompts paired item by item, each pair once per seed."""

from __future__ import annotations

import dataclasses
import glob
import itertools
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from i2vgen import pipeline
from i2vgen.diffusion.sampler import OnStep
from i2vgen.files import given, lists, plugins, records, video, whole
from i2vgen.settings import config as settings
from i2vgen.settings.config import Config

LONGEST_STEM = 200  # bytes; numbers, a seed and two endings follow
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
        """Its file is there, whole, and its record names the same settings (where to run may differ).

        So are the picture or clip that it was made from, if the record holds their hashes.
        """
        record = records.read(self.output)
        if record is None or not self.output.exists() or record.get("sha256") != records.sha256(self.output):
            return False
        if not record.get("reproducible", True):
            return False
        for path, kind in ((self.image, "image"), (config.video, "video")):
            held = record.get("inputs", {}).get(kind)
            if path and held and held["sha256"] != records.sha256(path):
                return False
        if config.plugins and record.get("plugins") != plugins.described(config):
            return False
        config = self.settings(config)
        wanted = records.settings_of(config, self.image, self.prompt, self.seed, self.output).to_dict()
        have = {"plugins": [], **record.get("settings", {})}  # records of earlier versions name none
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


def save(
    clips: Iterable[tuple[Job, pipeline.Video]],
    tell: Callable[[pipeline.Video, Path], object],
    at_end: Callable[[], object] = lambda: None,
) -> None:
    """Save every clip, then call `at_end`. One that cannot be saved costs no other: a note says so, and the
    end is an error."""
    failed = []
    for job, clip in clips:
        try:
            tell(clip, clip.save(job.output))
        except (OSError, ValueError) as error:
            warnings.warn(f"{job.output} is not saved: {error}", stacklevel=2)
            failed.append(error)
    at_end()
    if failed:
        raise failed[0]


def plan(
    config: Config, *, fresh: bool = False, decided: Callable[[Callable], dict] = lambda decide: decide()
) -> list[Job]:
    """All jobs of a configuration, checked: pictures are readable, outputs writable, names distinct.

    `fresh` is for clips that are not the rest of an earlier command: without a name given they are numbered,
    to replace no earlier ones, and no file is replaced that is no clip of ours. `decided` takes care that
    several processes find the same numbers (`Crew.decided`).
    """
    refuse_idle(config)
    if config.items and (config.image or config.prompt):
        raise ValueError("items= was given together with image= or prompt=; use either")
    if config.video:
        items = [{"image": "", "prompt": ""}]
    else:
        items = list(read_items(config.items)) if config.items else pair(config)
    sources = list(dict.fromkeys(item["image"] or config.video for item in items if not item.get("output")))
    names = {source: default_output(source) for source in sources}
    if fresh and not config.output and not config.items:
        names = decided(lambda: {source: free(name) for source, name in names.items()})
    jobs = []
    total = sum(len(item.get("seed", config.sample.seed)) for item in items)
    for item in items:
        for seed in item.get("seed", config.sample.seed):
            output = item.get("output") or config.output or names[item["image"] or config.video]
            if total > 1 and not ("output" in item and len(item.get("seed", config.sample.seed)) == 1):
                output = numbered(output, len(jobs), seed)
            refine_prompt = item.get("refine_prompt", config.refine_prompt)
            if config.refine_weights and not refine_prompt:
                refine_prompt = "".join(config.prompt) if config.video else item["prompt"]
            image, output = map(os.path.expanduser, (item["image"], output))
            jobs.append(Job(image, item["prompt"], seed, Path(output), refine_prompt))
    check(jobs, config)
    if fresh:
        for job in jobs:
            records.refuse_foreign(job.output)
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


def check(jobs: Sequence[Job], config: Config) -> None:
    """ValueError, before any work, for what would stop the jobs later: all that they read and write."""
    pictures = list(dict.fromkeys(job.image for job in jobs if job.image))
    for path in pictures:
        given.picture(path, exif=config.preprocess.exif, alpha=config.preprocess.alpha)
    given.prompt(config.negative_prompt)
    for job in jobs:
        given.prompt(job.prompt)
        given.prompt(job.refine_prompt)
    check_outputs(jobs, config, fps=None if follows_input(config) else config.save.fps)
    outputs = [job.output for job in jobs]
    places = [Path(os.path.realpath(path.parent), path.name) for path in outputs]
    if len(set(places)) < len(places):
        twice = next(path for path, place in zip(outputs, places, strict=True) if places.count(place) > 1)
        raise ValueError(f"two clips would be written to {twice}; give each its own output name")
    read = [*pictures, *(path for path in (config.items, config.video) if path)]
    whole.refuse_overwriting(outputs, read)
    whole.refuse_overwriting(map(records.path_of, outputs), read)


def check_outputs(
    jobs: Sequence[Job], config: Config, *, fps: float | None, size: tuple[int, int] | None = None
) -> None:
    """ValueError if a clip of this rate and (width, height) or its record cannot be written to its place."""
    made = config.refine if config.refine_weights else config.sample
    width, height = size or (made.width, made.height)
    for job in jobs:
        whole.check_place(f"output {job.output}", job.output)
        enlarged = config.save.enlarge * width, config.save.enlarge * height
        video.check_output(job.output, fps=fps, size=enlarged)
        records.check(job.output)


def follows_input(config: Config) -> bool:
    """Whether the clips get the frame rate of `video=`, which is known once it is read."""
    return bool(config.video) and config.refine.fps == "input"


def default_output(source: str) -> str:
    """outputs/PICTURE.mp4, with a name that numbers and a record still fit"""
    stem = Path(source).stem.encode("utf-8", "replace")[:LONGEST_STEM].decode("utf-8", "ignore")
    return f"outputs/{stem}.mp4"


def free(output: str) -> str:
    """outputs/boat.mp4, or outputs/boat-2.mp4 where files begin so already"""
    path = Path(output)
    for number in itertools.count(1):
        stem = path.stem + (f"-{number}" if number > 1 else "")
        if not any(path.parent.glob(f"{glob.escape(stem)}[.-]*")):
            return str(path.with_name(stem + path.suffix))


def numbered(output: str, index: int, seed: int) -> str:
    """clip.mp4 -> clip-003-seed8888.mp4"""
    path = Path(output)
    return str(path.with_name(f"{path.stem}-{index:03}-seed{seed}{path.suffix}"))
