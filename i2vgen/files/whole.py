"""Files and folders that appear whole or not at all: written under a temporary name, then renamed.

    .NAME.writing-MACHINE-PID   not finished yet
    .NAME.old-MACHINE-PID       the folder that NAME is about to replace

A killed process leaves such names behind; the next write into the same folder clears them away.

`check_place`, `refuse_overwriting` and `check_results` try a place before any work: a command calls them for
all that it will write.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import os
import platform
import re
import shutil
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

LONGEST_NAME = 255  # bytes in a file name, on nearly all file systems
SURROGATE = re.compile("[\ud800-\udfff]")
# JSON files of a weights or adapter folder, ours, peft's or diffusers'.
OF_WEIGHTS = re.compile(r"(settings|origin|config|adapter_config|model_index|.*\.index)\.json")
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
    """Lists of plain values take one line each.

    Surrogates, which stand for the bytes of a file name that is not UTF-8, are written as escapes.
    """
    text = _short_lists(json.dumps(content, indent=indent, ensure_ascii=False, allow_nan=allow_nan))
    text = SURROGATE.sub(lambda found: f"\\u{ord(found[0]):04x}", text)
    write_text(path, text + "\n")


def _short_lists(text: str) -> str:
    """Indented JSON with lists of plain values on one line. No string ends a line: it would end in quotes."""
    lines: list[str] = []
    opened = None  # line at which such a list may begin
    for line in text.split("\n"):
        lines.append(line)
        if line.endswith("["):
            opened = len(lines) - 1
        elif line.endswith("{"):
            opened = None
        elif opened is not None and line.strip() in ("]", "],"):
            first, *values, last = lines[opened:]
            lines[opened:] = [first + " ".join(value.strip() for value in values) + last.strip()]
            opened = None
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------
# Before any work


MADE: list[Path] = []  # folders that `check_folder` made


@contextlib.contextmanager
def no_empty_folders() -> Iterator[None]:
    """In the end, folders that were made inside for results which then did not come are removed."""
    MADE.clear()
    try:
        yield
    finally:
        for folder in sorted(MADE, key=lambda path: -len(path.parts)):
            with contextlib.suppress(OSError):  # not empty, or gone
                folder.rmdir()


def check_folder(what: str, folder: str | Path) -> Path:
    """ValueError, naming `what` is to be written, unless files can be put into this folder; it is made."""
    folder = Path(os.path.expanduser(folder))
    _check_name(what, folder)
    path = folder.absolute()
    try:
        MADE.extend(place for place in (path, *path.parents) if not place.exists())
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{what}: cannot create the folder {folder} ({error.strerror})") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ValueError(f"{what}: the folder {folder} is not writable; choose another one")
    return folder


def check_place(what: str, path: str | Path) -> Path:
    """ValueError, naming `what` is to be written, unless a file or folder can be put at `path` -> the path.

    Its parents are made, and its temporary name is tried. Settings of a weights folder are never replaced.
    """
    path = Path(os.path.expanduser(path))
    if path.name in ("", ".."):
        raise ValueError(f"{what}: {str(path)!r} has no name of its own; give one")
    _check_name(what, path)
    check_folder(what, path.absolute().parent)
    if path.is_dir():
        _check_name(what, _beside(path, "old"))
    temporary = _beside(path, "writing")
    try:
        _remove(temporary)
        temporary.touch()
        temporary.unlink()
    except OSError as error:
        raise ValueError(
            f"{what}: nothing can be written to {path} ({error.strerror}); choose another place"
        ) from error
    if OF_WEIGHTS.fullmatch(path.name) and path.exists() and any(path.parent.glob("*.safetensors")):
        raise ValueError(f"{what}: {path} belongs to the weights beside it; choose another name")
    return path


def refuse_overwriting(written: Iterable[str | Path], read: Iterable[str | Path]) -> None:
    """ValueError if something to be written is, or is a folder that holds, something that is read.

    Links are followed, so two names of one file are the same.
    """
    known: dict[object, str | Path] = {}
    for path in read:
        known |= dict.fromkeys((*_names(path), *map(str, Path(os.path.realpath(path)).parents)), path)
    for path in written:
        if taken := {*_names(path)} & known.keys():
            raise ValueError(f"output {path} would overwrite {known[taken.pop()]}; choose another name")


def check_results(what: str, folder: str | Path, names: Sequence[str], *, ours: bool = False) -> Path:
    """`check_folder` for results that are written together; ValueError if only some of them are there.

    All of them are an earlier result, which is replaced; some are somebody else's, unless they are `ours`.
    """
    folder = check_folder(what, folder)
    there = [name for name in names if (folder / name).exists()]
    if not ours and 0 < len(there) < len(names):
        raise ValueError(
            f"{what}: {folder / there[0]} is not from an earlier run, which would also have left "
            f"{', '.join(name for name in names if name not in there)}; choose another folder"
        )
    return folder


def _check_name(what: str, path: Path) -> None:
    """ValueError for a name that no file can have here."""
    reason = ""
    try:
        str(path).encode()
        path.lstat()
    except UnicodeEncodeError:
        reason = "not valid Unicode"
    except OSError as error:
        reason = error.strerror if error.errno == errno.ENAMETOOLONG else ""
    except ValueError as error:
        reason = str(error)  # a zero byte
    if reason:
        raise ValueError(f"{what}: {str(path)!r} cannot be a file name ({reason}); choose another one")


def _names(path: str | Path) -> list[object]:
    """What two paths to one file or folder have in common."""
    names: list[object] = [os.path.abspath(path), os.path.realpath(path)]
    with contextlib.suppress(OSError):  # it need not exist
        found = os.stat(path)
        names.append((found.st_dev, found.st_ino))
    return names


# ---------------------------------------------------------------------------------------------------
# Temporary names


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
    """A long name is cut, unless it has to come back (`old`)."""
    end = f".{what}-{_machine()}-{os.getpid()}"
    name, room = path.name, LONGEST_NAME - len(end) - 1
    if what == "writing" and len(os.fsencode(name)) > room:
        code = f"{zlib.crc32(os.fsencode(name)):08x}"
        name = os.fsencode(name)[: room - len(code)].decode(errors="ignore") + code
    return path.with_name(f".{name}{end}")


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
