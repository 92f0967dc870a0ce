"""Read single rows of the tensors in safetensors files.

Only the header of an open file is kept. Rows are read, not mapped: a process that has read all of a data set
larger than its memory takes no more memory than for one row.
"""

from __future__ import annotations

import collections
import json
import math
import struct
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from i2vgen.files.safefile import DTYPES, METADATA
from i2vgen.settings.wording import counted

MOST_OPEN = 64  # files
MAX_HEADER = 2**26  # bytes
SPOT = 1024  # bytes


class Place(NamedTuple):
    """Where a tensor lies in its file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int  # byte


class RowFile:
    """An open safetensors file; ValueError if it is damaged. `remedy` ends the message."""

    def __init__(self, path: Path, remedy: str):
        self.path, self.remedy = path, remedy
        try:
            self.file = path.open("rb", buffering=0)
            (length,) = struct.unpack("<Q", self.file.read(8))
            header = json.loads(self.file.read(length if length <= MAX_HEADER else 0))
            self.metadata: dict[str, str] = header.pop(METADATA, {})
            self.places = {
                name: Place(DTYPES[one["dtype"]], tuple(one["shape"]), 8 + length + one["data_offsets"][0])
                for name, one in header.items()
            }
            size = 8 + length + max((one["data_offsets"][1] for one in header.values()), default=0)
            if path.stat().st_size != size:
                raise ValueError("it is cut short")
        except (OSError, struct.error, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise self._damaged(error) from error

    def read(self, name: str, first: int = 0, count: int | None = None) -> Tensor:
        """Rows `first` to `first + count`, by default all -> a new tensor [count ...]"""
        if name not in self.places:
            raise self._damaged(f"it holds no {name}")
        dtype, shape, start = self.places[name]
        count = shape[0] - first if count is None else count
        if not 0 <= first <= first + count <= shape[0]:
            raise self._damaged(
                f"{name} has {counted(shape[0], 'row')}; asked for {first} to {first + count}"
            )
        rows = torch.empty((count, *shape[1:]), dtype=dtype)
        width = math.prod(shape[1:]) * dtype.itemsize
        if width and count:
            self._fill(memoryview(rows.view(-1).view(torch.uint8).numpy()), start + first * width)
        return rows

    def spots(self, name: str) -> bytes:
        """Some bytes of a tensor, from its first to its last, by which another training is told apart."""
        dtype, shape, start = self.places[name]
        size = math.prod(shape) * dtype.itemsize
        spot, found = bytearray(min(size, SPOT)), b""
        for place in sorted({0, (size - len(spot)) // 2, size - len(spot)}):
            self._fill(memoryview(spot), start + place)
            found += spot
        return found

    def _fill(self, left: memoryview, place: int) -> None:
        self.file.seek(place)
        while len(left):
            read = self.file.readinto(left)
            if not read:
                raise self._damaged("it is cut short")
            left = left[read:]

    def close(self) -> None:
        self.file.close()

    def _damaged(self, why: object) -> ValueError:
        return ValueError(f"{self.path} is missing or damaged ({why}); {self.remedy}")


class RowFiles:
    """The files of a folder, of which the last few stay open."""

    def __init__(self, folder: Path, remedy: str):
        self.folder, self.remedy = folder, remedy
        self.opened: collections.OrderedDict[str, RowFile] = collections.OrderedDict()

    def __call__(self, name: str) -> RowFile:
        if name not in self.opened:
            self.opened[name] = RowFile(self.folder / name, self.remedy)
            if len(self.opened) > MOST_OPEN:
                self.opened.popitem(last=False)[1].close()
        self.opened.move_to_end(name)
        return self.opened[name]

    def __getstate__(self) -> dict:
        """Open files cannot be sent to another process."""
        return {**self.__dict__, "opened": collections.OrderedDict()}
