"""Reports as one HTML file each, which needs no other file and no network: `page.html` filled by jinja2.

Axes: f frames, h w pixel rows and columns.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jinja2
import numpy as np
from PIL import Image

from i2vgen.files.tables import Table

FRAME_HEIGHT, MAX_FRAMES, GAP = 96, 8, 3  # of the strips, in pixels


class Figure(NamedTuple):
    """Pictures below each other, under a caption that begins with a name."""

    pictures: tuple[tuple[str, bytes], ...]  # what each one shows, and its PNG
    name: str = ""
    told: str = ""  # follows the name, "\n" to begin a line
    wrong: str = ""  # the end of the caption, in the colour of mistakes
    plot: bool = False  # dark lines on white, which turn over on dark paper; else pixels


class Section(NamedTuple):
    """What stands under one heading."""

    title: str = ""
    table: Table | None = None
    text: str = ""
    figures: Sequence[Figure] = ()


def of_table(table: Table, text: str = "") -> Section:
    return Section(table.title, table, text)


def render(title: str, about: str, sections: Sequence[Section], *, settings: dict | None = None) -> str:
    """The whole page; `settings` are shown folded up at its end."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, keep_trailing_newline=True
    )
    environment.filters["base64"] = lambda data: base64.b64encode(data).decode()
    return environment.get_template("page.html").render(
        title=title,
        about=about,
        sections=sections,
        settings=json.dumps(settings, indent=1) if settings else "",
    )


# ---------------------------------------------------------------------------------------------------
# Clips as pictures


def strip(frames: np.ndarray) -> bytes:
    """Up to MAX_FRAMES frames of uint8 [f h w 3], side by side: a PNG about FRAME_HEIGHT high."""
    count = len(frames)
    chosen = np.linspace(0, count - 1, min(count, MAX_FRAMES)).round().astype(int)
    file = io.BytesIO()
    side_by_side(frames[chosen]).save(file, "PNG", optimize=True)
    return file.getvalue()


def side_by_side(frames: Sequence[np.ndarray]) -> Image.Image:
    """uint8 [h w 3] each, all of one size; the gaps between them let the page through."""
    height, width, _ = frames[0].shape
    size = shown_size(width, height)
    row = Image.new("RGBA", (len(frames) * (size[0] + GAP) - GAP, size[1]))
    for place, frame in enumerate(frames):
        row.paste(Image.fromarray(frame).resize(size, Image.Resampling.BOX), (place * (size[0] + GAP), 0))
    return row


def shown_size(width: int, height: int) -> tuple[int, int]:
    """About FRAME_HEIGHT pixels high: small frames by a whole number, so that every pixel is a square."""
    if height > FRAME_HEIGHT:
        return round(width * FRAME_HEIGHT / height), FRAME_HEIGHT
    times = round(FRAME_HEIGHT / height)
    return width * times, height * times


def animated(clips: Sequence[np.ndarray], fps: int = 8) -> bytes:
    """Clips uint8 [f h w 3] of equal length and height -> an animated PNG of them side by side."""
    rows = [side_by_side(frames) for frames in zip(*clips, strict=True)]
    file = io.BytesIO()
    rows[0].save(file, "PNG", save_all=True, append_images=rows[1:], duration=1000 / fps, loop=0)
    return file.getvalue()
