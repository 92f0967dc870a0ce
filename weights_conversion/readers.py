"""Open weights files from elsewhere. Nothing in a file is ever executed or imported.

    open_file      one safetensors or torch file, recognised by its content
    open_sharded   several of them, bound together by an index with a `weight_map`

Tensors are views into the mapped file: opening a 6 GB file takes no memory. The exception is torch's format
from before 2020, which is read into memory.

    read_safetensors   checks a safetensors header
    read_torch         reads a torch file with torch.load
    state_dicts        finds the state dict in what that gives
    read_pickle        inspects its pickle first, pickle_names the names in it
    mapped             what all of them share
"""

from __future__ import annotations

import io
import json
import mmap
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from weights_conversion.mapped import (
    AVERAGED,
    CHUNK,
    DAMAGED,
    LEFT_OUT,
    MAX_HEADER,
    NAMELESS,
    WRAPPER,
    Format,
    OnBytes,
    TensorFile,
    map_file,
    opened,
    shown,
    without_repeats,
)
from weights_conversion.pickle_names import find_refused, is_pickle
from weights_conversion.read_pickle import MAX_PICKLE
from weights_conversion.read_safetensors import open_safetensors
from weights_conversion.read_torch import open_legacy, open_zip
from weights_conversion.state_dicts import EMA

__all__ = [
    "AVERAGED",
    "EMA",
    "LEFT_OUT",
    "NAMELESS",
    "WRAPPER",
    "Format",
    "OnBytes",
    "TensorFile",
    "find_nonfinite",
    "open_file",
    "open_sharded",
    "shard_names",
]

# First bytes -> what such a file is, and what to do about it.
SIGNATURES: tuple[tuple[bytes, str], ...] = (
    (
        b"version https://git-lfs",
        "is a Git LFS pointer, not the weights themselves; run `git lfs pull` in its repository",
    ),
    (b"\x1f\x8b", "is gzip-compressed; unpack it first (gunzip, or tar xzf)"),
    (b"BZh", "is bzip2-compressed; unpack it first"),
    (b"\xfd7zXZ\0", "is xz-compressed; unpack it first"),
    (b"\x28\xb5\x2f\xfd", "is zstd-compressed; unpack it first"),
    (b"7z\xbc\xaf\x27\x1c", "is a 7z archive; unpack it first"),
    (b"Rar!", "is a RAR archive; unpack it first"),
    (b"PK\x05\x06", "is an empty zip archive; download it again"),
    (b"\x89HDF\r\n\x1a\n", "is an HDF5 file (Keras, TensorFlow); only torch and safetensors files are read"),
    (b"\x93NUMPY", "is a single numpy array without a name; only torch and safetensors files are read"),
    (b"GGUF", "is a GGUF file; only torch and safetensors files are read"),
    (b"model_checkpoint_path:", "is a TensorFlow checkpoint's; only torch and safetensors files are read"),
)  # fmt: skip
TENSORFLOW_FOOTER = b"\x57\xfb\x80\x8b\x24\x75\x47\xdb"


def open_file(
    path: str | Path,
    *,
    check: bool = True,
    inert: tuple[str, ...] = (),
    ema: bool = False,
    on_bytes: OnBytes | None = None,
) -> TensorFile:
    """Open one weights file, whatever its name. ValueError, with the likely reason, if it is not one.

    `check` compares the tensors of a torch file with its checksums, which reads the file once (`on_bytes` is
    called with the number of bytes just read). Without it, call `verify` on the result for the names in use.
    `inert` adds packages whose classes a torch file may name; empty stand-ins take their place. `ema` takes
    the averaged weights where a torch file holds both kinds.
    """
    path = Path(path)
    buffer = map_file(path)
    if buffer[:4] == b"PK\x03\x04":
        file = open_zip(path, buffer, inert, ema)
    elif (told := _recognise(buffer)) is not None:
        raise ValueError(f"{path} {told}")
    elif buffer[8:9] == b"{":
        file = open_safetensors(path, buffer)
    elif buffer[:1] == b"\x80":
        file = open_legacy(path, buffer, inert, ema)
    else:
        raise ValueError(f"{path} {_describe_unknown(buffer)}")
    if check:
        file.verify(on_bytes=on_bytes)
    return file


def open_sharded(
    index: str | Path,
    *,
    check: bool = True,
    inert: tuple[str, ...] = (),
    ema: bool = False,
    on_bytes: OnBytes | None = None,
) -> TensorFile:
    """Open the files that an index with a `weight_map` (tensor -> file name beside the index) binds together.

    ValueError if a file is missing or broken, or if index and files disagree.
    """
    index = Path(index)
    weight_map, notes = _read_index(index)
    parts = []
    for name in sorted(set(weight_map.values())):
        if not (index.parent / name).is_file():
            raise ValueError(f"{index} needs {name}, which is not beside it; download the missing file")
        parts.append(open_file(index.parent / name, check=check, inert=inert, ema=ema, on_bytes=on_bytes))
    holder = _agree(index, weight_map, parts)
    if len({part.format for part in parts}) > 1:
        raise ValueError(f"{index} mixes safetensors and torch files; keep one kind")
    metadata = {key: value for part in parts for key, value in part.metadata.items()}
    extra = {key: value for part in parts for key, value in part.extra.items()}
    return TensorFile(index, parts[0].format, _Joined(holder), extra, metadata | notes, tuple(parts))


