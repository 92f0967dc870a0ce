"""Read or replace the output of any module of a network, without changing a line in it.

    seen = {}
    with taps(model.unet, {"up.*.blocks.*.spatial": seen.setdefault}):          # read
        model(picture, prompt)
    with taps(model.unet, {"mid1.temporal": lambda path, x: torch.zeros_like(x)}):  # replace
        model(picture, prompt)

    with attention_by(model.unet, "mid1.*", my_function):                       # another attention
    with attention_maps(model.unet, {"*.cross_attention": function}):           # its probabilities
    with controlled(model.unet, adapter):                                       # residuals of an adapter

Paths are those of `named_modules` (`i2vgen summary` prints them), patterns as in fnmatch. Nothing
is left behind after the `with`. While a module is tapped, the savings around it step aside for the plain
forward, compiled and recorded code included.
"""

from __future__ import annotations

import contextlib
import difflib
import fnmatch
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping

from torch import Tensor, nn

from i2vgen.model.attention import Attention, AttentionFunction
from i2vgen.model.unet import Residuals, UNet

Tap = Callable[[str, Tensor], Tensor | None]  # path and output -> None keeps it, a tensor replaces it
Control = Callable[[Tensor, Tensor], Residuals]  # the UNet's own x [b c f h w] and t [b]


@contextlib.contextmanager
def taps(network: nn.Module, functions: Mapping[str, Tap]) -> Iterator[None]:
    """Inside, every module whose path matches a pattern passes its output to the function.

    Inside the UNet outputs are [b f h w c]. ValueError for a pattern that matches no module and for a
    replacement of another shape; a warning at the end if none of a pattern's modules was called.
    """
    called: set[str] = set()
    with contextlib.ExitStack() as hooks:
        for pattern, function in functions.items():
            for path, module in matching(network, pattern).items():
                hook = _hook(path, pattern, function, called)
                hooks.callback(module.register_forward_hook(hook).remove)
        yield
    _warn_of_uncalled(functions, called)


def _warn_of_uncalled(patterns: Iterable[str], called: set[str]) -> None:
    if never := [pattern for pattern in patterns if pattern not in called]:
        warnings.warn(
            f"the tap {never[0]!r} had no effect: no module that it names was called inside the `with`",
            stacklevel=4,
        )


@contextlib.contextmanager
def attention_by(network: nn.Module, pattern: str, function: AttentionFunction) -> Iterator[None]:
    """Inside, the attentions whose paths match compute with `function`: q [n m t d], k, v [n m k d].

    ValueError for a pattern without attentions, a warning at the end if none of them was called. To keep the
    function, set it as the modules' `backend`.
    """
    called: set[str] = set()
    attend = _noting(called, pattern, function)
    with _backends(dict.fromkeys(_attentions(network, pattern).values(), attend)):
        yield
    _warn_of_uncalled([pattern], called)


@contextlib.contextmanager
def attention_maps(network: nn.Module, functions: Mapping[str, Tap]) -> Iterator[None]:
    """Inside, the attentions whose paths match hand their probabilities [n m t k] to the function.

    None keeps them, a tensor replaces them. They are computed by the formula, which needs the memory for all
    of them. In a spatial attention n counts frames, in a cross-attention samples (t runs over frames and
    pixels), in a temporal one the pixels of all samples. A warning at the end if none was called.
    """
    called: set[str] = set()
    chosen = {
        module: _noting(called, pattern, _with_map(path, function))
        for pattern, function in functions.items()
        for path, module in _attentions(network, pattern).items()
    }
    with _backends(chosen):
        yield
    _warn_of_uncalled(functions, called)


def _noting(called: set[str], pattern: str, function: AttentionFunction) -> AttentionFunction:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        called.add(pattern)
        return function(q, k, v)

    return attend


def _with_map(path: str, function: Tap) -> AttentionFunction:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
        probabilities = scores.softmax(-1)
        new = function(path, probabilities)
        return (new if isinstance(new, Tensor) else probabilities).to(v.dtype) @ v

    return attend


def _attentions(network: nn.Module, pattern: str) -> dict[str, Attention]:
    found = {p: m for p, m in matching(network, pattern).items() if isinstance(m, Attention)}
    if not found:
        raise ValueError(f"{pattern!r} matches no attention; their paths end in attention, attention1 or 2")
    return found


@contextlib.contextmanager
def _backends(chosen: Mapping[Attention, AttentionFunction]) -> Iterator[None]:
    before = {module: module.backend for module in chosen}
    try:
        _set_backends(chosen)
        yield
    finally:
        _set_backends(before)


def _set_backends(chosen: Mapping[Attention, str | AttentionFunction]) -> None:
    for module, backend in chosen.items():
        if isinstance(module.backend, nn.Module):  # PyTorch puts nothing else in a module's place
            del module.backend
        module.backend = backend


@contextlib.contextmanager
def controlled(unet: UNet, control: Control) -> Iterator[None]:
    """Inside, the UNet adds the `Residuals` that `control` computes from x [b c f h w] and t [b].

    `control` may be a module; it does not become a part of the UNet. A warning at the end if
    nothing was ever added.
    """
    added = False

    def hook(module: nn.Module, inputs: tuple, options: dict) -> tuple[tuple, dict]:
        nonlocal added
        given = control(*inputs[:2])
        single, lists = (given.entrance, given.middle), (given.down, given.skips, given.up)
        added = added or any(one is not None for part in (single, *lists) for one in part)
        return inputs, {**options, "residuals": given}

    handle = unet.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
    if not added:
        warnings.warn(
            "the control had no effect: the network was not called inside the `with`, or no residual was "
            "given",
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
