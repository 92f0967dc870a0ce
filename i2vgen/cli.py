"""Shared by the scripts: parsing command lines of settings, and errors without tracebacks."""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch

from i2vgen.files import whole


def run(main: Callable[[], int | None]) -> int:
    """Run `main` -> exit status. User errors and lack of memory are reported in one line, with status 2."""
    warnings.showwarning = _note
    try:
        return main() or 0
    except SystemExit as stopped:  # after --help
        return stopped.code or 0
    except (ValueError, OSError, FloatingPointError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    except torch.OutOfMemoryError as error:
        sys.stderr.write(f"error: out of device memory; use a smaller size or fewer frames ({error})\n")
        return 2
    except RuntimeError as error:
        if "DefaultCPUAllocator" not in str(error):
            raise  # our own bugs keep their traceback
        sys.stderr.write("error: out of memory; use a smaller size, fewer frames or runtime.vae_chunk=1\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return 130


def split(
    argv: Sequence[str], flags: Sequence[str] = (), *, doc: str, bare: bool = False
) -> tuple[str | None, list[str], set[str]]:
    """Words of a command line -> configuration file or None, name=value overrides, flags that were given.

    --help prints `doc` and ends the script; so does a command line without words, unless `bare` allows it.
    """
    if {"--help", "-h"} & set(argv) or not (argv or bare):
        print(doc)
        raise SystemExit(0)
    file, overrides, given = None, [], set()
    for word in argv:
        if word.startswith("--"):
            if word not in flags:
                known = ", ".join((*flags, "--help"))
                raise ValueError(f"there is no option {word}; known are {known}; settings are name=value")
            given.add(word)
        elif "=" in word:
            overrides.append(word)
        elif file is None:
            file = word
        else:
            raise ValueError(
                f"got two configuration files, {file} and {word}; one is allowed. Settings are name=value; "
                'a value with spaces needs quotes: prompt="the boat sails"'
            )
    return file, overrides, given


def take(
    words: Sequence[str], *, numbers: Sequence[str] = (), texts: Sequence[str] = ()
) -> tuple[dict[str, int | str], list[str]]:
    """Split name=value words -> the script's own arguments by name, and the rest, which are settings."""
    own, rest = {}, []
    for word in words:
        name, _, value = word.partition("=")
        if name in numbers:
            try:
                own[name] = int(value)
            except ValueError:
                raise ValueError(f"{word}: {name} is a whole number") from None
        elif name in texts:
            if not value:
                raise ValueError(f"{word} is empty; give a value or leave it out")
            own[name] = value
        else:
            rest.append(word)
    return own, rest


def take_all(
    words: Sequence[str], *, numbers: Sequence[str] = (), texts: Sequence[str] = (), hint: str = ""
) -> dict[str, int | str]:
    """The same for a script that takes no settings: every name must be known, and given once."""
    own, rest = take(words, numbers=numbers, texts=texts)
    if rest:
        known = ", ".join(f"{name}=" for name in (*texts, *numbers))
        raise ValueError(f"there is no {rest[0].partition('=')[0]}=; known are {known}{hint}")
    names = [word.partition("=")[0] for word in words]
    if twice := [name for name in own if names.count(name) > 1]:
        raise ValueError(f"{twice[0]}= is given twice; give it once")
    return own


def choose(name: str, value: str, known: Iterable[str]) -> str:
    if value not in known:
        raise ValueError(f"there is no {name}={value}; choose {' or '.join(known)}")
    return value


def at_least_one(name: str, value: int) -> int:
    if value < 1:
        raise ValueError(f"{name} is {value}; give 1 or more")
    return value


def check_file(name: str, path: str | Path) -> Path:
    """ValueError, before any work, unless a file can be written there; its folder is made."""
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{name}={path} is a folder; give the name of a file in it")
    whole.check_folder(f"{name}=", path.absolute().parent)
    return path


def _note(message, category, filename, lineno, file=None, line=None) -> None:
    sys.stderr.write(f"note: {message}\n")


def is_setting(word: str) -> bool:
    """Whether a word is `section.name=value` rather than a path or a name."""
    return bool(re.fullmatch(r"[a-z_0-9.]+=.*", word, re.S))
