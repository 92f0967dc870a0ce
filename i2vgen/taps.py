"""Read or replace what any module of a network gives, from outside and without a line changed in it.

    seen = {}
    with taps(model.unet, {"up.*.blocks.*.spatial": seen.setdefault}):          # read
        model(picture, prompt)
    with taps(model.unet, {"mid1.temporal": lambda path, x: torch.zeros_like(x)}):  # replace
        model(picture, prompt)

Paths are those of `named_modules` (`python scripts/summary.py` prints them), patterns as in fnmatch. Outside
the `with` nothing is left behind. A network under `torch.compile` does not stop for taps: load it without.
"""

from __future__ import annotations

import contextlib
import difflib
import fnmatch
import warnings
from collections.abc import Callable, Iterator, Mapping

from torch import Tensor, nn

Tap = Callable[[str, Tensor], Tensor | None]  # path and output -> None leaves it, a tensor takes its place


@contextlib.contextmanager
def taps(network: nn.Module, functions: Mapping[str, Tap]) -> Iterator[None]:
    """Inside, every module whose path matches a pattern hands its output, as it lies, to the function.

    Inside the UNet outputs are [b f h w c]. ValueError for a pattern that matches no module and for a
    replacement of another shape; a warning at the end if a pattern's modules were never called: a faster
    form then reads their weights itself, and tapping the module around them works.
    """
    called: set[str] = set()
    with contextlib.ExitStack() as hooks:
        for pattern, function in functions.items():
            for path, module in matching(network, pattern).items():
                hook = _hook(path, pattern, function, called)
                hooks.callback(module.register_forward_hook(hook).remove)
        yield
    if never := [pattern for pattern in functions if pattern not in called]:
        warnings.warn(
            f"the tap {never[0]!r} changed and saw nothing: no module it names was called; tap the module "
            "around it, or switch the faster forms of `runtime` off",
            stacklevel=3,
        )


def matching(network: nn.Module, pattern: str) -> dict[str, nn.Module]:
    """Path -> module; ValueError with the nearest paths if there is none."""
    modules = dict(network.named_modules())
    found = {path: m for path, m in modules.items() if path and fnmatch.fnmatchcase(path, pattern)}
    if not found:
        near = difflib.get_close_matches(pattern, modules, n=3, cutoff=0.4) or list(modules)[1:4]
        raise ValueError(f"no module's path matches {pattern!r}; near are {', '.join(near)}")
    return found


def _hook(path: str, pattern: str, function: Tap, called: set[str]):
    def hook(module: nn.Module, inputs: tuple, output):
        if not isinstance(output, Tensor):
            return None
        called.add(pattern)
        new = function(path, output)
        # A function that reads may return something (`dict.setdefault` does): only a new tensor replaces.
        if not isinstance(new, Tensor) or new is output:
            return None
        if new.shape != output.shape:
            raise ValueError(
                f"the tap of {path} returned a tensor of shape {tuple(new.shape)}; the module gives "
                f"{tuple(output.shape)}"
            )
        return new

    return hook
