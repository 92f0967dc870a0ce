"""A mapping between two checkpoint layouts is a list of rows; a row is a pure rename or one of three exact
reshapes.

A leaf table lists what one kind of block holds (their module name, our module name, kind); a place says
where a block stands (their prefix, table, our prefix). `expand` multiplies them out. Everything can be
inverted.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

# What the parameters of a leaf are, and how their weight differs from ours:
#   affine    weight and bias, as they are
#   weight    a weight without a bias
#   squeeze   weight with one trailing axis of length 1 more than ours, and a bias (Conv1d k=1, Conv3d
#             k=(3,1,1))
#   squeeze2  weight with two such axes, and a bias (1x1 convolution where ours is a Linear)
#   split     one weight without a bias whose rows are ours, stacked (fused q, k, v)
#   tensor    the name is a parameter itself, not a module; several of ours are its rows, stacked
#   transpose the name is a parameter itself: a matrix whose rows are our columns
Kind = Literal["affine", "weight", "squeeze", "squeeze2", "split", "tensor", "transpose"]
Table = tuple[tuple[str, str | tuple[str, ...], Kind], ...]
Place = tuple[str, Table, str]


@dataclass(frozen=True)
class Row:
    """One tensor of theirs and the tensor, or the stacked tensors, of ours that hold the same numbers."""

    theirs: str
    ours: tuple[str, ...]
    squeeze: int = 0  # trailing axes of length 1 that theirs has and ours lacks
    transpose: bool = False  # theirs is a matrix whose rows are our columns

    def to_ours(self, tensor: Tensor) -> dict[str, Tensor]:
        if self.transpose:
            tensor = self._transposed(tensor, self.theirs)
        for _ in range(self.squeeze):
            if tensor.shape[-1] != 1:
                raise ValueError(
                    f"{self.theirs} has shape {tuple(tensor.shape)}; its last axis should be of length 1"
                )
            tensor = tensor.squeeze(-1)
        if tensor.ndim and tensor.shape[0] % len(self.ours):
            raise ValueError(
                f"{self.theirs} has shape {tuple(tensor.shape)}; its rows should divide into {len(self.ours)}"
            )
        parts = [tensor] if len(self.ours) == 1 else tensor.chunk(len(self.ours))
        return dict(zip(self.ours, parts, strict=True))

    def to_theirs(self, tensors: Mapping[str, Tensor]) -> Tensor:
        parts = [tensors[name] for name in self.ours]
        tensor = parts[0] if len(parts) == 1 else torch.cat(parts)
        tensor = tensor.reshape((*tensor.shape, *[1] * self.squeeze))
        return self._transposed(tensor, self.ours[0]) if self.transpose else tensor

    @staticmethod
    def _transposed(tensor: Tensor, name: str) -> Tensor:
        if tensor.ndim != 2:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; it should be a matrix")
        return tensor.t().contiguous()


def expand(places: Iterable[Place]) -> list[Row]:
    """Tables x places -> rows. An empty prefix stands for the root."""
    rows = []
    for their_prefix, table, our_prefix in places:
        for theirs, ours, kind in table:
            theirs = _join(their_prefix, theirs)
            names = tuple(_join(our_prefix, name) for name in ((ours,) if isinstance(ours, str) else ours))
            if kind in ("tensor", "transpose"):
                rows.append(Row(theirs, names, transpose=kind == "transpose"))
                continue
            squeeze = {"squeeze": 1, "squeeze2": 2}.get(kind, 0)
            rows.append(Row(f"{theirs}.weight", tuple(f"{name}.weight" for name in names), squeeze))
            if kind in ("affine", "squeeze", "squeeze2"):
                rows.append(Row(f"{theirs}.bias", tuple(f"{name}.bias" for name in names)))
    return rows


def audit(rows: list[Row], theirs: Iterable[str]) -> tuple[list[str], list[str]]:
    """Names that the rows expect and `theirs` lacks, and names in `theirs` that no row maps."""
    expected, have = {row.theirs for row in rows}, set(theirs)
    return sorted(expected - have), sorted(have - expected)


def to_ours(rows: list[Row], theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Their state dict -> ours. ValueError lists missing and unexpected names."""
    missing, unexpected = audit(rows, theirs)
    if missing or unexpected:
        raise ValueError(
            f"{len(missing)} tensors are missing ({_some(missing)}) and {len(unexpected)} are unexpected "
            f"({_some(unexpected)})"
        )
    return {name: tensor for row in rows for name, tensor in row.to_ours(theirs[row.theirs]).items()}


def to_theirs(rows: list[Row], ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our state dict -> theirs, the exact inverse of `to_ours`."""
    return {row.theirs: row.to_theirs(ours) for row in rows}


def _join(prefix: str, name: str) -> str:
    return ".".join(part for part in (prefix, name) if part)


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "") if names else "none"
