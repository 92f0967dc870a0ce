"""YAML from people: read without executing anything, and refused before it can grow or nest without end.

An alias may repeat what its anchor holds, and a few lines of aliases of aliases stand for billions of nodes
(the "billion laughs"). So the text is first read as a stream of events, in which its size is counted.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

MAX_BYTES = 2**20  # of a file
MAX_NODES = 2**16  # values and names, with every alias written out; a long text counts as several
TEXT_NODE = 256  # characters
MAX_DEPTH = 64  # of lists and groups inside each other
# Whole numbers that YAML 1.1 reads as nobody means them: octal ones such as 010, and 1:30 as base 60.
SURPRISING = re.compile(r"[-+]?(0[0-7_]+|[0-9][0-9_]*(:[0-5]?[0-9])+)")
# What PyYAML raises on scalars that it cannot turn into values, such as `!!int ""`.
UNREADABLE = (yaml.YAMLError, ValueError, TypeError, LookupError, AttributeError, OverflowError)


@dataclass
class _Open:
    """A list or group whose end has not come yet."""

    anchor: str | None
    names: set[str] | None  # of a group
    nodes: int = 1
    depth: int = 0
    parts: int = 0  # of a group: names and values by turns


class Loader(yaml.SafeLoader):
    """YAML's own reading of values, but for whole numbers that would surprise."""


def _whole_number(loader: Loader, node: yaml.ScalarNode) -> int:
    number = loader.construct_yaml_int(node)
    if SURPRISING.fullmatch(node.value):
        raise ValueError(f"{node.value} means {number} in YAML; write {number}, or '{node.value}' for a text")
    return number


Loader.add_constructor("tag:yaml.org,2002:int", _whole_number)


def read_text(file: str | Path) -> str:
    """A settings file's text, without a byte order mark; ValueError if it is too large or not UTF-8."""
    try:
        with Path(file).open("rb") as opened:
            held = opened.read(MAX_BYTES + 1)
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror}") from error
    if len(held) > MAX_BYTES:
        raise ValueError(f"{file} is larger than {MAX_BYTES >> 10} KiB, so it is no file of settings")
    try:
        return held.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is no readable YAML file: it is not UTF-8; save it as UTF-8") from error


def parse(text: str) -> Any:
    """The value of a YAML text. ValueError in one line, for the caller to add where the text comes from."""
    return _load(text, Loader)


def parse_plain(text: str) -> Any:
    """The same with every scalar as the text that was written."""
    return _load(text, yaml.BaseLoader)


def _load(text: str, loader: type) -> Any:
    try:
        _check(text)
        return yaml.load(text, Loader=loader)
    except UNREADABLE as error:
        raise ValueError(" ".join(str(error).split()) or type(error).__name__) from error


def _check(text: str) -> None:
    """ValueError if the text nests too deeply, holds too many values, or gives one name twice in a group.

    PyYAML would keep the later value of such a name and drop the earlier one.
    """
    sizes: dict[str | None, tuple[int, int]] = {}  # anchor -> nodes, depth
    inside: list[_Open] = []
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.CollectionStartEvent):
            inside.append(_Open(event.anchor, set() if isinstance(event, yaml.MappingStartEvent) else None))
            if len(inside) > MAX_DEPTH:
                raise ValueError(f"it nests deeper than {MAX_DEPTH} levels")
            continue
        if isinstance(event, yaml.ScalarEvent):
            sizes[event.anchor] = nodes, depth = 1 + len(event.value) // TEXT_NODE, 0
        elif isinstance(event, yaml.CollectionEndEvent):
            ended = inside.pop()
            sizes[ended.anchor] = nodes, depth = ended.nodes, ended.depth + 1
        elif isinstance(event, yaml.AliasEvent):
            if any(event.anchor == outer.anchor for outer in inside):
                raise ValueError(f"*{event.anchor} stands inside of what it refers to")
            nodes, depth = sizes.get(event.anchor, (1, 0))
        else:
            continue
        if inside:
            _add(inside[-1], event, nodes, depth)
            if inside[-1].nodes > MAX_NODES:
                raise ValueError(f"it holds more than {MAX_NODES} values, with its aliases written out")
            if len(inside) + depth > MAX_DEPTH:
                raise ValueError(f"it nests deeper than {MAX_DEPTH} levels")


def _add(outer: _Open, event: yaml.Event, nodes: int, depth: int) -> None:
    outer.nodes += nodes
    outer.depth = max(outer.depth, depth)
    outer.parts += 1
    if outer.names is not None and outer.parts % 2 and isinstance(event, yaml.ScalarEvent):
        if event.value in outer.names:
            raise ValueError(f"line {event.start_mark.line + 1} gives {event.value!r} a second time")
        outer.names.add(event.value)
