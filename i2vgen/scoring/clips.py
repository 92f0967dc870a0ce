"""Which clips are to be scored, from which picture and prompt each was made, and their frames.

A folder holds videos, folders of frame_0000.png, ..., or both. What a clip was made from stands in the JSON
that generation writes beside it, or in a list, one line per clip:

    {"file": "a.mp4", "image": "a.png", "prompt": "a boat sails", "reference": "true/a.mp4"}     .jsonl
    file,image,prompt                                                                            .csv

Only `file` must be there (`output`, as lists for generate.py have it, will do). Paths are those of the
working folder, or of the list's own folder. `name`, by which the clips of two models are paired, is the
file's without folder and ending, unless given.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from i2vgen.files import images, records, video
from i2vgen.settings.config import Preprocess

VIDEOS = (".mp4", ".gif", ".webp", ".mov", ".mkv", ".avi", ".webm", ".m4v")
LISTS = (".jsonl", ".csv")
FIELDS = ("file", "image", "prompt", "reference", "name")


@dataclass(frozen=True)
class Clip:
    """One video and what is known of it; empty text: not known."""

    name: str  # by which clips of two models are paired: path inside the folder, without ending
    file: Path
    image: str = ""
    prompt: str | None = None
    reference: str = ""
    preprocess: Preprocess = Preprocess()  # noqa: RUF009 (frozen)
    enlarge: int = 1  # every sampled pixel is a square of this many in the file


# ---------------------------------------------------------------------------------------------------
# Finding


def find(setting: str, path: str) -> list[Clip]:
    """All clips of a folder, a list, or one video, in the order of their names (a list: its own)."""
    place = Path(path)
    if place.suffix.lower() in LISTS and place.is_file():
        clips = list(read_list(setting, place))
    elif place.is_dir() and not is_frames(place):
        found = sorted(p for p in place.rglob("*") if is_video(p))
        clips = [with_record(Clip(bare(p.relative_to(place), p), p)) for p in found]
    elif is_video(place):
        clips = [with_record(Clip(bare(Path(place.name), place), place))]
    elif place.exists():
        raise ValueError(
            f"{setting}={path} is neither a video ({', '.join(VIDEOS)}, a folder of frame_0000.png, ...), "
            "nor a folder of videos, nor a list (.jsonl, .csv)"
        )
    else:
        raise ValueError(f"{setting}={path} does not exist; give a folder of videos, a video, or a list")
    if not clips:
        raise ValueError(
            f"{setting}={path} holds no videos; known are {', '.join(VIDEOS)} and folders of PNGs"
        )
    names = [clip.name for clip in clips]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(
            f"{setting}={path} holds two clips called {twice} (endings do not count); rename one"
        )
    return clips


def bare(name: Path, path: Path) -> str:
    """A name without its ending; folders have none."""
    return str(name) if path.is_dir() else str(name.with_suffix(""))


def is_video(path: Path) -> bool:
    return not path.name.startswith(".") and (
        is_frames(path) if path.is_dir() else path.suffix.lower() in VIDEOS and path.is_file()
    )


def is_frames(path: Path) -> bool:
    return path.is_dir() and any(video.FRAME_NAME.fullmatch(p.name) for p in path.iterdir())


def read_list(setting: str, path: Path) -> Iterator[Clip]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{setting}={path} cannot be read: {error}") from error
    if path.suffix.lower() == ".csv":
        rows = csv.DictReader(text.splitlines())
        lines = [(rows.line_num, {k: v for k, v in row.items() if v}) for row in rows]
    else:
        lines = [(n, parsed(path, n, line)) for n, line in enumerate(text.splitlines(), 1) if line.strip()]
    for number, row in lines:
        # "output" is what lists of generate.py call it
        row = {"file" if name == "output" else name: value for name, value in row.items()}
        if "file" not in row:
            raise ValueError(f"{path}, line {number} names no file; give one of {', '.join(FIELDS)} each")
        if wrong := [n for n in FIELDS if not isinstance(row.get(n, ""), str)]:
            raise ValueError(f"{path}, line {number}: {wrong[0]} is {row[wrong[0]]!r}, expected text")
        file = near(path, row["file"])
        if file.exists() and not is_video(file):
            raise ValueError(f"{path}, line {number}: {file} is no video; known are {', '.join(VIDEOS)}")
        clip = with_record(Clip(row.get("name") or bare(Path(file.name), file), file))
        image = str(near(path, row["image"])) if row.get("image") else clip.image
        reference = str(near(path, row["reference"])) if row.get("reference") else ""
        yield replace(clip, image=image, prompt=row.get("prompt", clip.prompt), reference=reference)


def parsed(path: Path, number: int, line: str) -> dict:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {number} is no JSON: {error}") from error
    if not isinstance(row, dict):
        raise ValueError(f"{path}, line {number}: expected an object with file, image and prompt")
    return row


def near(path: Path, name: str) -> Path:
    """A path of the working folder, else of the list's."""
    return Path(name) if Path(name).exists() else path.parent / name


