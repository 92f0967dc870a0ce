"""Shared by the commands: parsing command lines of settings, and errors without tracebacks."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NoReturn

from PIL import Image
from tqdm import tqdm

from i2vgen.files import plugins, whole
from i2vgen.settings import shipped
from i2vgen.settings.config import FOREIGN, Config

# What can command a terminal, or hide what a text says: control characters, line separators, the marks that
# turn the direction of writing; and surrogates, which no terminal can show.
UNSEEN = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def run(main: Callable[[], int | None]) -> int:
    """Run `main` -> exit status. User errors and lack of memory are reported in one line, with status 2."""
    show_warnings_as_notes()
    with (
        contextlib.redirect_stdout(Shown(sys.stdout)),
        contextlib.redirect_stderr(Shown(sys.stderr)),
        whole.no_empty_folders(),
    ):
        try:
            return main() or 0
        except (ValueError, OSError, FloatingPointError) as error:
            return _failed(str(error))
        except MemoryError:
            return _failed("out of memory; use a smaller size or fewer frames")
        except RuntimeError as error:
            if type(error).__name__ == "OutOfMemoryError":  # torch's; importing it would delay every command
                return _failed(f"out of device memory; use a smaller size or fewer frames ({error})")
            if "DefaultCPUAllocator" not in str(error):
                raise  # our own bugs keep their traceback
            return _failed("out of memory; use a smaller size, fewer frames or runtime.vae_chunk=1")
        except KeyboardInterrupt:
            sys.stderr.write("interrupted\n")
            return 130


def show_warnings_as_notes() -> None:
    """One line each, in this process."""
    warnings.showwarning = _note


class Shown:
    """A stream on which no name can command the terminal: control characters become escapes.

    Line ends, tabs and the carriage returns of progress bars pass; `shown` stops them too.
    """

    def __init__(self, stream):
        self.stream = stream
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # for terminals that are not Unicode

    def write(self, text: str) -> int:
        return self.stream.write(re.sub(r"[^\n\t\r]+", lambda part: shown(part[0]), text))

    def __getattr__(self, name: str):
        return getattr(self.stream, name)


def shown(text: object) -> str:
    """One line of text, fit for a terminal."""
    return UNSEEN.sub(lambda found: found[0].encode("unicode_escape").decode(), str(text))


def split(argv: Sequence[str], flags: Sequence[str] = ()) -> tuple[str | None, list[str], set[str]]:
    """Words of a command line -> configuration file or None, name=value overrides, flags that were given.

    The file may be one of those shipped (`shipped.config`).
    """
    file, overrides, given = None, [], set()
    for word in argv:
        if word.startswith("--"):
            if word not in flags:
                known, name = ", ".join((*flags, "--help")), re.split("[ =]", word)[0].strip("-")
                name = name.replace("-", "_")
                raise ValueError(
                    f"there is no option {word}; known are {known}; settings are name=value, without dashes: "
                    f"{FOREIGN.get(name, name)}=..."
                )
            given.add(word)
        elif "=" in word:
            overrides.append(word)
        elif file is None:
            file = shipped.config(os.path.expanduser(word))
        else:
            raise ValueError(
                f"got two configuration files, {file} and {word}; one is allowed. Settings are "
                'name=value, as in image=photo.jpg; a value with spaces needs quotes: prompt="the boat sails"'
            )
    return file, overrides, given


def take(
    words: Sequence[str], *, numbers: Sequence[str] = (), texts: Sequence[str] = ()
) -> tuple[dict[str, int | str], list[str]]:
    """Split name=value words -> the command's own arguments by name, and the rest, which are settings."""
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
            own[name] = os.path.expanduser(value)
        else:
            rest.append(word)
    return own, rest


def take_all(
    words: Sequence[str], *, numbers: Sequence[str] = (), texts: Sequence[str] = (), hint: str = ""
) -> dict[str, int | str]:
    """The same for a command that takes no settings: every name must be known, and given once."""
    own, rest = take(words, numbers=numbers, texts=texts)
    if rest:
        known = ", ".join(f"{name}=" for name in (*texts, *numbers))
        raise ValueError(f"there is no {rest[0].partition('=')[0]}=; known are {known}{hint}")
    names = [word.partition("=")[0] for word in words]
    if twice := [name for name in own if names.count(name) > 1]:
        raise ValueError(f"{twice[0]}= is given twice; give it once")
    return own


class Parser(argparse.ArgumentParser):
    """For a command whose plain words are files. Its options may be written name=value or --name value.

    A mistake is a ValueError. The command's docstring is its help.
    """

    def __init__(self, command: str):
        super().__init__(prog=f"i2vgen {command}", add_help=False)

    def read(self, argv: Sequence[str]) -> argparse.Namespace:
        takes_value = {a.dest for a in self._actions if a.option_strings and a.nargs != 0}
        words = []
        for word in argv:
            name, equals, value = word.partition("=")
            own = equals and name in takes_value
            if own and not value:
                raise ValueError(f"{word} is empty; give a value or leave it out")
            words.append(f"--{name.replace('_', '-')}={value}" if own else word)
        return self.parse_intermixed_args(words)

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; {self.prog} --help explains it")


def choose(name: str, value: str, known: Iterable[str]) -> str:
    if value not in known:
        raise ValueError(f"there is no {name}={value}; choose {' or '.join(known)}")
    return value


def at_least_one(name: str, value: int) -> int:
    if value < 1:
        raise ValueError(f"{name} is {value}; give 1 or more")
    return value


def check_file(name: str, path: str | Path, words: Sequence[str] = ()) -> Path:
    """ValueError, before any work, unless a file can be written there; its folder is made.

    `words` are the command line: none of the other files that it names is overwritten.
    """
    path = Path(os.path.expanduser(path))
    if path.is_dir():
        raise ValueError(f"{name}={path} is a folder; give the name of a file in it")
    whole.check_place(f"{name}=", path)
    whole.refuse_overwriting(
        [path], [word.partition("=")[2] or word for word in words if not word.startswith(f"{name}=")]
    )
    return path


def check_picture(name: str, path: str | Path, words: Sequence[str] = ()) -> Path:
    """The same for a picture; ValueError for an ending that Pillow cannot write."""
    path = Path(path)
    if Image.registered_extensions().get(path.suffix.lower()) not in Image.SAVE:
        raise ValueError(f"{name}={path}: no picture has this ending; write .png")
    return check_file(name, path, words)


def save_picture(picture: Image.Image, path: Path) -> None:
    with whole.replacing(path) as temporary:
        picture.save(temporary, Image.registered_extensions()[path.suffix.lower()], optimize=True)


def _note(message, category, filename, lineno, file=None, line=None) -> None:
    tqdm.write(f"note: {shown(message)}", file=sys.stderr)  # on a line of its own beside a progress bar


def _failed(message: str) -> int:
    sys.stderr.write(f"error: {shown(message)}\n")
    return 2


def tell_plugins(config: Config) -> None:
    """Import the plugins of the settings and print which they are; ValueError for a file that is none."""
    for plugin in plugins.of(config):
        print(f"plugin {shown(plugin)}")


def is_setting(word: str) -> bool:
    """Whether a word is `section.name=value` rather than a path or a name."""
    return bool(re.fullmatch(r"[a-z_0-9.]+=.*", word, re.S))
