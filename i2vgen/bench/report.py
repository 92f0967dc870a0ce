"""What a case of the benchmark hands back: figures for the JSON file, and tables for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from i2vgen.files import whole


@dataclass(frozen=True)
class Table:
    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def __str__(self) -> str:
        """The first column to the left, all others to the right."""
        widths = [max(map(len, column)) for column in zip(self.header, *self.rows, strict=True)]
        lines = [self.title]
        for name, *figures in (self.header, *self.rows):
            cells = [figure.rjust(width) for figure, width in zip(figures, widths[1:], strict=True)]
            lines.append("  ".join([name.ljust(widths[0]), *cells]))
        return "\n".join(lines)


@dataclass(frozen=True)
class Report:
    values: dict  # the JSON file, its top level first; None is what is not there yet
    tables: Sequence[Table]

    def write(self, path: Path) -> None:
        whole.write_json(path, self.values)
