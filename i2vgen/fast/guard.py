"""When a saving must leave a call to the plain forward.

A saving reads the weights of the modules inside it instead of calling them, so it is right only while these
modules are exactly the ones it was written for. Each of its forwards asks `diverted` first, in the call
itself and outside compiled code: a hook added at any time is called, and a module that a researcher
replaced, subclassed or gave another forward computes what it was written to compute.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import threading
from collections.abc import Iterator

import torch
from torch import nn
from torch.nn.modules import module as registry
from torch.nn.utils import parametrize

from i2vgen.model.unet import UNet
from i2vgen.model.vae import AutoencoderKL
from i2vgen.settings import config

Known = dict[tuple[type[nn.Module], str], set[type[nn.Module]]]
SMALL = config.UNet(
    base_width=8, width_multipliers=(1, 2), attention_levels=(True, False), head_width=8, norm_groups=8
)


def diverted(module: nn.Module) -> bool:
    """Whether this call of a saving's `module` belongs to the plain forward.

    It does where gradients are wanted, since no saving has a backward; where dropout is active; and where a
    module inside is not as it was built. Inside compiled code the answer was found before entering it.
    """
    if torch.compiler.is_compiling():
        return False
    if module.training or torch.is_grad_enabled():
        return True
    return not undisturbed(module)


def undisturbed(module: nn.Module) -> bool:
    """Whether everything inside a module is as it was built; of the module itself nothing is asked."""
    if getattr(_trust, "on", False):
        return True
    if registry._global_forward_hooks or registry._global_forward_pre_hooks:
        return False
    return _as_built(module, built())


@contextlib.contextmanager
def trust() -> Iterator[None]:
    """Inside, all modules count as undisturbed: for the parts of a network that was looked at as a whole."""
    before, _trust.on = getattr(_trust, "on", False), True
    try:
        yield
    finally:
        _trust.on = before


_trust = threading.local()


def _as_built(module: nn.Module, known: Known) -> bool:
    kind = plain_kind(type(module))
    for name, part in module.__dict__["_modules"].items():
        if part is None:
            continue
        wanted = known.get((kind, "" if kind is nn.ModuleList else name), ())
        held = part.__dict__
        if (
            held["_forward_hooks"]
            or held["_forward_pre_hooks"]
            or "forward" in held
            or plain_kind(type(part)) not in wanted
            or not _as_built(part, known)
        ):
            return False
    return True


def ordinary(module: nn.Module) -> bool:
    """Whether a module itself is exactly of a kind of ours, with no hook on it and no forward of its own."""
    kind = plain_kind(type(module))
    return not touched(module) and any(kind in kinds for kinds in built().values())


def touched(module: nn.Module) -> bool:
    """Whether a module has a hook, be it one for all modules, or a forward that is not its class's"""
    if registry._global_forward_hooks or registry._global_forward_pre_hooks:
        return True
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


@functools.cache
def plain_kind(kind: type[nn.Module]) -> type[nn.Module]:
    """The plain class behind one that a saving has put in; any other class is its own.

    A weight stored in eight bits is a parametrization, and reading it gives the widened weight.
    """
    if kind.__module__ == parametrize.__name__:  # the class that PyTorch makes for a parametrized module
        kind = kind.__bases__[0]
    return vars(kind).get("plain", kind)


@functools.cache
def built() -> Known:
    """(class, name of a part) -> the classes that this part has in networks just built; "" in a list."""
    with torch.device("meta"):
        networks = [
            UNet(dataclasses.replace(SMALL, moved_grid=2), config.Use(frame_positions=True, output="moved")),
            AutoencoderKL(config.VAE(base_width=8, width_multipliers=(1, 2), norm_groups=8)),
        ]
    found: Known = {}
    for network in networks:
        for module in network.modules():
            for name, part in module.named_children():
                place = type(module), "" if type(module) is nn.ModuleList else name
                found.setdefault(place, set()).add(type(part))
    return found
