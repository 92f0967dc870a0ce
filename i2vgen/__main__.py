"""The command `i2vgen`, also `python -m i2vgen`: it finds what was asked for, and runs it.

--help and --version answer without importing anything heavy: a help text is read, its module is not imported.
"""

from __future__ import annotations

import ast
import difflib
import importlib
import importlib.util
import sys
from collections.abc import Mapping, Sequence

import i2vgen
from i2vgen.commands import BARE, COMMANDS


def main(
    argv: Sequence[str] | None = None, *, commands: Mapping[str, str] = COMMANDS, program: str = "i2vgen"
) -> int:
    """Run one of `commands` -> exit status. `argv` are its name and its words, by default the process's."""
    name, *words = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("--help", "-h"):
        print(listing(commands, program))
        return 0
    if name == "--version":
        print(f"i2vgen {i2vgen.__version__}")
        return 0
    if name not in commands:
        sys.stderr.write(f"error: {unknown(name, commands, program)}\n")
        return 2
    module = f"i2vgen.commands.{name.replace('-', '_')}"
    if {"--help", "-h"} & set(words) or not (words or name in BARE):
        print(help_text(module))
        return 0

    from i2vgen import cli  # only now: it takes a while

    return cli.run(lambda: importlib.import_module(module).main(words))


def listing(commands: Mapping[str, str], program: str) -> str:
    lines = [f"    {name:14}{what}" for name, what in commands.items()]
    return "\n".join(
        [
            f"{program} COMMAND [setting=value ...] [--action ...]",
            "",
            *lines,
            "",
            f"{program} COMMAND --help explains a command. Settings are name=value in all of them.",
        ]
    )


def unknown(name: str, commands: Mapping[str, str], program: str) -> str:
    """What to say of a first word that is no command; `!r` shows its control characters as escapes."""
    if name.startswith("-"):
        return f"there is no option {name!r}; known are --help, --version; those of a command follow its name"
    if "=" in name:
        return f"{name!r} is a setting; write the command first, such as {program} {next(iter(commands))}"
    near = difflib.get_close_matches(name.lower().replace("_", "-"), commands, n=1)
    hint = f"did you mean {program} {near[0]}?" if near else f"{program} --help lists them"
    return f"there is no command {name!r}; {hint}"


def help_text(module: str) -> str:
    """The docstring of a module that is not imported."""
    loader = importlib.util.find_spec(module).loader
    return ast.get_docstring(ast.parse(loader.get_source(module)), clean=False).rstrip()


if __name__ == "__main__":
    sys.exit(main())
