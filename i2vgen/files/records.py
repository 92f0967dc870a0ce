"""The record beside a video: a JSON file with everything needed to make it again, and the video's hash."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import platform
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

import i2vgen
from i2vgen.files import whole
from i2vgen.settings.config import Config

BLOCK = 1 << 20  # bytes hashed at once


def path_of(video: Path) -> Path:
    """The JSON beside a video: clip.mp4 -> clip.json; a folder of PNGs -> folder.json beside it."""
    return video.with_suffix(".json") if video.suffix else video.with_name(video.name + ".json")


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


def write(video: Path, config: Config, *, size: tuple[int, int], frames: int, fps: float) -> None:
    """The record of a video that is there; `config` is that of `settings_of`, `size` width and height.

    clip.mp4 and clip.gif share one record, that of the later one; a warning says so.
    """
    before = read(video) or {}
    if before.get("file", video.name) != video.name:
        warnings.warn(
            f"{path_of(video)} was the record of {before['file']} and is now that of {video.name}",
            stacklevel=3,
        )
    record = {
        "file": video.name,
        "sha256": sha256(video),
        "width": size[0],
        "height": size[1],
        "frames": frames,
        "fps": fps,
        "seed": config.sample.seed[0],
        "settings": config.to_dict(),
        "versions": versions(),
    }
    whole.write_json(path_of(video), record)


def read(video: Path) -> dict | None:
    """The record beside a video; None if there is none or it cannot be read."""
    try:
        record = json.loads(path_of(video).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) else None


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
    for file in sorted(path.iterdir()) if path.is_dir() else [path]:
        with file.open("rb") as stream, memoryview(block) as view:
            while count := stream.readinto(block):
                digest.update(view[:count])
                if on_bytes is not None:
                    on_bytes(count)
    return digest.hexdigest()
