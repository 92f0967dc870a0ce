"""Read what torch.save wrote. torch.load does the reading; the checks here come before and after it.

    open_zip      the present format: a zip archive of raw storages, and one pickle that says how to use them
    open_legacy   the format from before 2020; torch.load cannot map it, so it is read into memory

Both end in `state_dicts.unwrap`.
"""

from __future__ import annotations

import io
import mmap
import struct
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Mapping
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import UntypedStorage

from weights_conversion.mapped import (
    DAMAGED,
    SAVE_ANEW,
    ZIP_ERRORS,
    Aligned,
    TensorFile,
    read_entry,
    shown,
)
from weights_conversion.pickle_names import UNPICKLING_ERRORS, find_refused
from weights_conversion.read_pickle import MAX_PICKLE, Outline, outline, stand_ins
from weights_conversion.state_dicts import unwrap

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
    tensors, extra = unwrap(path, content, len(buffer), ema)
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
    tensors, extra = unwrap(path, content, len(buffer), ema)
    return TensorFile(path, "torch", tensors, extra, {})


# --- both


def _inspect(path: Path, data: bytes, inert: tuple[str, ...], pickles: int = 1) -> list[Outline]:
    """What the pickles at the start of `data` describe. ValueError if torch.load should not see one."""
    if data[:1] == b"\x80" and data[1:2] > bytes([MAX_PROTOCOL]):
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
