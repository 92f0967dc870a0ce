"""When a saving must leave a call to the plain forward.

A saving reads the weights of the modules inside it instead of calling them, so it is right only while these
modules are exactly the ones it was written for. Each of its forwards asks `diverted` first, in the call
itself and outside compiled code: a hook added at any time is called, and a module that a researcher
replaced, subclassed or gave another forward computes what it was written to compute.
"""

from __future__ import annotations

import functools

import torch
from torch import nn
from torch.nn.modules import module as registry
from torch.nn.utils.parametrize import type_before_parametrizations

from i2vgen.model.unet import UNet
from i2vgen.model.vae import AutoencoderKL
from i2vgen.settings import config

SMALL = config.UNet(
    base_width=8, width_multipliers=(1, 2), attention_levels=(True, False), head_width=8, norm_groups=8
)


def diverted(module: nn.Module, *, backward: bool = False) -> bool:
    """Whether this call of a saving's `module` belongs to the plain forward.

    It does where gradients are wanted, unless the saving has a `backward`; where dropout is active; and where
    a module inside is not as it was built. Inside compiled code the answer was found before entering it.
    """
    if torch.compiler.is_compiling():
        return False
    if not backward and (module.training or torch.is_grad_enabled()):
        return True
    return not undisturbed(module)


def undisturbed(module: nn.Module) -> bool:
    """Whether everything inside a module is as it was built; of the module itself nothing is asked."""
    known, kind = built(), plain_kind(module)
    for name, part in module._modules.items():
        if part is None:
            continue
        wanted = known.get((kind, "" if kind is nn.ModuleList else name), ())
        if plain_kind(part) not in wanted or touched(part) or not undisturbed(part):
            return False
    return True


def ordinary(module: nn.Module) -> bool:
    """Whether a module itself is exactly of a kind of ours, with no hook on it and no forward of its own."""
    kind = plain_kind(module)
    return not touched(module) and any(kind in kinds for kinds in built().values())


def touched(module: nn.Module) -> bool:
    """Whether a module has a hook, be it one for all modules, or a forward that is not its class's"""
    if registry._global_forward_hooks or registry._global_forward_pre_hooks:
        return True
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


def plain_kind(module: nn.Module) -> type[nn.Module]:
    """The plain class of a module that a saving has changed, else its own.

    A weight stored in eight bits is a parametrization, and reading it gives the widened weight.
    """
    kind = type_before_parametrizations(module)
    return vars(kind).get("plain", kind)


@functools.cache
def built() -> dict[tuple[type[nn.Module], str], set[type[nn.Module]]]:
    """(class, name of a part) -> the classes that this part has in networks just built; "" in a list."""
    with torch.device("meta"):
        networks = [
            UNet(SMALL, config.Use(frame_positions=True)),
            AutoencoderKL(config.VAE(base_width=8, width_multipliers=(1, 2), norm_groups=8)),
        ]
    found: dict[tuple[type[nn.Module], str], set[type[nn.Module]]] = {}
    for network in networks:
        for module in network.modules():
            for name, part in module.named_children():
                place = type(module), "" if type(module) is nn.ModuleList else name
                found.setdefault(place, set()).add(type(part))
    return found
