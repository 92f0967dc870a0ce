"""Plugins: Python files of the user's own that change a model after it is built, before it is loaded.

    plugins=my_file.py      on the command line, or in the user's YAML file

A plugin has a function `change(parts, config)`: `parts` are "unet", "vae" and "clip" as they are built,
mostly without memory. It may replace modules, set attention functions and add parameters. ADDS and DROPS,
patterns such as "unet.stem.registers" or "unet.mid1.temporal.*", declare the tensors that the model has more
or less afterwards.

A plugin is code, which runs when it is imported. It is only ever taken from where the user writes settings:
never from a weights folder or the record of a clip, which name it and its hash.
"""

from __future__ import annotations

import fnmatch
import functools
import importlib.util
import inspect
import os
import sys
import traceback
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from i2vgen.files import records
from i2vgen.settings.config import Config

# What a file of the user's own may raise; exceptions that it defines itself keep their traceback.
ERRORS = (
    ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, NameError, OSError,
    RuntimeError, SyntaxError, TypeError, ValueError,
)  # fmt: skip

Names = dict[str, tuple[int, ...]]  # of tensors, "unet.conv_in.weight", and their shapes


@dataclass(frozen=True)
class Plugin:
    """An imported file"""

    path: str  # as the user named it
    sha256: str  # of the file when it was imported
    change: Callable[[dict[str, nn.Module], Config], None]
    adds: tuple[str, ...]
    drops: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.path} (sha256 {self.sha256[:12]})"


def of(config: Config) -> list[Plugin]:
    """The plugins of the settings, imported; ValueError for a file that is none."""
    return [imported(path) for path in config.plugins]


def described(config: Config) -> list[dict[str, str]]:
    """What a record, a run or the origin of weights says of them"""
    return [{"file": plugin.path, "sha256": plugin.sha256} for plugin in of(config)]


@functools.cache
def imported(path: str) -> Plugin:
    """Once per process: later changes of the file have no effect."""
    file = Path(os.path.expanduser(path))
    if file.suffix != ".py" or not file.is_file():
        raise ValueError(f"plugins={path} {'does not exist' if not file.exists() else 'is no .py file'}")
    sha256 = records.sha256(file)
    spec = importlib.util.spec_from_file_location(f"i2vgen_plugin_{file.stem}_{sha256[:12]}", file)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # dataclasses look there
    _run(path, "", lambda: spec.loader.exec_module(module))
    change = getattr(module, "change", None)
    if not isinstance(change, types.FunctionType) or len(inspect.signature(change).parameters) != 2:
        raise ValueError(
            f"plugins={path} has no function change(parts, config), which changes a model; docs/laboratory.md"
            " has one"
        )
    return Plugin(path, sha256, change, *(_patterns(path, module, name) for name in ("ADDS", "DROPS")))


def _patterns(path: str, module: types.ModuleType, name: str) -> tuple[str, ...]:
    found = getattr(module, name, ())
    if not isinstance(found, tuple | list) or not all(isinstance(one, str) for one in found):
        raise ValueError(
            f'plugins={path}: {name} is {found!r}; give a tuple of names, such as ("unet.stem.registers",)'
        )
    return tuple(found)


def _run(path: str, where: str, function: Callable[[], object]) -> None:
    """ValueError that names the line of the file, for whatever goes wrong in it"""
    try:
        function()
    except ERRORS as error:
        frames = traceback.extract_tb(error.__traceback__)
        place = os.path.abspath(os.path.expanduser(path))  # as an import makes it
        lines = [frame.lineno for frame in frames if frame.filename == place]
        if isinstance(error, SyntaxError) and error.lineno:
            lines.append(error.lineno)
        line = f"line {lines[-1]}" if lines else "a line that is not known"
        said = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise ValueError(f"plugins={path}{where} fails in {line}: {said}") from error


def change(parts: dict[str, nn.Module], config: Config, names: Callable[[nn.Module], Names]) -> None:
    """Let every plugin change the built parts, in place. ValueError where it did not do what it declares.

    `names` gives the tensors of a part as a weights file holds them.
    """
    for plugin in of(config):
        before = _all(parts, names)
        _run(plugin.path, ": change(parts, config)", lambda plugin=plugin: plugin.change(parts, config))
        dropped, added = difference(before, _all(parts, names))
        _check(plugin, "ADDS", plugin.adds, added)
        _check(plugin, "DROPS", plugin.drops, dropped)


def difference(before: Names, after: Names) -> tuple[set[str], set[str]]:
    """-> the tensors that were dropped, and those that were added; one of another shape is both"""
    differing = {name for name in before.keys() & after.keys() if before[name] != after[name]}
    return (before.keys() - after.keys()) | differing, (after.keys() - before.keys()) | differing


def _all(parts: Mapping[str, nn.Module], names: Callable[[nn.Module], Names]) -> Names:
    return {
        f"{part}.{name}": shape for part, module in parts.items() for name, shape in names(module).items()
    }


def _check(plugin: Plugin, what: str, declared: Sequence[str], found: set[str]) -> None:
    does = what.lower()
    for name in sorted(found):
        if not any(fnmatch.fnmatchcase(name, pattern) for pattern in declared):
            raise ValueError(
                f"plugins={plugin.path} {does} the tensor {name}, which its {what} does not declare (a "
                "tensor of another shape is one dropped and one added)"
            )
    for pattern in declared:
        if not fnmatch.filter(found, pattern):
            raise ValueError(
                f"plugins={plugin.path} declares {what} {pattern!r}, but its change() {does} no such tensor"
            )


def recorded(origin: Mapping) -> list[Mapping]:
    """The plugins that weights or an adapter were trained with, as `described` wrote them."""
    found = origin.get("plugins")
    return found if isinstance(found, list) and all(isinstance(one, dict) for one in found) else []


def named(trained: Sequence[Mapping]) -> str:
    return ", ".join(f"{one.get('file')} (sha256 {str(one.get('sha256'))[:12]})" for one in trained)


def missing(origin: Mapping, config: Config, *, subject: str = "they were") -> str:
    """What to say of weights that were trained with plugins that the settings lack; empty if with none."""
    here = {plugin.sha256 for plugin in of(config)}
    gone = [one for one in recorded(origin) if one.get("sha256") not in here]
    if not gone:
        return ""
    files = ",".join(str(one.get("file")) for one in gone)
    return f"{subject} trained with the plugin {named(gone)}, which is not given: plugins=[{files}] names it"
