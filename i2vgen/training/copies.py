"""Clips that two data sets share under whatever names: files that are the same byte for byte.

Clips of a prepared folder are known by the sizes and hashes that `i2vgen prepare` noted of their files. Most
files differ in size already, so that few are read.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from i2vgen.files import fingerprint
from i2vgen.files.rows import RowFile
from i2vgen.training import prepared

SPOTS = 8  # pieces of files of one size that are compared before all of them is read
MARKS = ("size", "spots", "content")  # by which files are told apart, the cheapest first


class Clips(Protocol):
    def marks(self, what: str, chosen: np.ndarray) -> np.ndarray | None:
        """int64 for each of the chosen clips; None where they cannot be told"""

    def name(self, number: int) -> str: ...


class Files:
    """Clips of a folder of videos."""

    def __init__(self, folder: Path, names: Sequence[str]):
        self.folder, self.names = folder, names

    def __len__(self) -> int:
        return len(self.names)

    def marks(self, what: str, chosen: np.ndarray) -> np.ndarray:
        of = {
            "size": fingerprint.size_of,
            "spots": lambda path: fingerprint.of_content(path, spots=SPOTS),
            "content": fingerprint.of_content,
        }[what]
        return np.array([of(self.folder / self.names[number]) for number in chosen], np.int64)

    def name(self, number: int) -> str:
        return self.names[number]


class Stored:
    """Clips of a prepared folder, by default all."""

    def __init__(self, folder: Path, numbers: np.ndarray | None = None):
        self.folder, self.facts = folder, prepared.read_facts(folder)
        self.numbers = np.arange(self.facts["count"]) if numbers is None else numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def marks(self, what: str, chosen: np.ndarray) -> np.ndarray | None:
        file = RowFile(self.folder / prepared.INDEX, prepared.REMEDY)
        found = file.read(what).numpy()[self.numbers[chosen]] if what in file.places else None
        file.close()
        return found

    def name(self, number: int) -> str:
        shard, row = divmod(int(self.numbers[number]), self.facts["per_shard"])
        file = RowFile(self.folder / prepared.shard_name(shard), prepared.REMEDY)
        ends = [0, *file.read("name_ends").tolist()]
        name = file.read("name_bytes", ends[row], ends[row + 1] - ends[row]).numpy().tobytes()
        file.close()
        return name.decode("utf-8", "surrogatepass")


def shared(held: Clips, trained: Clips) -> list[tuple[str, str]]:
    """(clip held out, clip trained on) for every file that is both"""
    here, there = np.arange(len(held)), np.arange(len(trained))
    told = False
    for what in MARKS:
        a, b = held.marks(what, here), trained.marks(what, there)
        told = a is not None and b is not None
        if told:
            alike = np.isin(a, b), np.isin(b, a)
            here, a, there, b = here[alike[0]], a[alike[0]], there[alike[1]], b[alike[1]]
    if not told:  # prepared by an earlier version, which noted nothing of the files
        return []
    twins = dict(zip(b.tolist(), there.tolist(), strict=True))
    return [
        (held.name(i), trained.name(twins[mark])) for i, mark in zip(here.tolist(), a.tolist(), strict=True)
    ]
