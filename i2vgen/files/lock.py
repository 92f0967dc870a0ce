"""One process at a time in a folder. The lock ends with its process, however that ends."""

from __future__ import annotations

import contextlib
import os
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

try:
    import fcntl
except ImportError:  # Windows: there folders are not locked
    fcntl = None

LOCK = ".lock"


@contextlib.contextmanager
def locked(folder: str | Path) -> Iterator[None]:
    """Hold the folder's lock; ValueError if another process holds it. The folder must exist.

    A file system without locks is used without one.
    """
    path = Path(folder) / LOCK
    while True:
        with path.open("a+", encoding="utf-8") as file:
            _lock(file, folder)
            if not _is_there(file, path):  # its holder removed it after we had opened it
                continue
            file.truncate(0)
            file.write(f"process {os.getpid()} on {platform.node()}\n")
            file.flush()
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
            return


def _lock(file: TextIO, folder: str | Path) -> None:
    try:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        raise ValueError(
            f"{file.read().strip() or 'another process'} is working in {folder}; wait until it ends, or "
            "choose another folder"
        ) from None
    except OSError:
        pass


def _is_there(file: TextIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
