"""Read what torch.save wrote: find the state dict in it, and where in the file each tensor lies.

    open_zip      today's format: a zip archive of raw storages and one pickle that says how they are used
    open_legacy   the format from before 2020

Both end in `_unwrap`, which looks for the state dict under the keys that training programs use (WRAPPERS).
"""

from __future__ import annotations

import contextlib
import math
import mmap
import pickletools
import struct
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from weights_conversion.mapped import (
    DAMAGED,
    LEFT_OUT,
    MAX_AXES,
    SAVE_ANEW,
    WRAPPER,
    Lazy,
    Place,
    Sum,
    TensorFile,
    are_counts,
    fits,
    shown,
)
from weights_conversion.read_pickle import MAX_PICKLE, UNPICKLING_ERRORS, Inert, Ref, first_global, unpickle

# Keys under which a training program puts the state dict, beside its step counter and the like.
WRAPPERS = ("state_dict", "model_state_dict", "model", "module")
MAX_WRAPPERS = 3  # inside each other

ZIP_ERRORS = (
    zipfile.BadZipFile,
    NotImplementedError,
    EOFError,
    OverflowError,
    struct.error,
    UnicodeDecodeError,
)
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # the first pickle of a torch file from before the zip format


# --- the zip format


def open_zip(path: Path, buffer: mmap.mmap, inert: tuple[str, ...]) -> TensorFile:
    """The tensors of a torch file as views into `buffer`, with the checksums that the archive keeps."""
    entries, root = _zip_entries(path)
    pickled = entries[f"{root}data.pkl"]
    start = _stored_at(path, buffer, pickled)
    if pickled.file_size > MAX_PICKLE:
        raise ValueError(
            f"{path} describes its tensors in {pickled.file_size} bytes; at most {MAX_PICKLE} are read"
        )
    data = buffer[start : start + pickled.file_size]
    if pickled.CRC and zlib.crc32(data) != pickled.CRC:
        raise ValueError(f"{path}: the checksum of its entry {pickled.filename} does not match; {DAMAGED}")
    content = unpickle(path, data, inert)
    held, extra = _unwrap(path, content)
    places, sums = {}, {}
    for name, ref in held.items():
        entry = entries.get(f"{root}data/{ref.storage.key}")
        if entry is None:
            raise ValueError(f"{path} lacks the numbers of {shown(name)}; {DAMAGED}")
        offset = _stored_at(path, buffer, entry)
        places[name] = _place(f"{path}: {shown(name)}", ref, offset, entry.file_size, len(buffer))
        sums[offset] = Sum(entry.filename, entry.file_size, entry.CRC)
    return TensorFile(path, "torch", Lazy(buffer, places), extra, {}, (), buffer, sums)


def _zip_entries(path: Path) -> tuple[dict[str, zipfile.ZipInfo], str]:
    """The archive's entries by name, and the folder in it that has data.pkl."""
    try:
        with zipfile.ZipFile(path) as archive:
            infos = archive.infolist()
    except (*ZIP_ERRORS, ValueError, OSError) as error:
        raise ValueError(f"{path} is a zip archive without its end ({shown(error)}); {DAMAGED}") from error
    entries = {info.filename: info for info in infos}
    if len(entries) < len(infos):
        raise ValueError(f"{path} has two entries of the same name; {DAMAGED}")
    pickles = [
        name
        for name in entries
        if name == "data.pkl" or (name.endswith("/data.pkl") and name.count("/") == 1)
    ]
    if any(name.endswith("constants.pkl") for name in entries):
        raise ValueError(f"{path} is a TorchScript program, not plain weights; {SAVE_ANEW}")
    if len(pickles) != 1:
        kind = "numpy archive (.npz)" if any(n.endswith(".npy") for n in entries) else "zip archive"
        raise ValueError(
            f"{path} is a {kind} but no torch file: it has {len(pickles)} data.pkl, not one; unpack it"
        )
    root = pickles[0].removesuffix("data.pkl")
    order = entries.get(f"{root}byteorder")
    if order is not None and order.file_size == 3:  # "big", not "little"
        raise ValueError(f"{path} was saved on a big-endian machine; {SAVE_ANEW}")
    return entries, root


def _stored_at(path: Path, buffer: mmap.mmap, entry: zipfile.ZipInfo) -> int:
    """The first byte of an entry's data in the file."""
    where = f"{path}: its entry {shown(entry.filename)}"
    if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
        raise ValueError(f"{where} is compressed, which torch never does; pack it again without compression")
    if entry.flag_bits & 1:
        raise ValueError(f"{where} is encrypted; {SAVE_ANEW}")
    head = entry.header_offset
    if not 0 <= head <= len(buffer) - 30 or buffer[head : head + 4] != b"PK\x03\x04":
        raise ValueError(f"{where} is not where the archive says; {DAMAGED}")
    name, more = struct.unpack("<HH", buffer[head + 26 : head + 30])
    start = head + 30 + name + more
    if start + entry.file_size > len(buffer):
        raise ValueError(f"{where} reaches beyond the end of the file; {DAMAGED}")
    return start


