"""Reports as one HTML file each, which needs no other file and no network: `page.html` filled by jinja2."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jinja2

from i2vgen.files.tables import Table


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
