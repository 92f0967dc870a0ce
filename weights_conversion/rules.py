"""A mapping between two checkpoint layouts is a list of rows; a row is a rename or an exact reshape.

A table lists the leaves of one kind of block (their module name, our module name, kind); a place says where
such a block is (their prefix, table, our prefix). `expand` combines them to rows. All mappings are
invertible.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from i2vgen.settings.wording import counted

# The parameters of a leaf, and how their weight differs from ours:
#   affine    weight and bias, unchanged
#   weight    a weight without bias
# squeeze   weight with one more trailing axis of length 1 than ours, and bias (Conv1d k=1, Conv3d k=(3,1,1))
#   squeeze2  weight with two such axes, and bias (1x1 convolution where ours is a Linear)
#   split     one weight without bias, which is several of ours stacked along the rows (fused q, k, v)
#   tensor    the name is a parameter, not a module; it may be several of ours stacked along the rows
#   transpose the name is a parameter: our matrix transposed
Kind = Literal["affine", "weight", "squeeze", "squeeze2", "split", "tensor", "transpose"]
Table = tuple[tuple[str, str | tuple[str, ...], Kind], ...]
Place = tuple[str, Table, str]


@dataclass(frozen=True)
class Row:
    """One tensor of theirs, and the tensor or stacked tensors of ours with the same numbers."""

    theirs: str
    ours: tuple[str, ...]
    squeeze: int = 0  # number of trailing axes of length 1 that only theirs has
    transpose: bool = False  # theirs is our matrix transposed

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
    """Places with their tables -> rows. An empty prefix means the root."""
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
    """-> names that the rows expect but `theirs` lacks, and names in `theirs` that no row maps."""
    expected, have = {row.theirs for row in rows}, set(theirs)
    return sorted(expected - have), sorted(have - expected)


def to_ours(rows: list[Row], theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Their state dict -> ours. ValueError lists missing and unexpected names."""
    missing, unexpected = audit(rows, theirs)
    if missing or unexpected:
        raise ValueError(
            f"{counted(len(missing), 'tensor')} missing ({_some(missing)}) and {len(unexpected)} unexpected "
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
