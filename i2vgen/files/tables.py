"""A table of texts, for the terminal, for Markdown and for a page."""

from __future__ import annotations

from typing import NamedTuple

NONE = "-"  # a cell without a value


class Table(NamedTuple):
    """Columns named in `words` are aligned to the left, all others to the right."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    words: tuple[int, ...] = (0,)

    def __str__(self) -> str:
        lines = [self.header, *self.rows]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        text = [
            "  ".join(
                cell.ljust(width) if i in self.words else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in lines
        ]
        return "\n".join([self.title, *text] if self.title else text)

    def markdown(self) -> str:
        """Without the title."""
        marks = ["---" if i in self.words else "---:" for i in range(len(self.header))]
        return "\n".join(f"| {' | '.join(line)} |" for line in [self.header, marks, *self.rows])
