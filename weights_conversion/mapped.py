"""What the readers of foreign weights share: the mapped file, tensors as views into it, checks, error words.

    TensorFile   what a reader hands over
    Lazy         its tensors by name, each a Place in the mapped file until somebody asks for it

It imports none of the readers.
"""

from __future__ import annotations

import io
import math
import mmap
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

OnBytes = Callable[[int], None]
Format = Literal["safetensors", "torch"]

MAX_HEADER = 32 << 20  # bytes; real headers stay under one MiB
MAX_AXES = 64
CHUNK = 1 << 22  # bytes hashed, or elements examined, at once
DAMAGED = "it is damaged or was not fully downloaded; download it again"
SAVE_ANEW = "load it where you trust it and save its state dict as safetensors"

# `extra` remembers these two under names that no program uses.
WRAPPER, LEFT_OUT = "(wrapper)", "(left out)"


class Place(NamedTuple):
    """Where a tensor lies in the mapped file: a run of bytes, and the dense tensor's layout within it."""

    offset: int  # bytes
    nbytes: int  # of the whole storage
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...] | None = None  # elements; None: contiguous
    start: int = 0  # elements


class Sum(NamedTuple):
    """A run of bytes with the CRC-32 that the file keeps of it."""

    label: str
    nbytes: int
    crc: int


class Lazy(Mapping):
    """name -> tensor: a new view into the mapped file at each access, or the tensor that is in memory."""

    def __init__(self, buffer: mmap.mmap | None, places: Mapping[str, Place | Tensor]):
        self._buffer = buffer
        self._places = dict(places)

    def __getitem__(self, name: str) -> Tensor:
        place = self._places[name]
        return place if isinstance(place, Tensor) else _mapped(self._buffer, place)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, name: object) -> bool:
        return name in self._places

    def storage_of(self, name: str) -> int | None:
        """First byte of the storage in the file; None where the tensor is in memory."""
        place = self._places[name]
        return None if isinstance(place, Tensor) else place.offset


@dataclass(frozen=True)
class TensorFile:
    """A weights file: its tensors by name, and what stood beside them.

    `tensors[name]` costs no memory; its shape and dtype are known without reading any data. `extra` has the
    plain numbers and texts beside the tensors (`step`), and, where they apply, under WRAPPER the keys that
    led to the state dict and under LEFT_OUT the names of everything else that was not taken. `parts` are the
    files of a sharded checkpoint.
    """

    path: Path
    format: Format
    tensors: Mapping[str, Tensor]
    extra: Mapping[str, Any]
    metadata: Mapping[str, str]
    parts: tuple[TensorFile, ...] = ()
    _buffer: mmap.mmap | None = field(default=None, repr=False, compare=False)
    _sums: Mapping[int, Sum] = field(default_factory=dict, repr=False, compare=False)

    def verify(self, names: Iterable[str] | None = None, *, on_bytes: OnBytes | None = None) -> None:
        """Compare the named tensors (all if None) with the checksums in the file, as far as it keeps any.

        `on_bytes` is called with the number of bytes just read. ValueError names the first damaged piece.
        """
        wanted = self.tensors if names is None else set(names) & set(self.tensors)
        for part in self.parts:
            part.verify(wanted, on_bytes=on_bytes)
        if self._sums:
            for offset in sorted({self.tensors.storage_of(name) for name in wanted}):
                self._verify_run(offset, self._sums[offset], on_bytes)

    def _verify_run(self, offset: int, run: Sum, on_bytes: OnBytes | None) -> None:
        if run.crc == 0:  # torch can be told to leave the checksum out
            return
        found = 0
        with memoryview(self._buffer) as view:
            for start in range(offset, offset + run.nbytes, CHUNK):
                stop = min(start + CHUNK, offset + run.nbytes)
                with view[start:stop] as piece:
                    found = zlib.crc32(piece, found)
                if on_bytes is not None:
                    on_bytes(stop - start)
        if found != run.crc:
            raise ValueError(f"{self.path}: the checksum of its entry {run.label} does not match; {DAMAGED}")


# --- files


def opened(path: Path) -> io.FileIO:
    """The file, open for reading. ValueError says why it cannot be."""
    if path.is_dir():
        raise ValueError(f"{path} is a folder; a weights file is wanted here")
    if not path.exists():
        raise ValueError(f"there is no file {path}; check the path")
    if not path.is_file():
        raise ValueError(f"{path} is no ordinary file (a pipe or a device); save it to disk first")
    try:
        return path.open("rb", buffering=0)
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}); check its permissions") from error


def map_file(path: Path) -> mmap.mmap:
    """The whole file as bytes that are fetched only when they are looked at."""
    with opened(path) as file:
        if path.stat().st_size == 0:
            raise ValueError(f"{path} is empty; download it again")
        # Copy on write: a tensor that a caller changes never reaches the file.
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)


def _mapped(buffer: mmap.mmap, place: Place) -> Tensor:
    if place.nbytes == 0 or 0 in place.shape:
        return torch.empty(place.shape, dtype=place.dtype)
    raw = torch.frombuffer(buffer, dtype=torch.uint8, count=place.nbytes, offset=place.offset)
    if raw.data_ptr() % place.dtype.itemsize:
        raw = raw.clone()  # torch expects numbers at multiples of their size
    flat = raw.view(place.dtype)
    if place.stride is None:
        return flat.reshape(place.shape)
    return flat.as_strided(place.shape, place.stride, place.start)


# --- what files say


def shown(text: object) -> str:
    """A name from a file, fit for a terminal."""
    text = str(text)
    text = text if text.isprintable() else repr(text)
    return text if len(text) <= 120 else f"{text[:100]}... ({len(text)} characters)"


def without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For json.loads: an object in which no name comes twice."""
    result = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"the name {shown(key)} comes twice")
        result[key] = value
    return result


def fits(shape: Iterable[int]) -> bool:
    """Whether torch can count such a tensor, even one without elements."""
    return math.prod(max(n, 1) for n in shape) <= sys.maxsize // 16


def are_counts(values: Any) -> bool:
    """A list of integers that fit a size of this machine."""
    return isinstance(values, list) and all(type(v) is int and 0 <= v <= sys.maxsize for v in values)
