"""Lists that people write: JSONL and CSV files in UTF-8, with or without a byte order mark.

They are read line by line, so that neither a long list nor an endless one fills the memory. Every refusal
names the file and the line, and says what to do.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

NONE: Mapping[str, str] = MappingProxyType({})
MAX_LINE = 2**24  # bytes
BOM, UTF_16 = b"\xef\xbb\xbf", (b"\xff\xfe", b"\xfe\xff")
AS_UTF_8 = 'save the file as UTF-8 (spreadsheets call it "CSV UTF-8")'


class Row(NamedTuple):
    """What one line says, or the lines that one quoted text spans; `line` is the first, counted from 1."""

    line: int
    values: dict


def json_rows(path: str | Path, *, expected: str, setting: str = "") -> Iterator[Row]:
    """The objects of a JSONL file. Only a newline ends a line: JSON text may hold all other separators.

    `expected` says in messages what an object holds, `setting` is what named the file (`items=`). ValueError
    for a line that is no JSON object.
    """
    for number, line in enumerate(_lines(path, setting), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            values = json.loads(line, object_pairs_hook=_without_repeats)
        except RecursionError:
            raise ValueError(f"{where} nests too deeply; expected an object with {expected}") from None
        except ValueError as error:
            raise ValueError(f"{where} is not JSON: {error}") from error
        if not isinstance(values, dict):
            raise ValueError(f"{where}: expected an object with {expected}, on a line of its own")
        _refuse_halves(values.values(), where)
        yield Row(number, values)


def csv_rows(
    path: str | Path, columns: Sequence[str], *, setting: str = "", renamed: Mapping[str, str] = NONE
) -> Iterator[Row]:
    """The rows of a CSV file whose first line names its columns, of which `columns` must be there.

    `renamed` holds other names of columns, and what they become.

    A row may end early; the columns that it lacks are missing from its values. ValueError for one that is too
    long: a text with a comma must stand in quotes, or its rest would be lost.
    """
    reader = csv.reader(_csv_lines(path, setting), strict=True)  # strict: a quote that never ends is an error
    start, header = 1, None
    while True:
        try:
            row = next(reader, None)
        except csv.Error as error:
            raise ValueError(
                f"{path}, line {start}: {error}; a quoted text ends with a quote, and a quote inside it is "
                "written twice"
            ) from error
        if row is None:
            break
        if header is None and row:
            header = _header(path, [renamed.get(name, name) for name in row], columns)
        elif row:
            if len(row) > len(header):
                raise ValueError(
                    f"{path}, line {start} holds {len(row)} values for the {len(header)} columns "
                    f"{','.join(header)}; put a text with a comma into quotes"
                )
            yield Row(start, dict(zip(header, row, strict=False)))
        start = reader.line_num + 1
    if header is None:
        raise ValueError(f"{path} is empty; its first line names the columns {','.join(columns)}")


def resolved(path: str | Path, name: str) -> Path:
    """A name in a list, relative to the working folder if it exists there, else to the list's folder."""
    return Path(name) if os.path.exists(name) or name.startswith("~") else Path(path).parent / name


def _header(path: str | Path, row: list[str], columns: Sequence[str]) -> list[str]:
    if set(columns) <= set(row):
        if twice := [name for name in row if name and row.count(name) > 1]:
            raise ValueError(f"{path} names the column {twice[0]!r} twice; rename one")
        return row
    separator = next((s for s in ";\t|" if len(row) == 1 and s in row[0]), None)
    remedy = f"; it looks separated by {separator!r}, but commas are needed" if separator else ""
    if set(columns) <= {name.strip().lower() for name in row}:
        remedy = "; write them in lower case, without spaces around them"
    raise ValueError(
        f"{path}: its first line names the columns {', '.join(repr(name[:80]) for name in row[:12])}; it "
        f"must name {' and '.join(columns)}{', separated by a comma' if len(columns) > 1 else ''}{remedy}"
    )


def _csv_lines(path: str | Path, setting: str) -> Iterable[str]:
    """Lines as the csv module wants them: ended by any newline, which stays as it is."""
    return itertools.chain.from_iterable(io.StringIO(line, newline="") for line in _lines(path, setting))


def _lines(path: str | Path, setting: str) -> Iterator[str]:
    """The lines of a text, each with its newline, without the byte order mark."""
    try:
        with Path(path).open("rb") as file:
            for number in itertools.count(1):
                held = file.readline(MAX_LINE + 1)
                if not held:
                    return
                yield _decoded(held, number)
    except OSError as error:
        raise ValueError(f"{setting}{path} cannot be read: {error.strerror or error}") from error
    except _Unreadable as error:
        raise ValueError(f"{setting}{path} cannot be read: {error}") from error


class _Unreadable(ValueError):
    """The file is no UTF-8 text of lines."""


def _decoded(held: bytes, number: int) -> str:
    if len(held) > MAX_LINE:
        raise _Unreadable(f"line {number} is longer than {MAX_LINE >> 20} MiB")
    if number == 1 and held.startswith(UTF_16):
        raise _Unreadable(f"it is UTF-16 text; {AS_UTF_8}")
    if b"\0" in held:  # also in UTF-16 without a byte order mark
        raise _Unreadable(f"line {number} holds a NUL byte, so it is no UTF-8 text; {AS_UTF_8}")
    try:
        return (held.removeprefix(BOM) if number == 1 else held).decode("utf-8")
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise _Unreadable(f"line {number} is not UTF-8, with its byte {byte:#04x}; {AS_UTF_8}") from error


def _without_repeats(pairs: list[tuple[str, object]]) -> dict:
    held: dict = {}
    for name, value in pairs:
        if name in held:
            raise ValueError(f"it names {name[:80]!r} twice")
        held[name] = value
    return held


def _refuse_halves(values: Iterable[object], where: str) -> None:
    r"""JSON can spell half of a character, such as "\ud800", which no file can hold."""
    for value in values:
        if isinstance(value, str) and not value.isascii():
            try:
                value.encode("utf-8")
            except UnicodeEncodeError as error:
                half = value[error.start]
                raise ValueError(f"{where} holds half of a character, {half!a}; write it whole") from error