def _place(where: str, ref: Ref, offset: int, nbytes: int, file_size: int) -> Place:
    """The tensor's place in the file, once all of it lies within its storage."""
    storage, dtype, start, shape, stride = ref
    counts = isinstance(shape, tuple) and isinstance(stride, tuple) and len(shape) == len(stride) <= MAX_AXES
    if not counts or not are_counts([start, storage.count, *shape, *stride]) or not fits(shape):
        raise ValueError(f"{where} has an impossible shape, stride or offset; {DAMAGED}")
    if storage.count * storage.dtype.itemsize != nbytes:
        raise ValueError(
            f"{where} has {nbytes} bytes where {storage.count} numbers of {storage.dtype} are told; {DAMAGED}"
        )
    last = start + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
    size = math.prod(shape)
    if size and (last + 1) * dtype.itemsize > nbytes:
        raise ValueError(f"{where} reaches beyond its numbers; {DAMAGED}")
    if size * dtype.itemsize > file_size:
        raise ValueError(f"{where} repeats its numbers to more than the whole file; save a plain copy of it")
    return Place(offset, nbytes - nbytes % dtype.itemsize, dtype, shape, stride, start)


# --- the format before the zip


def open_legacy(path: Path, buffer: mmap.mmap) -> TensorFile:
    """Old torch files have no places to map: they are read into memory, by torch's own careful reader."""
    if not _has_legacy_magic(buffer):
        name = first_global(buffer)
        runs = f": this file would run {name} when loaded; refused" if name else "; refused"
        raise ValueError(f"{path} is a plain pickle, not a torch file{runs}; {SAVE_ANEW}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (*UNPICKLING_ERRORS, ValueError, RuntimeError, AssertionError) as error:
        name = first_global(buffer)
        told = f"this file would run {name} when loaded" if name else f"it is damaged ({shown(error)})"
        raise ValueError(
            f"{path} is in torch's format from before 2020 and {told}; refused; {SAVE_ANEW}"
        ) from None
    held, extra = _unwrap(path, _plain(content))
    return TensorFile(path, "torch", Lazy(None, held), extra, {})


def _has_legacy_magic(buffer: mmap.mmap) -> bool:
    with contextlib.suppress(ValueError):
        return any(arg == LEGACY_MAGIC for _, arg, _ in pickletools.genops(buffer[:64]))
    return False


# --- what a torch file holds


def _plain(content: Any, depth: int = MAX_WRAPPERS) -> Any:
    """Real dicts in place of torch's OrderedDicts, whose methods a pickle can replace."""
    if not isinstance(content, dict):
        return content
    return {key: _plain(value, depth - 1) if depth else value for key, value in dict.items(content)}


def _unwrap(path: Path, content: Any) -> tuple[dict[str, Ref | Tensor], dict[str, Any]]:
    """The state dict in what the pickle gave, and the plain values beside it."""
    extra: dict[str, Any] = {}
    left_out: list[str] = []
    wrapper: list[str] = []
    while len(wrapper) < MAX_WRAPPERS and (key := _wrapper_key(path, content)) is not None:
        _set_aside({k: v for k, v in content.items() if k != key}, extra, left_out)
        wrapper.append(key)
        content = content[key]
    tensors = _named_tensors(path, content)
    _set_aside({k: v for k, v in content.items() if k not in tensors}, extra, left_out)
    if wrapper:
        extra[WRAPPER] = ".".join(wrapper)
    if left_out:
        extra[LEFT_OUT] = ", ".join(left_out)
    return tensors, extra


def _wrapper_key(path: Path, content: Any) -> str | None:
    if not isinstance(content, dict):
        return None
    keys = [key for key in WRAPPERS if _holds_tensors(content.get(key))]
    if len(keys) > 1:
        raise ValueError(
            f"{path} holds several sets of tensors ({', '.join(keys)}); save the wanted one by itself"
        )
    return keys[0] if keys else None


def _holds_tensors(value: Any) -> bool:
    """Whether it is a dict with a tensor at any depth. Each dict is seen once, even where they form rings."""
    seen: set[int] = set()
    waiting = [value]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict) and id(value) not in seen:
            seen.add(id(value))
            if any(_is_tensor(v) for v in dict.values(value)):
                return True
            waiting.extend(dict.values(value))
    return False


def _names(keys: Iterable[Any]) -> str:
    keys = list(keys)
    words = [shown(key) if isinstance(key, (str, int)) else type(key).__name__ for key in keys[:5]]
    return ", ".join(words) + (", ..." if len(keys) > 5 else "")


def _is_tensor(value: Any) -> bool:
    return isinstance(value, (Ref, Tensor))


def _set_aside(values: Mapping[Any, Any], extra: dict[str, Any], left_out: list[str]) -> None:
    for key, value in values.items():
        if isinstance(key, str) and (value is None or type(value) in (int, float, str, bool)):
            extra[key] = value
        else:
            left_out.append(_names([key]))


def _named_tensors(path: Path, content: Any) -> dict[str, Ref | Tensor]:
    if _is_tensor(content):
        raise ValueError(f"{path} holds one tensor without a name; save {{name: tensor}} instead")
    if isinstance(content, Inert):
        raise ValueError(f"{path} holds an object of {shown(content.word)}, not a state dict; {SAVE_ANEW}")
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not tensors by name; {SAVE_ANEW}")
    tensors = {name: value for name, value in content.items() if _is_tensor(value)}
    groups = [key for key, value in content.items() if _holds_tensors(value)]
    if groups:
        raise ValueError(
            f"{path} holds its tensors in groups ({_names(groups)}); save the wanted one by itself"
        )
    if not tensors:
        raise ValueError(f"{path} holds no tensors, only {_names(content) or 'an empty dict'}; {SAVE_ANEW}")
    if not all(isinstance(key, str) for key in tensors):
        raise ValueError(f"{path} has tensors whose names are no text ({_names(tensors)}); {SAVE_ANEW}")
    unfit = [
        key for key, value in tensors.items() if isinstance(value, Tensor) and value.layout != torch.strided
    ]
    if unfit:
        raise ValueError(f"{path}: {shown(unfit[0])} is not a dense tensor; save dense tensors")
    return tensors
