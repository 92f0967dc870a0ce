"""What the readers share: the opened file, its tensors and checksums, and parts of messages.

It imports none of the readers.
"""

from __future__ import annotations

import io
import math
import mmap
import sys
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

OnBytes = Callable[[int], None]
Format = Literal["safetensors", "torch"]

MAX_HEADER = 32 << 20  # bytes; real headers stay under one MiB
MAX_AXES = 64
CHUNK = 1 << 20  # bytes read, or elements examined, at a time
DAMAGED = "it is damaged or was not fully downloaded; download it again"
SAVE_ANEW = "load it where you trust it and save its state dict as safetensors"

# `extra` keeps these under names that no program uses.
WRAPPER, LEFT_OUT, AVERAGED, NAMELESS = "(wrapper)", "(left out)", "(averaged)", "(averaged, in a list)"

# What zipfile raises on a damaged archive.
ZIP_ERRORS = (
    zipfile.BadZipFile, NotImplementedError, EOFError, OverflowError, RuntimeError, ValueError, OSError,
)  # fmt: skip


class Aligned(Mapping):
    """name -> tensor. torch expects aligned memory; a tensor that is not aligned is copied at each access."""

    def __init__(self, tensors: Mapping[str, Tensor]):
        self._tensors = dict(tensors)

    def __getitem__(self, name: str) -> Tensor:
        tensor = self._tensors[name]
        return tensor.clone() if tensor.data_ptr() % tensor.element_size() else tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __contains__(self, name: object) -> bool:
        return name in self._tensors


@dataclass(frozen=True)
class TensorFile:
    """A weights file: its tensors by name, and what the file holds beside them.

    `tensors[name]` takes no memory (unless the file is older than torch's zip format), and its shape and
    dtype are known without reading data. `extra` holds the plain numbers and strings beside the tensors
    (`step`) and, where they apply, the keys that led to the state dict (under WRAPPER), the names of all that
    was left out (under LEFT_OUT) and of averaged weights among it (under AVERAGED; in a list, under
    NAMELESS). `parts` are the files of a sharded checkpoint.
    """

    path: Path
    format: Format
    tensors: Mapping[str, Tensor]
    extra: Mapping[str, Any]
    metadata: Mapping[str, str]
    parts: tuple[TensorFile, ...] = ()
    _entries: Mapping[str, zipfile.ZipInfo] = field(default_factory=dict, repr=False, compare=False)

    def verify(self, names: Iterable[str] | None = None, *, on_bytes: OnBytes | None = None) -> None:
        """Compare the named tensors (all if None) with the checksums in the file, as far as it keeps any.

        `on_bytes` is called with the number of bytes just read. ValueError names the first damaged entry.
        """
        wanted = self.tensors if names is None else set(names) & set(self.tensors)
        for part in self.parts:
            part.verify(wanted, on_bytes=on_bytes)
        entries = {e.header_offset: e for name in wanted if (e := self._entries.get(name)) is not None}
        if not entries:
            return
        with zipfile.ZipFile(self.path) as archive:
            for _, entry in sorted(entries.items()):
                for piece in read_entry(self.path, archive, entry):
                    if on_bytes is not None:
                        on_bytes(len(piece))


# --- files


def opened(path: Path) -> io.FileIO:
    """The file, open for reading. ValueError says why it cannot be."""
    if path.is_dir():
        raise ValueError(f"{path} is a folder; a weights file is expected")
    if not path.exists():
        raise ValueError(f"there is no file {path}; check the path")
    if not path.is_file():
        raise ValueError(f"{path} is not a regular file (a pipe or a device); save it to disk first")
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


def read_entry(path: Path, archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> Iterator[bytes]:
    """The bytes of an archive's entry, piece by piece. ValueError if its checksum turns out not to match."""
    try:
        with archive.open(entry) as file:
            while piece := file.read(CHUNK):
                yield piece
    except ZIP_ERRORS as error:
        name = f"its entry {shown(entry.filename)}"
        if "CRC" in str(error):
            raise ValueError(f"{path}: the checksum of {name} does not match; {DAMAGED}") from error
        raise ValueError(f"{path}: {name} cannot be read ({shown(error)}); {DAMAGED}") from error


# --- what files say


def shown(text: object) -> str:
    """A name from a file, fit for a terminal."""
    text = str(text)
    text = text if text.isprintable() else repr(text)
    return text if len(text) <= 120 else f"{text[:100]}... ({len(text)} characters)"


def without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For json.loads: an object in which no name appears twice."""
    result = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"the name {shown(key)} appears twice")
        result[key] = value
    return result


def fits(shape: Iterable[int]) -> bool:
    """Whether torch can count such a tensor, even one without elements."""
    return math.prod(max(n, 1) for n in shape) <= sys.maxsize // 16


def are_counts(values: Any) -> bool:
    """A list of integers that fit a size of this machine."""
    return isinstance(values, list) and all(type(v) is int and 0 <= v <= sys.maxsize for v in values)
