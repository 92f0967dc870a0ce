"""Files and folders that appear whole or not at all: written under a temporary name, then renamed.

    .NAME.writing-MACHINE-PID   not finished yet
    .NAME.old-MACHINE-PID       the folder that NAME is about to replace

A killed process leaves such names behind; the next write into the same folder clears them away.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import platform
import re
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path

LEFT_BEHIND = re.compile(r"\.(?P<name>.+)\.(?P<what>writing|old)-(?P<machine>[0-9a-f]{8})-(?P<pid>\d{1,9})")


@contextlib.contextmanager
def replacing(path: str | Path, *, sync: bool = False) -> Iterator[Path]:
    """A free name beside `path`: the file or folder made there takes the place of `path` at the end.

    On any error it vanishes and what stood at `path` stays. The parent folder must exist. `sync` waits until
    the new content has reached the disk.
    """
    path = Path(path)
    sweep(path.parent)
    temporary = _beside(path, "writing")
    _remove(temporary)  # a process that had our number, or this one before an error of the disk
    try:
        yield temporary
        if sync:
            _sync(temporary)
        _take_place(temporary, path)
    except BaseException:  # Ctrl-C too
        _remove(temporary)
        raise


@contextlib.contextmanager
def replacing_folder(path: str | Path, *, sync: bool = False) -> Iterator[Path]:
    """The same for a folder, which is made, and so are its parents."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with replacing(path, sync=sync) as temporary:
        temporary.mkdir()
        yield temporary


def write_text(path: str | Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, content: object, *, indent: int = 2, allow_nan: bool = True) -> None:
    text = json.dumps(content, indent=indent, ensure_ascii=False, allow_nan=allow_nan)
    write_text(path, text + "\n")


def check_folder(what: str, folder: str | Path) -> Path:
    """ValueError, naming `what` is to be written, unless files can be put into this folder; it is made."""
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{what}: cannot create the folder {folder} ({error.strerror})") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ValueError(f"{what}: the folder {folder} is not writable; choose another one")
    return folder


def sweep(folder: Path, *, alone: bool = False) -> None:
    """Clear away what killed processes of this machine left unfinished; a folder set aside comes back.

    `alone`: no other process writes into this folder, so what other machines left is removed too.
    """
    with contextlib.suppress(OSError):  # a folder that cannot be listed, or does not exist
        for name in os.listdir(folder):
            found = LEFT_BEHIND.fullmatch(name)
            if found and (alone or (found["machine"] == _machine() and not _runs(int(found["pid"])))):
                with contextlib.suppress(OSError):  # somebody else's, or cleared away meanwhile
                    _clear(folder / name, found["what"], folder / found["name"])


def _clear(left: Path, what: str, target: Path) -> None:
    if what == "old" and not target.exists():
        left.rename(target)
    else:
        _remove(left)


def _beside(path: Path, what: str) -> Path:
    return path.with_name(f".{path.name}.{what}-{_machine()}-{os.getpid()}")


@functools.cache
def _machine() -> str:
    """Where process ids mean the same: this host and, in containers, this container."""
    name = platform.node()
    with contextlib.suppress(OSError):
        name += os.readlink("/proc/self/ns/pid")
    return f"{zlib.crc32(name.encode()):08x}"


def _runs(pid: int) -> bool:
    if os.name != "posix":  # elsewhere `kill` would end it
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # somebody else's
        return True
    return True


def _sync(path: Path) -> None:
    for file in path.rglob("*") if path.is_dir() else [path]:
        if file.is_file():
            with file.open("rb+") as opened:
                os.fsync(opened.fileno())


def _take_place(temporary: Path, path: Path) -> None:
    if not (temporary.is_dir() and path.is_dir()):
        os.replace(temporary, path)
        return
    # No system call swaps two folders everywhere, so the old one steps aside and can come back.
    aside = _beside(path, "old")
    os.rename(path, aside)
    try:
        os.rename(temporary, path)
    except BaseException:
        os.rename(aside, path)
        raise
    _remove(aside)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
