"""Read a safetensors file, after checking that its header accounts for every byte of the file.

The safetensors package would read it too; the checks here say in plain words what is wrong with which tensor.
"""

from __future__ import annotations

import json
import math
import mmap
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from i2vgen.files.safefile import DTYPES, METADATA
from weights_conversion.mapped import (
    DAMAGED,
    MAX_AXES,
    MAX_HEADER,
    Aligned,
    TensorFile,
    are_counts,
    fits,
    shown,
    without_repeats,
)


def open_safetensors(path: Path, buffer: mmap.mmap) -> TensorFile:
    """The tensors of a safetensors file, as views into `buffer`."""
    size = len(buffer)
    length = struct.unpack("<Q", buffer[:8])[0]
    if length > MAX_HEADER:
        raise ValueError(f"{path} claims a header of {length} bytes, more than {MAX_HEADER}; {DAMAGED}")
    if 8 + length > size:
        raise ValueError(f"{path} ends within its header ({size} of {8 + length} bytes); {DAMAGED}")
    header = _parse_header(path, buffer[8 : 8 + length])
    metadata = header.pop(METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError(f"{path} has metadata that is not text; {DAMAGED}")
    spans = {name: _span(path, name, told) for name, told in header.items()}
    _check_cover(path, spans, size - 8 - length)
    if not spans:
        raise ValueError(f"{path} is a safetensors file without any tensor")
    tensors = {name: _view(buffer, 8 + length, *span) for name, span in spans.items()}
    return TensorFile(path, "safetensors", Aligned(tensors), {}, metadata)


def _view(
    buffer: mmap.mmap, start: int, begin: int, end: int, dtype: torch.dtype, shape: tuple[int, ...]
) -> Tensor:
    if begin == end:
        return torch.empty(shape, dtype=dtype)
    count = (end - begin) // dtype.itemsize
    return torch.frombuffer(buffer, dtype=dtype, count=count, offset=start + begin).reshape(shape)


def _parse_header(path: Path, raw: bytes) -> dict[str, Any]:
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=without_repeats)
    except RecursionError as error:
        raise ValueError(f"{path} has a header that nests too deeply; {DAMAGED}") from error
    except ValueError as error:  # no JSON, no UTF-8, a name twice, a number of thousands of digits
        raise ValueError(f"{path} has a broken safetensors header ({shown(error)}); {DAMAGED}") from error
    if not isinstance(header, dict):
        raise ValueError(f"{path} has a safetensors header that is no JSON object; {DAMAGED}")
    return header


def _span(path: Path, name: str, told: Any) -> tuple[int, int, torch.dtype, tuple[int, ...]]:
    """First byte, last byte + 1 (within the data), dtype and shape, once they agree with each other."""
    where = f"{path}: the header's entry for {shown(name)}"
    if not isinstance(told, dict) or set(told) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{where} should have dtype, shape and data_offsets, nothing else; {DAMAGED}")
    dtype, shape, offsets = told["dtype"], told["shape"], told["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"{where} has the dtype {shown(dtype)}; known are {', '.join(DTYPES)}")
    if not are_counts(shape) or len(shape) > MAX_AXES or not fits(shape):
        raise ValueError(f"{where} has the shape {shown(shape)}; counts are expected; {DAMAGED}")
    if not are_counts(offsets) or len(offsets) != 2:
        raise ValueError(f"{where} has the offsets {shown(offsets)}; two counts are expected; {DAMAGED}")
    begin, end = offsets
    needed = math.prod(shape) * DTYPES[dtype].itemsize
    if end - begin != needed:
        raise ValueError(
            f"{where} says {shown(end - begin)} bytes, but {dtype} of shape {tuple(shape)} "
            f"takes {shown(needed)}; {DAMAGED}"
        )
    return begin, end, DTYPES[dtype], tuple(shape)


def _check_cover(path: Path, spans: Mapping[str, tuple], size: int) -> None:
    """The tensors must fill the data exactly, without holes or overlaps."""
    at = 0
    for name, (begin, end, *_) in sorted(spans.items(), key=lambda item: item[1][:2]):
        if begin < at:
            raise ValueError(f"{path}: {shown(name)} overlaps the tensor before it; {DAMAGED}")
        if begin > at:
            raise ValueError(
                f"{path}: {begin - at} bytes before {shown(name)} belong to no tensor; {DAMAGED}"
            )
        at = end
    if at > size:
        raise ValueError(f"{path} has {size} bytes of data and its header describes {at}; {DAMAGED}")
    if at < size:
        raise ValueError(f"{path} has {size - at} bytes after its last tensor; {DAMAGED}")
