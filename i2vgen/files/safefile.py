"""Write a safetensors file tensor by tensor: peak memory is about one tensor, however large the file.

    8 bytes       length of the header, little endian
    header        JSON: name -> dtype, shape, [first byte, last byte + 1]; padded with spaces to 8 bytes
    data          the tensors without gaps: widest dtype first, then by name, as safetensors' own writer does

The order depends on the names alone, so the same weights and metadata always give the same bytes.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from i2vgen.files import whole

# safetensors' name of every dtype it can hold.
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
METADATA = "__metadata__"
ALIGNMENT = 8
CHUNK = 1 << 22  # elements cast and written at once


@dataclass(frozen=True)
class Entry:
    """A tensor to be written: what it will be, and how to get it when its turn comes.

    `read` is called once and may return another dtype of the same kind (float, integer), which is then cast.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_safetensors(
    path: str | Path,
    entries: Sequence[Entry],
    *,
    metadata: Mapping[str, str] | None = None,
    on_bytes: Callable[[int], None] | None = None,
) -> None:
    """Write the entries to `path`, whole or not at all; a file that stood there is replaced at the very end.

    `on_bytes` is called with the number of bytes of each piece just written. ValueError if a name comes
    twice, a dtype has no safetensors name, or what an entry reads is not what it announced.
    """
    entries = in_order(entries)
    head = _header(entries, metadata)
    with whole.replacing(path, sync=True) as temporary, temporary.open("wb") as file:
        _put(file, head, on_bytes)
        for item in entries:
            for piece in _pieces(item):
                _put(file, piece, on_bytes)


def in_order(entries: Iterable[Entry]) -> list[Entry]:
    """The order in which entries are read and written"""
    return sorted(entries, key=lambda e: (-e.dtype.itemsize, e.name))


def _header(entries: Sequence[Entry], metadata: Mapping[str, str] | None) -> bytes:
    header: dict[str, dict] = {}
    if metadata:
        wrong = [
            key for key, value in metadata.items() if not (isinstance(key, str) and isinstance(value, str))
        ]
        if wrong:
            raise ValueError(
                f"safetensors metadata holds text only; {wrong[0]!r} or its value is something else"
            )
        header[METADATA] = dict(metadata)
    offset = 0
    for item in entries:
        if item.name == METADATA:
            raise ValueError(f"no tensor can be called {METADATA}; safetensors keeps its notes there")
        if item.name in header:
            raise ValueError(f"two tensors are called {item.name}; names must be unique")
        if item.dtype not in NAMES:
            raise ValueError(f"{item.name} is {item.dtype}, which safetensors cannot hold; cast it first")
        end = offset + item.nbytes
        header[item.name] = {
            "dtype": NAMES[item.dtype],
            "shape": list(item.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    return struct.pack("<Q", len(text)) + text


def _pieces(item: Entry) -> Iterator[memoryview]:
    """The bytes of one tensor; casting needs memory for one piece at a time, a mapped tensor for none."""
    tensor = item.read().detach()
    if tuple(tensor.shape) != item.shape:
        raise ValueError(f"{item.name} has shape {tuple(tensor.shape)}; {item.shape} was announced")
    if tensor.is_meta or tensor.layout != torch.strided:
        kind = "has no numbers (it is on `meta`)" if tensor.is_meta else f"is {tensor.layout}, not dense"
        raise ValueError(f"{item.name} {kind} and cannot be written")
    if _kind(tensor.dtype) != _kind(item.dtype):
        raise ValueError(
            f"{item.name} is {tensor.dtype}; writing it as {item.dtype} would lose what it means"
        )
    for piece in tensor.reshape(-1).split(CHUNK):
        if piece.numel():
            piece = piece.to("cpu", item.dtype).resolve_conj().resolve_neg().contiguous()
            yield memoryview(piece.view(torch.uint8).numpy())


def _kind(dtype: torch.dtype) -> str:
    if dtype.is_floating_point or dtype.is_complex:
        return "complex" if dtype.is_complex else "float"
    return "bool" if dtype == torch.bool else "integer"


def _put(file: BinaryIO, data: bytes | memoryview, on_bytes: Callable[[int], None] | None) -> None:
    file.write(data)
    if on_bytes is not None:
        on_bytes(len(data))
