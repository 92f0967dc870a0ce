"""Short hashes by which files that changed since they were used are told apart. Not for security."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

PIECE = 4096  # bytes


def of_text(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def of_paths(paths: Iterable[Path], *, pieces: int = 2) -> str:
    """Of names, sizes and `pieces` spots of every file, from its first bytes to its last.

    A folder stands for all its files. A few spots tell two recordings or two trainings apart, so that a large
    data set takes seconds.
    """
    digest = hashlib.sha256()
    for path in paths:
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.is_file():
                digest.update(os.fsencode(file.relative_to(path.parent)) + b"\0")
                _add(digest, file, pieces)
    return digest.hexdigest()[:16]


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files of a folder"""
    return sum(file.stat().st_size for file in _files(path))


def of_content(path: Path, *, spots: int = 0) -> int:
    """Of the bytes of a file, or of all files of a folder, whatever their names: 64 bits, with a sign.

    With `spots` only of so many pieces of each file, from its first to its last bytes.
    """
    digest = hashlib.sha256()
    for file in _files(path):
        if spots:
            _add(digest, file, spots)
            continue
        with file.open("rb", buffering=0) as opened:
            while piece := opened.read(2**20):
                digest.update(piece)
        digest.update(file.stat().st_size.to_bytes(8, "little"))  # where the next one begins
    return int.from_bytes(digest.digest()[:8], "little", signed=True)


def _files(path: Path) -> list[Path]:
    return sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]


def _add(digest, file: Path, pieces: int) -> None:
    with file.open("rb", buffering=0) as opened:
        size = opened.seek(0, os.SEEK_END)
        digest.update(size.to_bytes(8, "little"))
        last = max(0, size - PIECE)
        for spot in sorted({last * i // max(1, pieces - 1) for i in range(pieces)}):
            opened.seek(spot)
            digest.update(opened.read(PIECE))
