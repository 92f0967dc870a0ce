"""What a case of the benchmark hands back: figures for the JSON file, and tables for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from i2vgen.files import whole
from i2vgen.files.tables import Table


@dataclass(frozen=True)
class Report:
    values: dict  # the JSON file, its top level first; None is what is not there yet
    tables: Sequence[Table]

    def write(self, path: Path) -> None:
        whole.write_json(path, self.values)
