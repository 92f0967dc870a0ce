"""What a case is given: the other side, and what the command line asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from i2vgen.settings import config

MODES = ("infer", "train", "savings")


@dataclass(frozen=True)
class Peer:
    """diffusers, handed in by the command: nothing in this room imports it."""

    network: type[nn.Module]  # diffusers.I2VGenXLUNet
    convert: Callable[[config.UNet, Mapping[str, Tensor]], Mapping[str, Tensor]]  # our state dict as theirs
    version: str


@dataclass(frozen=True)
class Options:
    mode: Literal["infer", "train", "savings"] = "infer"
    full: bool = False  # whole 50-step loops and compiled networks too: minutes more
    parts: tuple[str, ...] = ()  # of a gpu case; empty: all
    save: Callable[[dict], None] | None = None  # is given a gpu case's figures after every part
    dtype: str = "float32"  # of a cpu case
    dry: bool = False  # a gpu case on the CPU and small: shows that every part runs, its figures say nothing
