"""Samples for VBench-I2V (Huang et al. 2025, "VBench++"): reads its pictures and prompts, uses its file
names.

The benchmark has a JSON list with one entry per prompt (`prompt_en`, `image_name`, `dimension`) and every
picture cropped to four shapes (crop/1-1, 8-5, 7-4, 16-9). It expects five samples per prompt in one folder,
named `{prompt}-{index}.mp4`, and assumes that all files there have the suffix of the first. Clips and their
records are therefore written to one folder, and the clips linked under their long names into another:

    OUTPUT/clips/000012-3.mp4, .json    clips with their records; a stopped run resumes from these
    OUTPUT/videos/{prompt}-3.mp4        the same clips, as the benchmark reads them
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from i2vgen.files import whole
from i2vgen.jobs import Job
from i2vgen.settings.config import MAX_SEED, Config
from i2vgen.settings.wording import counted

SAMPLES = 5  # per prompt, as the benchmark expects
RATIOS = ("1-1", "8-5", "7-4", "16-9")  # width to height, the names of the benchmark's folders
CAMERA = re.compile(r", camera [a-z ]+$")  # the end of a prompt of the dimension camera_motion
LONGEST_NAME = 255  # bytes in a file name


class Entry(NamedTuple):
    prompt: str
    image_name: str
    dimensions: tuple[str, ...]


@dataclass(frozen=True)
class Sample:
    """One clip to generate, and the benchmark's name for it."""

    job: Job
    name: str


def read_info(path: str, dimensions: Sequence[str] = ()) -> list[tuple[int, Entry]]:
    """Read the benchmark's list -> (index in it, entry) for the given dimensions; all if none are given.

    Early versions of the list name no picture for prompts with a camera move; they use the picture of the
    prompt without it.
    """
    try:
        raw = json.loads(Path(path).read_text(encoding="utf-8-sig"))
        rows = [(row["prompt_en"], row.get("image_name", ""), tuple(row["dimension"])) for row in raw]
        if not all(isinstance(text, str) for row in rows for text in (*row[:2], *row[2])):
            raise TypeError("expected text")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"info={path} is not a VBench-I2V list ({error!r}); give its vbench2_i2v_full_info.json"
        ) from error
    pictures = {prompt: image for prompt, image, _ in rows if image}
    found: dict[str, tuple[int, Entry]] = {}
    for place, (prompt, image, dims) in enumerate(rows):
        image = image or pictures.get(CAMERA.sub("", prompt), "")
        if not image:
            raise ValueError(
                f"info={path}: {prompt!r} names no picture, nor does the same prompt without a camera move"
            )
        if prompt in found and found[prompt][1].image_name != image:
            raise ValueError(
                f"info={path}: {prompt!r} appears with {found[prompt][1].image_name} and with {image}; "
                "samples are named by the prompt, so it can have one picture only"
            )
        before = found[prompt][1].dimensions if prompt in found else ()
        place = found[prompt][0] if prompt in found else place
        found[prompt] = place, Entry(prompt, image, tuple(dict.fromkeys((*before, *dims))))
    known = tuple(dict.fromkeys(dim for _, entry in found.values() for dim in entry.dimensions))
    if wrong := [dim for dim in dimensions if dim not in known]:
        raise ValueError(f"info={path} has no dimension {wrong[0]}; it has {', '.join(known) or 'none'}")
    wanted = set(dimensions or known)
    chosen = [(place, entry) for place, entry in found.values() if wanted & set(entry.dimensions)]
    if not chosen:
        raise ValueError(f"info={path} holds no prompts")
    return chosen


def crops(folder: str, width: int, height: int, ratio: str = "") -> tuple[Path, str]:
    """The benchmark's picture folder -> subfolder of the shape nearest to the clips', and the shape's name.

    A folder without such subfolders is used as it is; `ratio` overrides the shape.
    """
    place = Path(folder)
    if not place.is_dir():
        raise ValueError(f"images={folder} is not a folder; give the benchmark's crop folder")
    there = [name for name in RATIOS if (place / name).is_dir()]
    if ratio and ratio not in RATIOS:
        raise ValueError(f"ratio={ratio} is not one of the benchmark's; give {', '.join(RATIOS)}")
    nearest = ratio or min(RATIOS, key=lambda name: abs(math.log(width / height / shape(name))))
    if not there:
        return place, nearest
    if nearest not in there:
        raise ValueError(
            f"images={folder} has no {nearest}, the shape for {width} x {height} pixels; it has "
            f"{', '.join(there)}: add the missing folder, or give one of these as ratio="
        )
    return place / nearest, nearest


def shape(ratio: str) -> float:
    """ "16-9" -> 16 / 9"""
    width, height = ratio.split("-")
    return int(width) / int(height)


def plan(
    entries: Sequence[tuple[int, Entry]], pictures: Path, output: Path, config: Config, samples: int = SAMPLES
) -> list[Sample]:
    """The clips to generate. Each has its own seed: `sample.seed` + samples x index in the list + number."""
    base = config.sample.seed[0]
    if len(config.sample.seed) > 1:
        raise ValueError(f"seed is {list(config.sample.seed)}; give one; the clips' seeds count up from it")
    made = []
    for place, entry in entries:
        for index in range(samples):
            name = file_name(entry.prompt, index)
            seed = base + samples * place + index
            if seed > MAX_SEED:
                raise ValueError(
                    f"seed {base} counts up to {seed}, but the largest is {MAX_SEED}; give a smaller one"
                )
            clip = output / "clips" / f"{place:06}-{index}.mp4"
            made.append(Sample(Job(str(pictures / entry.image_name), entry.prompt, seed, clip), name))
    if lacking := [s.job.image for s in made if not Path(s.job.image).is_file()]:
        lacking = list(dict.fromkeys(lacking))
        raise ValueError(f"{counted(len(lacking), 'picture')} missing, such as {lacking[0]}; check images=")
    return made


def file_name(prompt: str, index: int) -> str:
    """The benchmark's name for a sample; ValueError if it is not a valid file name."""
    name = f"{prompt}-{index}.mp4"
    if "/" in name or "\0" in name or len(name.encode()) > LONGEST_NAME:
        raise ValueError(
            f"the prompt {prompt!r} cannot be a file name: it contains a slash or is longer than "
            f"{LONGEST_NAME} bytes; the benchmark finds samples only by their prompts"
        )
    return name


def link_samples(samples: Sequence[Sample], output: Path) -> Path:
    """Link every existing clip under the benchmark's name -> the folder of the links."""
    folder = output / "videos"
    folder.mkdir(parents=True, exist_ok=True)
    for sample in samples:
        if sample.job.output.exists():
            link(sample.job.output, folder / sample.name)
    return folder


def link(clip: Path, name: Path) -> None:
    """Make `name` a hard link to `clip`, or a copy if the file system has no hard links."""
    if name.exists() and os.path.samefile(clip, name):
        return
    with whole.replacing(name) as temporary:
        try:
            os.link(clip, temporary)
        except OSError:
            shutil.copyfile(clip, temporary)


def other_files(folder: Path) -> list[str]:
    """Files in the benchmark's folder that are not samples; the benchmark could pick up their suffix."""
    return sorted(p.name for p in folder.iterdir() if p.suffix != ".mp4") if folder.is_dir() else []