def with_record(clip: Clip) -> Clip:
    """What the JSON beside a generated clip tells of it; a JSON of anything else is passed over."""
    record = records.read(clip.file)
    if record is None or record.get("file") != clip.file.name:
        return clip  # clip.mp4 and clip.gif share the name of their record
    try:
        settings = record["settings"]
        image, prompt = settings["image"], settings["prompt"]
        enlarge, preprocess = settings["save"]["enlarge"], Preprocess(**settings["preprocess"])
    except (ValueError, KeyError, TypeError):
        return clip
    return replace(
        clip,
        image=image[0] if image else "",
        prompt=prompt[0] if prompt else None,
        preprocess=preprocess,
        enlarge=enlarge,
    )


# ---------------------------------------------------------------------------------------------------
# Reading


def frames(clip: Clip, count: int = 0) -> np.ndarray:
    """-> uint8 [f h w 3] as sampled: enlarged pixels are averaged back to one. `count`: the first so many."""
    found = video.load(clip.file)[0]
    if count:
        if len(found) < count:
            raise ValueError(f"{clip.file} has {len(found)} frames; frames={count} asks for more")
        found = found[:count]
    n, (_, height, width, _) = clip.enlarge, found.shape
    if n == 1 or height % n or width % n:
        return found
    blocks = found.reshape(len(found), height // n, n, width // n, n, 3)
    return np.rint(blocks.mean(axis=(2, 4))).astype(np.uint8)


def picture(clip: Clip, width: int, height: int) -> np.ndarray:
    """The conditioning picture as generation prepares it, at the clip's size -> uint8 [h w 3]"""
    settings = clip.preprocess
    opened = images.open_picture(clip.image, exif=settings.exif, alpha=settings.alpha)
    return np.asarray(images.center_crop_wide(opened, width, height, mode=settings.crop))


def cropped(clip: np.ndarray, width: int, height: int) -> np.ndarray:
    """uint8 [f h w 3] of any size -> the centre at width x height, as a conditioning picture is prepared."""
    if clip.shape[1:3] == (height, width):
        return clip
    found = [images.center_crop_wide(Image.fromarray(frame), width, height) for frame in clip]
    return np.stack([np.asarray(frame) for frame in found])


def match(clips: Sequence[Clip], true: Sequence[Clip]) -> list[Clip]:
    """References by name -> the clips with theirs. ValueError naming the first that has none."""
    by_name = {clip.name: str(clip.file) for clip in true}
    found = [replace(c, reference=c.reference or by_name.get(c.name, "")) for c in clips]
    if lacking := [clip.name for clip in found if not clip.reference]:
        raise ValueError(
            f"{len(lacking)} of {len(clips)} clips have no true video of their name in reference=, the first "
            f"is {lacking[0]}; give one each, or a list with the field reference"
        )
    return found
