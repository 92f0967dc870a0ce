"""Read what torch.save wrote. torch.load does the reading; the checks here come before and after it.

    open_zip      the present format: a zip archive of raw storages, and one pickle that says how to use them
    open_legacy   the format from before 2020; torch.load cannot map it, so it is read into memory

Both end in `_unwrap`, which looks for the state dict under the keys that training programs use (WRAPPERS).
"""

from __future__ import annotations

import io
import mmap
import re
import struct
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Iterable, Mapping
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, UntypedStorage

from weights_conversion.mapped import (
    AVERAGED,
    DAMAGED,
    LEFT_OUT,
    MAX_AXES,
    SAVE_ANEW,
    WRAPPER,
    ZIP_ERRORS,
    Aligned,
    TensorFile,
    fits,
    read_entry,
    shown,
)
from weights_conversion.read_pickle import (
    MAX_PICKLE,
    UNPICKLING_ERRORS,
    Inert,
    Outline,
    find_refused,
    outline,
    stand_ins,
)

# Keys under which a training program puts the state dict, beside its step counter and the like.
WRAPPERS = ("state_dict", "model_state_dict", "model", "module", "params")
EMA = re.compile(r"(?:.*_)?ema(?:_.*)?")  # the same for weights averaged over the training
MAX_WRAPPERS = 3  # inside each other
MAX_PROTOCOL = 3
# The format from before the zip begins with pickles of this number, version, system, content, storages' keys.
LEGACY_MAGIC = (0x1950A86A20F9469CFC6C).to_bytes(10, "little")
LEGACY_PICKLES = 5


# --- the zip format


def open_zip(path: Path, buffer: mmap.mmap, inert: tuple[str, ...], ema: bool = False) -> TensorFile:
    """The tensors of a torch file as views into the mapped file, and the archive's entries that hold them."""
    entries, root, pickled = _read_archive(path, buffer)
    (found,) = _inspect(path, pickled, inert)
    storages: list[UntypedStorage] = []

    def keep(storage: UntypedStorage, _: str) -> UntypedStorage:
        storages.append(storage)  # each once, in the order in which the pickle names them
        return storage

    content = _load(path, found, keep, mapped=True)
    holders: dict[int, zipfile.ZipInfo] = {}  # by the address of their numbers
    keys = [key for key, count in found.storages.items() if count]
    for key, storage in zip_longest(keys, (s for s in storages if s.nbytes())):
        entry = entries.get(f"{root}data/{key}")
        size = entry.file_size if entry else 0
        if storage is None or storage.nbytes() != size:
            raise ValueError(
                f"{path}: its entry data/{shown(key)} has {size} bytes where {found.storages.get(key, 0)} "
                f"numbers are described; {DAMAGED}"
            )
        holders[storage.data_ptr()] = entry
    tensors, extra = _unwrap(path, content, len(buffer), ema)
    held = {name: holders.get(t.untyped_storage().data_ptr()) for name, t in tensors.items() if t.numel()}
    if None in held.values():
        raise ValueError(f"{path} has a tensor whose numbers are not in the file; {DAMAGED}")
    return TensorFile(path, "torch", Aligned(tensors), extra, {}, (), held)


def _read_archive(path: Path, buffer: mmap.mmap) -> tuple[dict[str, zipfile.ZipInfo], str, bytes]:
    """The archive's entries by name, the folder in it that has data.pkl, and the bytes of data.pkl."""
    try:
        archive = zipfile.ZipFile(path)
    except ZIP_ERRORS as error:
        raise ValueError(f"{path} is a zip archive without its end ({shown(error)}); {DAMAGED}") from error
    with archive:
        if _directory_start(buffer) != archive.start_dir:
            raise ValueError(f"{path} is a zip archive whose directory is not where it says; {DAMAGED}")
        infos = archive.infolist()
        entries = {info.filename: info for info in infos}
        # torch compares names without regard to case.
        if len({name.lower() for name in entries}) < len(infos):
            raise ValueError(f"{path} has two entries of the same name; {DAMAGED}")
        root = _root(path, entries)
        for info in infos:
            _check_entry(path, info, is_data=info.filename.startswith(f"{root}data/"))
        _check_places(path, buffer, infos, archive.start_dir)
        return entries, root, b"".join(read_entry(path, archive, entries[f"{root}data.pkl"]))


def _directory_start(buffer: mmap.mmap) -> int:
    """Where the archive says that its directory begins. torch believes it and zipfile does not."""
    if buffer[-22:-18] != b"PK\x05\x06":
        return -1
    if buffer[-42:-38] != b"PK\x06\x07":
        return struct.unpack("<I", buffer[-6:-2])[0]
    (start,) = struct.unpack("<Q", buffer[-34:-26])  # of the zip64 record
    if start != len(buffer) - 98 or buffer[start : start + 4] != b"PK\x06\x06":
        return -1
    return struct.unpack("<Q", buffer[start + 48 : start + 56])[0]


