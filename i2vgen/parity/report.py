"""Golden files, and the rows of the parity table."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor


@dataclass(frozen=True)
class Settings:
    """How to run our side: `dtype` and `device` of all floating-point arithmetic."""

    dtype: torch.dtype = torch.float32
    device: str = "cpu"

    @property
    def half(self) -> bool:
        return self.dtype in (torch.float16, torch.bfloat16)

    def cast(self, tensor: Tensor) -> Tensor:
        """Move to the device under test; float tensors also to the dtype under test."""
        tensor = tensor.to(self.device)
        return tensor.to(self.dtype) if tensor.is_floating_point() else tensor


@dataclass(frozen=True)
class Row:
    """One comparison. `bound` describes the criterion of `passed`, e.g. "relative L2 <= 1e-05"."""

    name: str
    relative_l2: float
    max_abs: float
    bound: str
    passed: bool


def compare(
    name: str,
    got: Tensor,
    expected: Tensor,
    *,
    relative_l2: float | None = None,
    max_abs: float | None = None,
    exact: bool = False,
) -> Row:
    """Compare two tensors (any float or integer dtype, any device) in float64.

    All given bounds must hold; `exact` requires equal values. NaN or a wrong shape fails. Equal infinities in
    the same place count as equal (the official tables hold two).
    """
    assert exact or relative_l2 is not None or max_abs is not None, "a comparison needs a bound"
    bounds = ["equal"] if exact else []
    bounds += [] if relative_l2 is None else [f"relative L2 <= {relative_l2:g}"]
    bounds += [] if max_abs is None else [f"max abs <= {max_abs:g}"]
    bound = ", ".join(bounds)
    if tuple(got.shape) != tuple(expected.shape):
        shapes = f"shape {tuple(got.shape)} is not {tuple(expected.shape)}"
        return Row(name, float("inf"), float("inf"), f"{bound} ({shapes})", False)
    a, b = got.detach().double().cpu(), expected.detach().double().cpu()
    same_infinity = a.isinf() & (a == b)
    a, b = a.masked_fill(same_infinity, 0.0), b.masked_fill(same_infinity, 0.0)
    difference = a - b
    worst = difference.abs().max().item() if difference.numel() else 0.0
    norm, error = b.norm().item(), difference.norm().item()
    relative = error / norm if norm > 0 else error
    passed = bool(torch.isfinite(difference).all())  # NaN compares false with everything
    passed &= not exact or worst == 0.0
    passed &= relative_l2 is None or relative <= relative_l2
    passed &= max_abs is None or worst <= max_abs
    return Row(name, relative, worst, bound, passed)


def check(name: str, passed: bool, what: str) -> Row:
    """A row for a yes/no fact, such as a hash or a count."""
    return Row(name, 0.0 if passed else float("inf"), 0.0 if passed else float("inf"), what, bool(passed))


class Golden(Mapping):
    """A golden file: `golden["tensor name"]` reads one tensor, `golden.meta` is the parsed metadata.

    Metadata values are parsed as JSON where possible. The pipeline goldens keep everything in the entry
    `config`; the UNet goldens use one entry per fact.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not self.path.is_file():
            raise ValueError(f"golden file {self.path} does not exist; give the path of a .safetensors file")
        try:
            with safe_open(self.path, "pt") as file:
                raw = file.metadata() or {}
                self.names = list(file.keys())
        except SafetensorError as error:
            raise ValueError(f"{self.path} is not a readable safetensors file: {error}") from error
        self.meta = {key: _parsed(value) for key, value in raw.items()}
        if "kind" not in self.meta:
            raise ValueError(f"{self.path} has no metadata entry `kind`; give a golden file")

    @property
    def kind(self) -> str:
        return self.meta["kind"]

    @cached_property
    def config(self) -> dict:
        return self.meta["config"]

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.names:
            raise KeyError(name)
        return self._file.get_tensor(name)

    @cached_property
    def _file(self):
        return safe_open(self.path, "pt")  # kept open: to read the header takes a millisecond

    def __iter__(self):
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def _parsed(value: str):
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        return value


def synthetic_picture(width: int, height: int, k: int, channels: int = 3) -> np.ndarray:
    """The picture of the preprocessing goldens, by its formula -> uint8 [h w c]."""
    y, x, c = np.meshgrid(np.arange(height), np.arange(width), np.arange(channels), indexing="ij")
    value = x * (7 + k) + y * (13 + 2 * k) + 29 * c + (x * y) % 251 + 17 * ((x // 3 + y // 5 + c) % 7)
    return (value % 256).astype(np.uint8)
