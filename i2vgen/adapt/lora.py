"""Low-rank adapters (LoRA, arXiv 2106.09685) on any linear or convolutional module of a network.

    adapters = lora.attach(unet, ["*.cross_attention.to_*"], rank=8)   # trainable, without effect at first
    adapters.save("outputs/mine")                                      # peft's files, a few hundred kB
    lora.load(unet, "outputs/mine", scale=0.8).merge()                 # or .remove(): the weights as before

Everything that reads a weight W sees W + scale * alpha / rank * B A, so nothing else in a network has to
know. To combine adapters, load and merge one after the other. `i2vgen train` trains them with
`train.lora_rank`, and `i2vgen generate adapter=FOLDER` samples with them; `lora_files` reads and writes them.

Axes: r rank, i inputs of a weight (times its kernel), o outputs.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from i2vgen.adapt.lora_files import SETTINGS_FILE, WEIGHTS_FILE, Matrices, read, renamed, write
from i2vgen.adapt.taps import matching

__all__ = ["SETTINGS_FILE", "WEIGHTS_FILE", "Adapters", "attach", "load", "read"]


class LowRank(nn.Module):
    """What one weight is seen as: W [o ...] -> W + scale * B A, in W's dtype."""

    def __init__(self, weight: Tensor, rank: int, strength: float):
        super().__init__()
        inputs = weight[0].numel()
        self.scale, self.strength = 1.0, strength
        # Both in at least float32: an update of Adam's would vanish in half precision.
        like = {"dtype": torch.promote_types(weight.dtype, torch.float32), "device": weight.device}
        self.a = nn.Parameter(torch.empty(rank, inputs, **like))
        self.b = nn.Parameter(torch.zeros(weight.shape[0], rank, **like))
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))

    def forward(self, weight: Tensor) -> Tensor:
        change = self.scale * self.strength * (self.b @ self.a)
        return weight + change.view_as(weight).to(weight.dtype)


class Adapters(nn.Module):
    """All adapters of one network. Its parameters are theirs alone, so it is what an optimiser gets."""

    def __init__(self, network: nn.Module, ranks: Mapping[str, int], alphas: Mapping[str, float]):
        """Rank and alpha by module path. ValueError for modules that cannot carry an adapter."""
        super().__init__()
        self.alphas, self.modules_by_path = dict(alphas), {}
        parts = {}
        for path, rank in ranks.items():
            module = network.get_submodule(path)
            if not isinstance(module, nn.Linear | nn.Conv2d):
                raise ValueError(f"{path} is a {type(module).__name__}; only Linear and Conv carry adapters")
            if parametrize.is_parametrized(module, "weight"):
                raise ValueError(
                    f"{path} carries an adapter already, or its weight is stored in eight bits; merge or "
                    "remove that adapter first, and leave out runtime.weight_storage"
                )
            self.modules_by_path[path] = module
            parts[path.replace(".", "/")] = LowRank(module.weight, rank, alphas[path] / rank)
        self.parts = nn.ModuleDict(parts)
        for path, module in self.modules_by_path.items():
            parametrize.register_parametrization(module, "weight", self.part(path), unsafe=True)

    def part(self, path: str) -> LowRank:
        return self.parts[path.replace(".", "/")]

    def set_scale(self, scale: float) -> Adapters:
        """How strongly the adapters act: 0 not at all, 1 as trained."""
        for part in self.parts.values():
            part.scale = scale
        return self

    def remove(self) -> None:
        """Take the adapters out: the network is as it was, bit for bit."""
        self._leave(merged=False)

    def merge(self) -> None:
        """Make the adapted weights the network's own, bit for bit what it computed with."""
        self._leave(merged=True)

    def _leave(self, *, merged: bool) -> None:
        for module in self.modules_by_path.values():
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=merged)

    def save(self, folder: str | Path, *, origin: Mapping | None = None) -> Path:
        """Write the matrices and their settings in peft's format, at scale 1, and how they were made."""
        matrices = {}
        for path, module in self.modules_by_path.items():
            kernel = module.parametrizations.weight.original.shape[2:]
            a, b = (x.detach().float().cpu() for x in (self.part(path).a, self.part(path).b))
            if kernel:
                a, b = a.unflatten(1, (-1, *kernel)), b[..., None, None]
            matrices[path] = Matrices(a, b, self.alphas[path])
        return write(folder, matrices, origin=origin)


def attach(network: nn.Module, patterns: Sequence[str], *, rank: int, alpha: float | None = None) -> Adapters:
    """New adapters, without effect until trained, on the linear and convolutional modules that match.

    `alpha` defaults to the rank: full strength. ValueError for a pattern that matches none of them.
    """
    if rank < 1:
        raise ValueError(f"the rank of an adapter is {rank}; give at least 1")
    ranks = {}
    for pattern in patterns:
        found = {p: m for p, m in matching(network, pattern).items() if isinstance(m, nn.Linear | nn.Conv2d)}
        if not found:
            raise ValueError(f"{pattern!r} matches no Linear and no Conv; only these carry adapters")
        ranks |= dict.fromkeys(found, rank)
    if not ranks:
        raise ValueError("no pattern given; name modules, for example *.cross_attention.to_*")
    return Adapters(network, ranks, dict.fromkeys(ranks, rank if alpha is None else alpha))


def load(network: nn.Module, source: str | Path, *, scale: float = 1.0) -> Adapters:
    """Attach the adapters of a folder or file (`lora_files`). ValueError names what does not fit."""
    matrices = read(source)
    known = dict(network.named_modules())
    fitting, foreign = renamed(matrices, {path: path for path in known})
    if foreign:
        raise ValueError(
            f"{source} is an adapter for another architecture: this network has no {foreign[0]} "
            f"({len(foreign)} of its {len(matrices)} modules are missing); names of diffusers or of the "
            "official code are translated by `i2vgen convert ADAPTER OUT`"
        )
    for path, held in fitting.items():
        weight = getattr(known[path], "weight", None)
        if weight is None or (held.a[0].shape, len(held.b)) != (weight[0].shape, len(weight)):
            shape = None if weight is None else tuple(weight.shape)
            raise ValueError(
                f"{source} is an adapter for another architecture: its matrices for {path} have shapes "
                f"{tuple(held.a.shape)} and {tuple(held.b.shape)}, the weight is {shape}"
            )
    ranks = {path: len(held.a) for path, held in fitting.items()}
    adapters = Adapters(network, ranks, {path: held.alpha for path, held in fitting.items()})
    with torch.no_grad():
        for path, held in fitting.items():
            adapters.part(path).a.copy_(held.a.flatten(1))
            adapters.part(path).b.copy_(held.b.flatten(1))
    if not scale or not any(part.b.any() for part in adapters.parts.values()):
        warnings.warn(f"the adapter {source} at scale {scale:g} changes nothing", stacklevel=2)
    return adapters.set_scale(scale)