def _root(path: Path, entries: Mapping[str, zipfile.ZipInfo]) -> str:
    if any(name.endswith("constants.pkl") for name in entries):
        raise ValueError(f"{path} is a TorchScript program, not plain weights; {SAVE_ANEW}")
    pickles = [name for name in entries if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(pickles) != 1:
        kind = "numpy archive (.npz)" if any(n.endswith(".npy") for n in entries) else "zip archive"
        raise ValueError(
            f"{path} is a {kind} but no torch file: it has {len(pickles)} data.pkl, not one; unpack it"
        )
    root = pickles[0].removesuffix("data.pkl")
    order = entries.get(f"{root}byteorder")
    if order is not None and order.file_size == 3:  # "big", not "little"
        raise ValueError(f"{path} was saved on a big-endian machine; {SAVE_ANEW}")
    return root


def _check_entry(path: Path, entry: zipfile.ZipInfo, *, is_data: bool) -> None:
    where = f"{path}: its entry {shown(entry.filename)}"
    if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
        raise ValueError(f"{where} is compressed, which torch never does; pack it again without compression")
    if entry.orig_filename != entry.filename:
        raise ValueError(f"{where} has an impossible name; {DAMAGED}")
    if entry.file_size > MAX_PICKLE and not is_data:
        raise ValueError(f"{where} has {entry.file_size} bytes; at most {MAX_PICKLE} are read beside tensors")
    if not entry.CRC:
        entry.CRC = None  # torch can be told to leave the checksum out; zipfile then compares nothing


def _check_places(path: Path, buffer: mmap.mmap, entries: list[zipfile.ZipInfo], end: int) -> None:
    """Each entry ends before the next: a header that moves one onto another would hide its checksum."""
    entries = sorted(entries, key=lambda entry: entry.header_offset)
    for entry, limit in zip(entries, [*(e.header_offset for e in entries[1:]), end], strict=True):
        lengths = buffer[entry.header_offset + 26 : entry.header_offset + 30]  # of its name and its extras
        if (
            len(lengths) < 4
            or entry.header_offset + 30 + sum(struct.unpack("<HH", lengths)) + (entry.file_size) > limit
        ):
            raise ValueError(f"{path}: its entry {shown(entry.filename)} lies over another one; {DAMAGED}")


# --- the format before the zip


def open_legacy(path: Path, buffer: mmap.mmap, inert: tuple[str, ...], ema: bool = False) -> TensorFile:
    """The tensors of an old torch file, read into memory: it says nowhere where they lie."""
    start = buffer[:MAX_PICKLE]
    if LEGACY_MAGIC not in start[:64]:
        name = find_refused(io.BytesIO(start), inert)
        runs = f": this file would run {shown(name)} when loaded; refused" if name else "; refused"
        raise ValueError(f"{path} is a plain pickle, not a torch file{runs}; {SAVE_ANEW}")
    *_, found, keys = _inspect(path, start, inert, LEGACY_PICKLES)
    if set(found.storages) != keys.texts:
        raise ValueError(f"{path} lists other storages than its tensors use; {DAMAGED}")
    if sum(found.storages.values()) > len(buffer):
        raise ValueError(f"{path} describes more numbers than it has bytes; {DAMAGED}")
    content = _load(path, found, "cpu", mapped=False)
    tensors, extra = _unwrap(path, content, len(buffer), ema)
    return TensorFile(path, "torch", tensors, extra, {})


# --- both


def _inspect(path: Path, data: bytes, inert: tuple[str, ...], pickles: int = 1) -> list[Outline]:
    """What the pickles at the start of `data` describe. ValueError if torch.load should not see one."""
    if data[:1] == b"\x80" and data[1] > MAX_PROTOCOL:
        raise ValueError(
            f"{path} was saved with pickle protocol {data[1]}; torch.load(weights_only=True) reads up to "
            f"{MAX_PROTOCOL}, and torch.save writes 2 unless told otherwise; {SAVE_ANEW}"
        )
    stream = io.BytesIO(data)
    for _ in range(pickles):
        _refuse(path, find_refused(stream, inert))
    stream.seek(0)
    try:
        return [outline(stream, inert) for _ in range(pickles)]
    except UNPICKLING_ERRORS as error:
        raise _broken(path, error) from error


def _refuse(path: Path, name: str | None) -> None:
    if name is None:
        return
    if name.startswith(("torch._utils.", "torch._tensor.")):
        raise ValueError(
            f"{path} holds a tensor of a kind that is not read here ({shown(name)}); "
            "save dense tensors on the CPU"
        )
    what = "a pickled model" if name.startswith("torch.nn.") else "more than tensors"
    raise ValueError(
        f"{path} holds {what}: this file would run {shown(name)} when loaded; refused; {SAVE_ANEW}"
    )


def _load(
    path: Path, found: Outline, place: str | Callable[[UntypedStorage, str], UntypedStorage], *, mapped: bool
) -> Any:
    try:
        with (
            torch.serialization.safe_globals(stand_ins(found)),
            warnings.catch_warnings(),
            tempfile.TemporaryDirectory() as folder,
        ):
            warnings.simplefilter("ignore")
            source = path
            if path.suffix == ".safetensors":  # torch.load goes by this ending, we by the content
                source = Path(folder) / "file.pth"
                source.symlink_to(path.resolve())
            return torch.load(source, map_location=place, weights_only=True, mmap=mapped)
    except UNPICKLING_ERRORS as error:
        raise _broken(path, error) from error


def _broken(path: Path, error: BaseException) -> ValueError:
    told = str(error).rpartition("WeightsUnpickler error:")[2].strip().partition("\n")[0]
    told = told or type(error).__name__
    return ValueError(f"{path} has a broken description of its tensors ({shown(told)}); {DAMAGED}")


# --- what a torch file holds


def _plain(content: Any) -> Any:
    """Real dicts in place of OrderedDicts, whose methods a pickle can replace."""
    if not isinstance(content, dict):
        return content
    return {key: _plain(value) for key, value in dict.items(content)}


def _unwrap(path: Path, content: Any, file_size: int, ema: bool) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state dict in what torch.load gave, the averaged one if `ema`, and the plain values beside it."""
    content = _plain(content)
    extra: dict[str, Any] = {}
    left_out: list[str] = []
    wrapper: list[str] = []
    while len(wrapper) < MAX_WRAPPERS and (key := _wrapper_key(path, content, ema)) is not None:
        _set_aside({k: v for k, v in content.items() if k != key}, extra, left_out)
        wrapper.append(key)
        content = content[key]
    tensors = _named_tensors(path, content)
    _set_aside({k: v for k, v in content.items() if k not in tensors}, extra, left_out)
    if wrapper:
        extra[WRAPPER] = ".".join(wrapper)
    if left_out:
        extra[LEFT_OUT] = ", ".join(left_out)
    return {name: _dense(f"{path}: {shown(name)}", t, file_size) for name, t in tensors.items()}, extra


def _dense(where: str, tensor: Tensor, file_size: int) -> Tensor:
    """The tensor without its attributes, hooks and class, once it is one that can be read safely."""
    tensor = Tensor.detach(tensor)
    if tensor.is_conj() or tensor.is_neg():
        raise ValueError(
            f"{where} holds a tensor with pending conjugation or negation; resolve it before saving"
        )
    if tensor.ndim > MAX_AXES or not fits(tensor.shape):
        raise ValueError(f"{where} has an impossible shape; {DAMAGED}")
    if tensor.numel() * tensor.element_size() > file_size:
        raise ValueError(f"{where} repeats its numbers to more than the whole file; save a plain copy of it")
    return tensor


def _wrapper_key(path: Path, content: Any, ema: bool) -> str | None:
    if not isinstance(content, dict):
        return None
    keys, averaged = [key for key in WRAPPERS if _holds_tensors(content.get(key))], _averaged(content)
    if averaged and (ema or not (keys or any(isinstance(value, Tensor) for value in content.values()))):
        keys = averaged
    if len(keys) > 1:
        raise ValueError(
            f"{path} holds several sets of tensors ({', '.join(keys)}); save the wanted one by itself"
        )
    return keys[0] if keys else None


def _averaged(content: Mapping[Any, Any]) -> list[str]:
    """The keys of averaged weights."""
    return [
        k for k, v in content.items() if isinstance(k, str) and EMA.fullmatch(k.lower()) and _holds_tensors(v)
    ]


def _holds_tensors(value: Any) -> bool:
    """Whether it is a dict with a tensor at any depth."""
    if not isinstance(value, dict):
        return False
    return any(isinstance(v, Tensor) or _holds_tensors(v) for v in value.values())


def _names(keys: Iterable[Any]) -> str:
    keys = list(keys)
    words = [shown(key) if isinstance(key, (str, int)) else type(key).__name__ for key in keys[:5]]
    return ", ".join(words) + (", ..." if len(keys) > 5 else "")


def _set_aside(values: Mapping[Any, Any], extra: dict[str, Any], left_out: list[str]) -> None:
    if averaged := _averaged(values):
        extra[AVERAGED] = _names(averaged)
    for key, value in values.items():
        if isinstance(key, str) and (value is None or type(value) in (int, float, str, bool)):
            extra[key] = value
        else:
            left_out.append(_names([key]))


def _named_tensors(path: Path, content: Any) -> dict[str, Tensor]:
    if isinstance(content, Tensor):
        raise ValueError(f"{path} holds one tensor without a name; save {{name: tensor}} instead")
    if isinstance(content, Inert):
        raise ValueError(f"{path} holds an object of {shown(content.word)}, not a state dict; {SAVE_ANEW}")
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not tensors by name; {SAVE_ANEW}")
    tensors = {name: value for name, value in content.items() if isinstance(value, Tensor)}
    groups = [key for key, value in content.items() if _holds_tensors(value)]
    if groups and not (tensors and groups == _averaged(content)):
        raise ValueError(
            f"{path} holds its tensors in groups ({_names(groups)}); save the wanted one by itself"
        )
    if not tensors:
        raise ValueError(f"{path} holds no tensors, only {_names(content) or 'an empty dict'}; {SAVE_ANEW}")
    if not all(isinstance(key, str) for key in tensors):
        raise ValueError(f"{path} has tensors whose names are not text ({_names(tensors)}); {SAVE_ANEW}")
    return tensors
