"""Finds the clips to score, with the picture and prompt each was made from, and reads their frames.

A folder may hold videos and folders of frame_0000.png, ... . The picture and prompt of a clip come from the
JSON that generation writes next to it, or from a list with one line per clip:

    {"file": "a.mp4", "image": "a.png", "prompt": "a boat sails", "reference": "true/a.mp4"}     .jsonl
    file,image,prompt                                                                            .csv

Only `file` is required; `output`, the name in lists for `i2vgen generate`, works too. Paths are relative to
the working folder or to the list's folder. `name` pairs the clips of two models; the default is the file name
without folder and suffix.

Axes: f frames, h w pixel rows and columns.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from i2vgen.files import images, lists, reading, records
from i2vgen.files.reading import VIDEOS, is_frames
from i2vgen.settings.config import Preprocess

LISTS = (".jsonl", ".csv")
FIELDS = ("file", "image", "prompt", "reference", "name")


@dataclass(frozen=True)
class Clip:
    """One video and what is known about it; an empty string means unknown."""

    name: str  # pairs the clips of two models: path inside the folder, without suffix
    file: Path
    image: str = ""
    prompt: str | None = None
    reference: str = ""
    preprocess: Preprocess = Preprocess()  # noqa: RUF009 (frozen)
    enlarge: int = 1  # side of the square of file pixels that shows one sampled pixel


# ---------------------------------------------------------------------------------------------------
# Finding


def find(setting: str, path: str) -> list[Clip]:
    """The clips of a folder (sorted by name), of a list (in its order), or a single video.

    ValueError if there are none or two have the same name; `setting` names the argument in messages.
    """
    place = Path(path)
    if place.suffix.lower() in LISTS and place.is_file():
        clips = list(read_list(setting, place))
    elif place.is_dir() and not is_frames(place):
        found = sorted(p for p in place.rglob("*") if is_video(p))
        clips = [with_record(Clip(without_suffix(p.relative_to(place), p), p)) for p in found]
    elif is_video(place):
        clips = [with_record(Clip(without_suffix(Path(place.name), place), place))]
    elif place.exists():
        raise ValueError(
            f"{setting}={path} is neither a video ({', '.join(VIDEOS)}, a folder of frame_0000.png, ...), "
            "nor a folder of videos, nor a list (.jsonl, .csv)"
        )
    else:
        raise ValueError(f"{setting}={path} does not exist; give a folder of videos, a video, or a list")
    if not clips:
        raise ValueError(
            f"{setting}={path} holds no videos; supported are {', '.join(VIDEOS)} and folders of PNGs"
        )
    names = [clip.name for clip in clips]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(
            f"{setting}={path} holds two clips called {twice} (suffixes are ignored); rename one"
        )
    return clips


def without_suffix(name: Path, path: Path) -> str:
    """The name without its suffix; folder names are unchanged."""
    return str(name) if path.is_dir() else str(name.with_suffix(""))


def is_video(path: Path) -> bool:
    return not path.name.startswith(".") and (
        is_frames(path) if path.is_dir() else path.suffix.lower() in VIDEOS and path.is_file()
    )


def read_list(setting: str, path: Path) -> Iterator[Clip]:
    """Read the clips of a .jsonl or .csv list; ValueError names the line that is wrong."""
    if path.suffix.lower() == ".csv":
        filled = lists.csv_rows(path, ("file",), setting=f"{setting}=", renamed={"output": "file"})
        rows = ((number, {k: v for k, v in row.items() if v}) for number, row in filled)
    else:
        rows = lists.json_rows(path, expected="file, image and prompt", setting=f"{setting}=")
    for number, row in rows:
        # lists for `i2vgen generate` say "output"
        row = {"file" if name == "output" else name: value for name, value in row.items()}
        if "file" not in row:
            raise ValueError(
                f"{path}, line {number} names no file; each line has {', '.join(FIELDS)}, and this one "
                f"{', '.join(map(repr, row)) or 'none of them'}"
            )
        if wrong := [n for n in FIELDS if not isinstance(row.get(n, ""), str)]:
            raise ValueError(f"{path}, line {number}: {wrong[0]} is {row[wrong[0]]!r}, expected text")
        file = lists.resolved(path, row["file"])
        if file.exists() and not is_video(file):
            raise ValueError(f"{path}, line {number}: {file} is not a video; use {', '.join(VIDEOS)}")
        clip = with_record(Clip(row.get("name") or without_suffix(Path(file.name), file), file))
        image = str(lists.resolved(path, row["image"])) if row.get("image") else clip.image
        reference = str(lists.resolved(path, row["reference"])) if row.get("reference") else ""
        yield replace(clip, image=image, prompt=row.get("prompt", clip.prompt), reference=reference)


def with_record(clip: Clip) -> Clip:
    """Add what the JSON record of a generated clip says; JSON files that are not its record are ignored."""
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
    """-> uint8 [f h w 3] at the sampled size (enlarged pixels are averaged); `count` frames, 0 for all."""
    total = reading.measure(clip.file)[0] if count else 0
    if total < count:
        raise ValueError(f"{clip.file} has {total} frames, but frames={count} asks for more")
    alpha = clip.preprocess.alpha
    found = reading.load(clip.file, alpha=alpha, only=range(count) if count else None)[0]
    n, (_, height, width, _) = clip.enlarge, found.shape
    if n == 1 or height % n or width % n:
        return found
    small = np.empty((len(found), height // n, width // n, 3), np.uint8)
    for i, frame in enumerate(found):  # one at a time, because the means are eight times larger
        small[i] = np.rint(frame.reshape(height // n, n, width // n, n, 3).mean(axis=(1, 3)))
    return small


def picture(clip: Clip, width: int, height: int) -> np.ndarray:
    """The conditioning picture, prepared as for generation at the clip's size -> uint8 [h w 3]."""
    settings = clip.preprocess
    opened = images.open_picture(clip.image, exif=settings.exif, alpha=settings.alpha)
    return np.asarray(images.center_crop_wide(opened, width, height, mode=settings.crop))


def cropped(clip: np.ndarray, width: int, height: int) -> np.ndarray:
    """uint8 [f h w 3] -> scaled and centre-cropped to width x height, as a conditioning picture is."""
    if clip.shape[1:3] == (height, width):
        return clip
    found = [images.center_crop_wide(Image.fromarray(frame), width, height) for frame in clip]
    return np.stack([np.asarray(frame) for frame in found])


def match(clips: Sequence[Clip], true: Sequence[Clip]) -> list[Clip]:
    """Add the reference of the same name to each clip. ValueError names the first clip without one."""
    by_name = {clip.name: str(clip.file) for clip in true}
    found = [replace(c, reference=c.reference or by_name.get(c.name, "")) for c in clips]
    if lacking := [clip.name for clip in found if not clip.reference]:
        raise ValueError(
            f"{len(lacking)} of {len(clips)} clips have no true video of their name in reference=, such as "
            f"{lacking[0]}; give one for each, or a list with the field reference"
        )
    return found
