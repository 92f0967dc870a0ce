"""The record beside a video: a JSON file with everything needed to make it again, and the video's hash."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import platform
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

import torch

import i2vgen
from i2vgen.files import whole
from i2vgen.settings.config import Config

BLOCK = 1 << 20  # bytes hashed at once


def path_of(video: Path) -> Path:
    """The JSON beside a video or a folder of PNGs: clip.mp4 -> clip.mp4.json"""
    return video.with_name(video.name + ".json")


def earlier_path_of(video: Path) -> Path:
    """Where earlier versions kept it, one for clip.mp4 and clip.gif: clip.json"""
    return video.with_suffix(".json") if video.suffix else path_of(video)


def settings_of(config: Config, image: str, prompt: str, seed: int, video: Path) -> Config:
    """The settings of one clip alone, as its record keeps them."""
    return dataclasses.replace(
        config,
        image=(image,) if image else (),
        prompt=(prompt,) if image else (),
        output=str(video),
        items="",
        sample=dataclasses.replace(config.sample, seed=(seed,)),
    )


def check(video: Path) -> None:
    """ValueError, before any work, unless the record of `video` can be written without loss."""
    path = whole.check_place(f"the record of {video}", path_of(video))
    if path.is_dir() or (path.is_file() and path.stat().st_size and not _load(path)):
        raise ValueError(
            f"the record of {video} would overwrite {path}, which is no record of a clip; choose another "
            "output name"
        )


def refuse_foreign(video: Path) -> None:
    """ValueError if something is at `video` that has no record beside it, so it is no clip of ours."""
    there = any(video.iterdir()) if video.is_dir() else video.is_file() and video.stat().st_size > 0
    if there and read(video) is None:
        raise ValueError(
            f"{video} would be overwritten, and no record beside it ({path_of(video).name}) says that it "
            "was made here; choose another output name"
        )


def write(
    video: Path,
    config: Config,
    *,
    content: Path | None = None,
    size: tuple[int, int],
    frames: int,
    fps: float,
    facts: Mapping[str, object] = MappingProxyType({}),
) -> None:
    """The record of a video; `config` is that of `settings_of`, `size` width and height.

    `content` is where the video still lies before it takes its place, so that none is there without a record.

    `facts` are entries of the record that the settings do not hold, such as what replaced a setting.
    """
    record = {
        "file": video.name,
        "sha256": sha256(content or video),
        "width": size[0],
        "height": size[1],
        "frames": frames,
        "fps": fps,
        "seed": config.sample.seed[0],
        **facts,
        "settings": config.to_dict(),
        "versions": versions(),
    }
    path, earlier = path_of(video), earlier_path_of(video)
    other = (_load(path) or {}).get("file")
    if isinstance(other, str) and Path(other).name == other != video.name:
        keep = path_of(video.with_name(other))
        if earlier_path_of(video.with_name(other)) == path and not keep.exists():
            path.rename(keep)  # a folder `clip` has the name that the record of clip.mp4 had
    whole.write_json(path, record)
    if earlier != path and (_load(earlier) or {}).get("file") == video.name:
        earlier.unlink()  # it told of the file that was just replaced


def read(video: Path) -> dict | None:
    """The record beside a video; None if there is none or it cannot be read."""
    for path in (path_of(video), earlier_path_of(video)):
        record = _load(path)
        if record is not None and record.get("file") == video.name:
            return record
    return None


def _load(path: Path) -> dict | None:
    """A record of any video; None for other files."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) and {"file", "sha256", "settings"} <= record.keys() else None


def versions() -> dict[str, str]:
    return {
        "i2vgen": i2vgen.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def sha256(path: str | Path, on_bytes: Callable[[int], object] | None = None) -> str:
    """Of a file, or of all files of a folder in the order of their names: 64 hexadecimal digits.

    `on_bytes` is called with the number of bytes just read.
    """
    path, digest, block = Path(path), hashlib.sha256(), bytearray(BLOCK)
    for file in sorted(p for p in path.iterdir() if p.is_file()) if path.is_dir() else [path]:
        with file.open("rb") as stream, memoryview(block) as view:
            while count := stream.readinto(block):
                digest.update(view[:count])
                if on_bytes is not None:
                    on_bytes(count)
    return digest.hexdigest()