def shard_names(index: str | Path) -> set[str]:
    """The files that an index binds together, by name. ValueError if it is not an index."""
    return set(_read_index(Path(index))[0].values())


def find_nonfinite(
    tensors: Mapping[str, Tensor], on_tensor: Callable[[str], None] | None = None
) -> list[str]:
    """Names of the floating-point or complex tensors that hold NaN or infinity, read one at a time.

    `on_tensor` is called with each name once that tensor is done.
    """
    found = []
    for name in tensors:
        if not _all_finite(tensors[name]):
            found.append(name)
        if on_tensor is not None:
            on_tensor(name)
    return found


# --- what a file is


def _recognise(buffer: mmap.mmap) -> str | None:
    """What the file is instead of weights, if its first or last bytes show it."""
    for signature, told in SIGNATURES:
        if buffer[: len(signature)] == signature:
            return told
    if buffer[257:262] == b"ustar":
        return "is a tar archive; unpack it first"
    if buffer[-8:] == TENSORFLOW_FOOTER:
        return "is the index of a TensorFlow checkpoint; only torch and safetensors files are read"
    start = buffer[:512].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if start.startswith((b"<!doctype", b"<html", b"<?xml", b"<head", b"<!--")):
        return (
            "is a web page, not weights: the download gave an error or a login page; download the file itself"
        )
    return None


def _describe_unknown(buffer: mmap.mmap) -> str:
    start = buffer[:4096]
    pickled = buffer[:MAX_PICKLE]
    if is_pickle(pickled) and (name := find_refused(io.BytesIO(pickled), ())) is not None:
        return f"is a plain pickle: this file would run {shown(name)} when loaded; refused"
    if _is_text(start):
        if start.lstrip()[:1] in (b"{", b"["):
            index = buffer.find(b'"weight_map"') >= 0
            return "is an index of shards; open it as such" if index else "is JSON text, not weights"
        return f"is text, not weights; it begins with {shown(start[:60].decode(errors='replace'))}"
    if len(buffer) < 16:
        return f"is too short ({len(buffer)} bytes); {DAMAGED}"
    return f"is not a torch or safetensors file; it begins with the bytes {start[:8].hex(' ')}"


def _is_text(start: bytes) -> bool:
    text = start.decode("utf-8", errors="ignore")
    return len(text) > 0.9 * len(start) and all(c.isprintable() or c in "\t\r\n" for c in text)


# --- shards


class _Joined(Mapping):
    """The tensors of several files as one mapping."""

    def __init__(self, files: Mapping[str, TensorFile]):
        self._files = dict(files)  # tensor name -> the file that holds it

    def __getitem__(self, name: str) -> Tensor:
        return self._files[name].tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def __contains__(self, name: object) -> bool:
        return name in self._files


def _read_index(index: Path) -> tuple[dict[str, str], dict[str, str]]:
    with opened(index) as file:
        raw = file.read(MAX_HEADER + 1)
    if len(raw) > MAX_HEADER:
        raise ValueError(
            f"{index} is larger than an index can be ({MAX_HEADER} bytes); is it the weights file?"
        )
    try:
        content = json.loads(raw.decode("utf-8"), object_pairs_hook=without_repeats)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{index} is not an index of shards ({shown(error)}); download it again") from error
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(
            f"{index} is not an index of shards: it should have a `weight_map` from tensors to files"
        )
    for name in weight_map.values():
        if not isinstance(name, str) or not name.isprintable() or Path(name).name != name or "\\" in name:
            raise ValueError(f"{index} names {shown(name)}; a plain file name beside the index is expected")
    notes = content.get("metadata")
    return weight_map, {k: str(v) for k, v in notes.items()} if isinstance(notes, dict) else {}


def _agree(index: Path, weight_map: Mapping[str, str], parts: list[TensorFile]) -> dict[str, TensorFile]:
    """tensor name -> its file, if every file holds exactly what the index says."""
    holder: dict[str, TensorFile] = {}
    for part in parts:
        for name in part.tensors:
            if name in holder:
                raise ValueError(
                    f"{shown(name)} is in {holder[name].path.name} and in {part.path.name}; keep one"
                )
            if name not in weight_map:
                raise ValueError(
                    f"{part.path} holds {shown(name)}, which {index.name} does not list; {DAMAGED}"
                )
            holder[name] = part
    for name, file in weight_map.items():
        if name not in holder or holder[name].path.name != file:
            where = f"it is in {holder[name].path.name}" if name in holder else "no file has it"
            raise ValueError(f"{index} promises {shown(name)} in {file}, but {where}; {DAMAGED}")
    return holder


# --- numbers


def _all_finite(tensor: Tensor) -> bool:
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return True
    order = sorted(range(tensor.ndim), key=tensor.stride, reverse=True)
    flat = tensor.detach().permute(order).reshape(-1)  # a transposed tensor is not copied for this
    return all(_finite_piece(piece) for piece in flat.split(CHUNK))


def _finite_piece(piece: Tensor) -> bool:
    if piece.dtype.itemsize == 1:
        piece = piece.float()  # torch compares no float8
    low, high = piece.aminmax()  # NaN wins in both
    return bool(low.isfinite() and high.isfinite())
