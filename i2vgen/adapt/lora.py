"""Low-rank adapters (LoRA, arXiv 2106.09685) on any linear or convolutional module of a network.

    adapters = lora.attach(unet, ["*.cross_attention.to_*"], rank=8)   # trainable, zero to begin with
    adapters.save("outputs/mine")                                      # peft's files, a few hundred kB
    lora.load(unet, "outputs/mine", scale=0.8).merge()                 # or .remove(): the weights as before

A weight W is seen as W + scale * alpha / rank * B A by everything that reads it, the fast forms included, so
nothing else in a network has to know. `scripts/train.py` trains them with `train.lora_rank`, and
`generate.py adapter=FOLDER` samples with them.

Axes: r rank, i inputs of a weight (times its kernel), o outputs.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn.utils import parametrize

from i2vgen.adapt.taps import matching
from i2vgen.files.safefile import Entry, write_safetensors

WEIGHTS_FILE, SETTINGS_FILE = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."  # peft puts it before every path


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
    """All adapters of one network; their parameters and nobody else's, so this is what an optimiser gets."""

    def __init__(self, network: nn.Module, ranks: Mapping[str, int], alpha: float):
        """`ranks`: path of a module -> rank. ValueError for modules that cannot carry one."""
        super().__init__()
        self.alpha, self.modules_by_path = alpha, {}
        parts = {}
        for path, rank in ranks.items():
            module = network.get_submodule(path)
            if not isinstance(module, nn.Linear | nn.Conv2d):
                raise ValueError(f"{path} is a {type(module).__name__}; only Linear and Conv carry adapters")
            if parametrize.is_parametrized(module, "weight"):
                raise ValueError(f"{path} carries an adapter already; merge or remove that one first")
            self.modules_by_path[path] = module
            parts[path.replace(".", "/")] = LowRank(module.weight, rank, alpha / rank)
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
        """The network as it was, bit for bit."""
        self._leave(merged=False)

    def merge(self) -> None:
        """The adapted numbers become the network's own, bit for bit what it computed with, at no cost."""
        self._leave(merged=True)

    def _leave(self, *, merged: bool) -> None:
        for module in self.modules_by_path.values():
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=merged)

    def save(self, folder: str | Path) -> Path:
        """Two files in peft's format: the matrices, float32, and what they are for. Each appears whole."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors, ranks = {}, {}
        for path, module in self.modules_by_path.items():
            part = self.part(path)
            ranks[path] = len(part.a)
            kernel = module.parametrizations.weight.original.shape[2:]
            a, b = (x.detach().float().cpu() for x in (part.a, part.b))
            tensors[f"{PREFIX}{path}.lora_A.weight"] = a.unflatten(1, (-1, *kernel)) if kernel else a
            tensors[f"{PREFIX}{path}.lora_B.weight"] = b[..., None, None] if kernel else b
        entries = [Entry(n, tuple(t.shape), t.dtype, lambda t=t: t.contiguous()) for n, t in tensors.items()]
        write_safetensors(folder / WEIGHTS_FILE, entries)
        settings = {
            "peft_type": "LORA",
            "r": max(ranks.values()),
            "rank_pattern": {path: rank for path, rank in ranks.items() if rank != max(ranks.values())},
            "lora_alpha": self.alpha,
            "target_modules": list(ranks),
            "bias": "none",
        }
        temporary = folder / f".{SETTINGS_FILE}.writing"
        temporary.write_text(json.dumps(settings, indent=1) + "\n")
        temporary.replace(folder / SETTINGS_FILE)
        return folder


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
    return Adapters(network, ranks, rank if alpha is None else alpha)


def load(network: nn.Module, folder: str | Path, *, scale: float = 1.0) -> Adapters:
    """Adapters that `save` or peft wrote, attached. ValueError names what does not fit this network."""
    tensors, alpha = read(folder)
    paths = sorted({name.rpartition(".lora_")[0] for name in tensors})
    known = dict(network.named_modules())
    if foreign := [path for path in paths if path not in known]:
        raise ValueError(
            f"{folder} is an adapter for another architecture: this network has no {foreign[0]} "
            f"({len(foreign)} of its {len(paths)} modules are missing)"
        )
    ranks = {}
    for path in paths:
        a, b = (tensors.get(f"{path}.lora_{which}.weight") for which in "AB")
        weight = getattr(known[path], "weight", None)
        if a is None or b is None:
            raise ValueError(f"{folder} lacks one of the two matrices of {path}")
        fits = weight is not None and (a[0].shape, len(b), b[0].numel()) == (
            weight[0].shape,
            len(weight),
            len(a),
        )
        if not fits:
            shape = None if weight is None else tuple(weight.shape)
            raise ValueError(
                f"{folder} is an adapter for another architecture: its matrices for {path} have shapes "
                f"{tuple(a.shape)} and {tuple(b.shape)}, the weight is {shape}"
            )
        ranks[path] = len(a)
    adapters = Adapters(network, ranks, alpha)
    with torch.no_grad():
        for path in paths:
            part = adapters.part(path)
            part.a.copy_(tensors[f"{path}.lora_A.weight"].flatten(1))
            part.b.copy_(tensors[f"{path}.lora_B.weight"].flatten(1))
    if not scale or not any(part.b.any() for part in adapters.parts.values()):
        warnings.warn(f"the adapter {folder} at scale {scale:g} changes nothing", stacklevel=2)
    return adapters.set_scale(scale)


def read(folder: str | Path) -> tuple[dict[str, Tensor], float]:
    """Matrices by path without peft's prefix, and alpha. ValueError if it is no adapter of this kind."""
    folder = Path(folder)
    try:
        settings = json.loads((folder / SETTINGS_FILE).read_text())
        alpha = float(settings["lora_alpha"])
        if settings.get("peft_type") != "LORA" or settings.get("use_dora") or settings.get("use_rslora"):
            raise ValueError(f"{folder} holds no plain LoRA; other kinds of adapters are not read")
        with safe_open(folder / WEIGHTS_FILE, "pt") as file:
            tensors = {name.removeprefix(PREFIX): file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError as error:
        raise ValueError(
            f"{folder} is no adapter: it lacks {Path(error.filename or WEIGHTS_FILE).name}; give a folder "
            f"with {SETTINGS_FILE} and {WEIGHTS_FILE}"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, SafetensorError) as error:
        raise ValueError(f"the adapter {folder} is damaged: {error}") from error
    if wrong := [name for name in tensors if ".lora_A." not in name and ".lora_B." not in name]:
        raise ValueError(f"{folder} holds {wrong[0]}, which is no part of a plain LoRA")
    return tensors, alpha
