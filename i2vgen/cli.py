"""Shared by the scripts: parsing command lines of settings, and errors without tracebacks."""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Callable, Sequence

import torch


def run(main: Callable[[], int | None]) -> int:
    """Run `main` -> exit status. User errors and lack of memory are reported in one line, with status 2."""
    warnings.showwarning = _note
    try:
        return main() or 0
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


def split(argv: Sequence[str], flags: Sequence[str]) -> tuple[str | None, list[str], set[str]]:
    """Command line -> configuration file or None, name=value overrides, given flags (of `flags`)."""
    file, overrides, given = None, [], set()
    for word in argv:
        if word.startswith("--"):
            if word not in flags:
                known = ", ".join(flags)
                raise ValueError(
                    f"there is no option {word}; known are {known}. Write settings as name=value"
                )
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
    words: Sequence[str], *, numbers: Sequence[str], texts: Sequence[str]
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


def _note(message, category, filename, lineno, file=None, line=None) -> None:
    sys.stderr.write(f"note: {message}\n")


def is_setting(word: str) -> bool:
    """Whether a word is `section.name=value` rather than a path or a name."""
    return bool(re.fullmatch(r"[a-z_0-9.]+=.*", word, re.S))
