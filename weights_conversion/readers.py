"""Open foreign weight files: the only place that does. Nothing in a file is ever executed or imported.

    open_file      one safetensors or torch file, recognised by its content
    open_sharded   several of them, bound together by an index with a `weight_map`

Tensors are views into the mapped file: reading a 6 GB file takes no memory of ours. A torch file is a zip
archive of raw storages and one pickle that says how the tensors lie in them. That pickle is a small program;
ours is the one interpreter that runs it, and it knows only the words that describe tensors (REBUILD,
OrderedDict), words that it takes for a lifeless stand-in (INERT), and refuses every other by name.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import math
import mmap
import pickle
import pickletools
import struct
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from i2vgen.safefile import DTYPES, METADATA

OnBytes = Callable[[int], None]
Format = Literal["safetensors", "torch"]

MAX_HEADER = 32 << 20  # bytes; real headers stay under one MiB
MAX_PICKLE = 64 << 20  # bytes; the official UNet's has 0.2 MiB
MAX_AXES = 64
CHUNK = 1 << 22  # bytes hashed, or elements examined, at once
DAMAGED = "it is damaged or was not fully downloaded; download it again"
SAVE_ANEW = "load it where you trust it and save its state dict as safetensors"

# Keys under which a training program puts the state dict, beside its step counter and the like.
WRAPPERS = ("state_dict", "model_state_dict", "model", "module")
MAX_WRAPPERS = 3  # inside each other
# `extra` remembers these two under names that no program uses.
WRAPPER, LEFT_OUT = "(wrapper)", "(left out)"

# What the pickle of a torch file needs to describe dense tensors.
REBUILD = {
    ("torch._utils", "_rebuild_tensor"),
    ("torch._utils", "_rebuild_tensor_v2"),
    ("torch._utils", "_rebuild_tensor_v3"),
    ("torch._utils", "_rebuild_parameter"),
    ("torch._utils", "_rebuild_parameter_with_state"),
    ("torch._tensor", "_rebuild_from_type_v2"),
}
STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
    "UntypedStorage": torch.uint8,
}
TORCH_DTYPES = {str(t).removeprefix("torch."): t for t in (*DTYPES.values(), torch.complex128)}

# Classes found in checkpoints beside the tensors. They are never imported: a stand-in swallows what they
# would have been given. Packages first (all of their names), then single names.
INERT_PACKAGES = (
    "pytorch_lightning",
    "lightning",
    "lightning_fabric",
    "lightning_utilities",
    "torchmetrics",
    "omegaconf",
    "easydict",
    "ldm",
    "open_clip",
    "transformers",
    "diffusers",
    "torch.optim",
)
INERT_NAMES = {
    "argparse": ("Namespace",),
    "types": ("SimpleNamespace",),
    "typing": ("Any", "Union", "Optional"),
    "collections": ("defaultdict", "Counter", "deque"),
    "builtins": ("set", "frozenset", "list", "tuple", "dict", "int", "float", "bool", "complex", "str",
                 "bytes", "bytearray", "slice", "object"),
    "pathlib": ("Path", "PosixPath", "WindowsPath", "PurePath", "PurePosixPath", "PureWindowsPath"),
    "datetime": ("datetime", "date", "time", "timedelta", "timezone"),
    "numpy": ("dtype", "ndarray"),
    "numpy.core.multiarray": ("scalar", "_reconstruct"),
    "numpy._core.multiarray": ("scalar", "_reconstruct"),
    "numpy.core.numeric": ("_frombuffer",),
    "numpy._core.numeric": ("_frombuffer",),
    "_codecs": ("encode",),  # numpy spells bytes so
    "torch": ("Size", "device", "Tensor"),
    "torch.nn.parameter": ("Parameter", "Buffer"),
}  # fmt: skip
INERT_NAMES["__builtin__"] = (*INERT_NAMES["builtins"], "unicode", "long")  # as Python 2 wrote them

# What a pickle that is not as it should be makes Python's interpreter raise.
UNPICKLING_ERRORS = (
    pickle.UnpicklingError, EOFError, TypeError, KeyError, IndexError, AttributeError, OverflowError,
    MemoryError, RecursionError, UnicodeDecodeError, ImportError, struct.error,
)  # fmt: skip
ZIP_ERRORS = (
    zipfile.BadZipFile,
    NotImplementedError,
    EOFError,
    OverflowError,
    struct.error,
    UnicodeDecodeError,
)

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
    (b"model_checkpoint_path:", "is of a TensorFlow checkpoint; only torch and safetensors files are read"),
)  # fmt: skip
TENSORFLOW_FOOTER = b"\x57\xfb\x80\x8b\x24\x75\x47\xdb"
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # the first pickle of a torch file from before the zip format


class _Place(NamedTuple):
    """Where a tensor lies in the mapped file: a run of bytes, and the dense tensor's layout within it."""

    offset: int  # bytes
    nbytes: int  # of the whole storage
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...] | None = None  # elements; None: contiguous
    start: int = 0  # elements


class _Sum(NamedTuple):
    """A run of bytes with the CRC-32 that the file keeps of it."""

    label: str
    nbytes: int
    crc: int


class _Lazy(Mapping):
    """name -> tensor: a new view into the mapped file at each access, or the tensor that is in memory."""

    def __init__(self, buffer: mmap.mmap | None, places: Mapping[str, _Place | Tensor]):
        self._buffer = buffer
        self._places = dict(places)

    def __getitem__(self, name: str) -> Tensor:
        place = self._places[name]
        return place if isinstance(place, Tensor) else _mapped(self._buffer, place)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, name: object) -> bool:
        return name in self._places

    def storage_of(self, name: str) -> int | None:
        """First byte of the storage in the file; None where the tensor is in memory."""
        place = self._places[name]
        return None if isinstance(place, Tensor) else place.offset


class _Joined(Mapping):
    """The tensors of several files under one roof."""

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


@dataclass(frozen=True)
class TensorFile:
    """A weights file: its tensors by name, and what stood beside them.

    `tensors[name]` costs no memory; its shape and dtype are known without reading any data. `extra` has the
    plain numbers and texts beside the tensors (`step`), and, where they apply, under WRAPPER the keys that
    led to the state dict and under LEFT_OUT the names of everything else that was not taken. `parts` are the
    files of a sharded checkpoint.
    """

    path: Path
    format: Format
    tensors: Mapping[str, Tensor]
    extra: Mapping[str, Any]
    metadata: Mapping[str, str]
    parts: tuple[TensorFile, ...] = ()
    _buffer: mmap.mmap | None = field(default=None, repr=False, compare=False)
    _sums: Mapping[int, _Sum] = field(default_factory=dict, repr=False, compare=False)

    def verify(self, names: Iterable[str] | None = None, *, on_bytes: OnBytes | None = None) -> None:
        """Compare the named tensors (all if None) with the checksums in the file, as far as it keeps any.

        `on_bytes` is called with the number of bytes just read. ValueError names the first damaged piece.
        """
        wanted = self.tensors if names is None else set(names) & set(self.tensors)
        for part in self.parts:
            part.verify(wanted, on_bytes=on_bytes)
        if self._sums:
            for offset in sorted({self.tensors.storage_of(name) for name in wanted}):
                self._verify_run(offset, self._sums[offset], on_bytes)

    def _verify_run(self, offset: int, run: _Sum, on_bytes: OnBytes | None) -> None:
        if run.crc == 0:  # torch can be told to leave the checksum out
            return
        found = 0
        with memoryview(self._buffer) as view:
            for start in range(offset, offset + run.nbytes, CHUNK):
                stop = min(start + CHUNK, offset + run.nbytes)
                with view[start:stop] as piece:
                    found = zlib.crc32(piece, found)
                if on_bytes is not None:
                    on_bytes(stop - start)
        if found != run.crc:
            raise ValueError(f"{self.path}: the checksum of its entry {run.label} does not match; {DAMAGED}")


# --- the two doors


def open_file(
    path: str | Path, *, check: bool = True, inert: tuple[str, ...] = (), on_bytes: OnBytes | None = None
) -> TensorFile:
    """Open one weights file, whatever it is called. ValueError, with the likely reason, if it is not one.

    `check` compares the checksums that a torch file keeps of its tensors, which reads the file once
    (`on_bytes` gets the number of bytes just read); without it call `verify` on the result, for the names
    that are used.
    `inert` adds packages whose classes may be replaced by lifeless stand-ins in a torch file.
    """
    path = Path(path)
    buffer = _map(path)
    if buffer[:4] == b"PK\x03\x04":
        file = _open_zip(path, buffer, inert)
    elif (told := _recognise(buffer)) is not None:
        raise ValueError(f"{path} {told}")
    elif buffer[8:9] == b"{":
        file = _open_safetensors(path, buffer)
    elif buffer[:1] == b"\x80":
        file = _open_legacy(path, buffer)
    else:
        raise ValueError(f"{path} {_describe_unknown(buffer)}")
    if check:
        file.verify(on_bytes=on_bytes)
    return file


def open_sharded(
    index: str | Path, *, check: bool = True, inert: tuple[str, ...] = (), on_bytes: OnBytes | None = None
) -> TensorFile:
    """Open the files that an index with a `weight_map` (tensor -> file name beside the index) binds together.

    ValueError if a file is missing or broken, or index and files do not agree to the letter.
    """
    index = Path(index)
    weight_map, notes = _read_index(index)
    parts = []
    for name in sorted(set(weight_map.values())):
        if not (index.parent / name).is_file():
            raise ValueError(f"{index} needs {name}, which is not beside it; download the missing file")
        parts.append(open_file(index.parent / name, check=check, inert=inert, on_bytes=on_bytes))
    holder = _agree(index, weight_map, parts)
    if len({part.format for part in parts}) > 1:
        raise ValueError(f"{index} mixes safetensors and torch files; keep one kind")
    metadata = {key: value for part in parts for key, value in part.metadata.items()}
    extra = {key: value for part in parts for key, value in part.extra.items()}
    return TensorFile(index, parts[0].format, _Joined(holder), extra, metadata | notes, tuple(parts))


def shard_names(index: str | Path) -> set[str]:
    """The files that an index binds together, by name. ValueError if it is no index."""
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


def sha256(path: str | Path, on_bytes: OnBytes | None = None) -> str:
    """SHA-256 of a file, 64 hexadecimal digits; `on_bytes` is called with the number of bytes just read."""
    digest = hashlib.sha256()
    piece = bytearray(CHUNK)
    with _opened(Path(path)) as file, memoryview(piece) as view:
        while count := file.readinto(piece):
            digest.update(view[:count])
            if on_bytes is not None:
                on_bytes(count)
    return digest.hexdigest()


# --- files


def _opened(path: Path) -> io.FileIO:
    if path.is_dir():
        raise ValueError(f"{path} is a folder; a weights file is wanted here")
    if not path.exists():
        raise ValueError(f"there is no file {path}; check the path")
    if not path.is_file():
        raise ValueError(f"{path} is no ordinary file (a pipe or a device); save it to disk first")
    try:
        return path.open("rb", buffering=0)
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}); check its permissions") from error


def _map(path: Path) -> mmap.mmap:
    with _opened(path) as file:
        if path.stat().st_size == 0:
            raise ValueError(f"{path} is empty; download it again")
        # Copy on write: a tensor that a caller changes never reaches the file.
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)


def _mapped(buffer: mmap.mmap, place: _Place) -> Tensor:
    if place.nbytes == 0 or 0 in place.shape:
        return torch.empty(place.shape, dtype=place.dtype)
    raw = torch.frombuffer(buffer, dtype=torch.uint8, count=place.nbytes, offset=place.offset)
    if raw.data_ptr() % place.dtype.itemsize:
        raw = raw.clone()  # torch expects numbers at multiples of their size
    flat = raw.view(place.dtype)
    if place.stride is None:
        return flat.reshape(place.shape)
    return flat.as_strided(place.shape, place.stride, place.start)


def _recognise(buffer: mmap.mmap) -> str | None:
    """What a file that is certainly no weights file is, if its first or last bytes give it away."""
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
    if _is_pickle(buffer) and (name := _first_global(buffer)) is not None:
        return f"is a plain pickle: this file would run {name} when loaded; refused"
    if _is_text(start):
        if start.lstrip()[:1] in (b"{", b"["):
            index = buffer.find(b'"weight_map"') >= 0
            return "is an index of shards; open it as such" if index else "is JSON text, not weights"
        return f"is text, not weights; it begins with {_shown(start[:60].decode(errors='replace'))}"
    if len(buffer) < 16:
        return f"is too short ({len(buffer)} bytes); {DAMAGED}"
    return f"is no torch or safetensors file; it begins with the bytes {start[:8].hex(' ')}"


def _is_pickle(buffer: mmap.mmap) -> bool:
    """Whether the file reads as a pickle to its end; those of protocol 0 and 1 begin like any text."""
    try:
        return all(True for _ in pickletools.genops(buffer[:MAX_PICKLE]))
    except (ValueError, *UNPICKLING_ERRORS):
        return False


def _is_text(start: bytes) -> bool:
    text = start.decode("utf-8", errors="ignore")
    return len(text) > 0.9 * len(start) and all(c.isprintable() or c in "\t\r\n" for c in text)


def _shown(text: object) -> str:
    """A name from a file, fit for a terminal."""
    text = str(text)
    text = text if text.isprintable() else repr(text)
    return text if len(text) <= 120 else f"{text[:100]}... ({len(text)} characters)"


# --- safetensors


def _open_safetensors(path: Path, buffer: mmap.mmap) -> TensorFile:
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
    places = {
        name: _Place(8 + length + begin, end - begin, dtype, shape)
        for name, (begin, end, dtype, shape) in spans.items()
    }
    if not places:
        raise ValueError(f"{path} is a safetensors file without any tensor")
    return TensorFile(path, "safetensors", _Lazy(buffer, places), {}, metadata, (), buffer)


def _parse_header(path: Path, raw: bytes) -> dict[str, Any]:
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_without_repeats)
    except RecursionError as error:
        raise ValueError(f"{path} has a header that nests without end; {DAMAGED}") from error
    except ValueError as error:  # no JSON, no UTF-8, a name twice, a number of thousands of digits
        raise ValueError(f"{path} has a broken safetensors header ({_shown(error)}); {DAMAGED}") from error
    if not isinstance(header, dict):
        raise ValueError(f"{path} has a safetensors header that is no JSON object; {DAMAGED}")
    return header


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"the name {_shown(key)} comes twice")
        result[key] = value
    return result


def _span(path: Path, name: str, told: Any) -> tuple[int, int, torch.dtype, tuple[int, ...]]:
    """First byte, last byte + 1 (within the data), dtype and shape, once they agree with each other."""
    where = f"{path}: the header's entry for {_shown(name)}"
    if not isinstance(told, dict) or set(told) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{where} should have dtype, shape and data_offsets, nothing else; {DAMAGED}")
    dtype, shape, offsets = told["dtype"], told["shape"], told["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"{where} has the dtype {_shown(dtype)}; known are {', '.join(DTYPES)}")
    if not _are_counts(shape) or len(shape) > MAX_AXES or not _fits(shape):
        raise ValueError(f"{where} has the shape {_shown(shape)}; counts are expected; {DAMAGED}")
    if not _are_counts(offsets) or len(offsets) != 2:
        raise ValueError(f"{where} has the offsets {_shown(offsets)}; two counts are expected; {DAMAGED}")
    begin, end = offsets
    needed = math.prod(shape) * DTYPES[dtype].itemsize
    if end - begin != needed:
        raise ValueError(
            f"{where} says {_shown(end - begin)} bytes, but {dtype} of shape {tuple(shape)} "
            f"takes {_shown(needed)}; {DAMAGED}"
        )
    return begin, end, DTYPES[dtype], tuple(shape)


def _fits(shape: Iterable[int]) -> bool:
    """Whether torch can count such a tensor, even one without elements."""
    return math.prod(max(n, 1) for n in shape) <= sys.maxsize // 16


def _are_counts(values: Any) -> bool:
    """A list of integers that fit a size of this machine."""
    return isinstance(values, list) and all(type(v) is int and 0 <= v <= sys.maxsize for v in values)


def _check_cover(path: Path, spans: Mapping[str, tuple], size: int) -> None:
    """The tensors must fill the data exactly, without holes or overlaps."""
    at = 0
    for name, (begin, end, *_) in sorted(spans.items(), key=lambda item: item[1][:2]):
        if begin < at:
            raise ValueError(f"{path}: {_shown(name)} overlaps the tensor before it; {DAMAGED}")
        if begin > at:
            raise ValueError(f"{path}: {begin - at} bytes before {_shown(name)} are of no tensor; {DAMAGED}")
        at = end
    if at > size:
        raise ValueError(f"{path} has {size} bytes of data and its header describes {at}; {DAMAGED}")
    if at < size:
        raise ValueError(f"{path} has {size - at} bytes after its last tensor; {DAMAGED}")


# --- torch, the zip format


class _Storage(NamedTuple):
    """A storage that the pickle speaks of: the archive's entry, its dtype and its number of elements."""

    key: str
    dtype: torch.dtype
    count: int


class _Ref(NamedTuple):
    """A tensor that the pickle describes. A tuple: no later instruction of the pickle can change it."""

    storage: _Storage
    dtype: torch.dtype
    start: Any
    shape: Any
    stride: Any


class _StorageType(NamedTuple):
    dtype: torch.dtype


class _Rebuild(NamedTuple):
    """The word for one of torch's rebuilding functions: takes down what the tensor is, builds nothing."""

    name: str

    def __call__(self, *args: Any) -> _Ref:
        if self.name == "_rebuild_from_type_v2":  # function, type, arguments, attributes
            inner, _, args, _ = args
        elif self.name.startswith("_rebuild_parameter"):  # tensor, requires_grad, hooks
            inner = args[0]
        else:
            return self._tensor(*args)
        if isinstance(inner, _Rebuild) and inner.name != self.name:
            inner = inner(*args)
        if not isinstance(inner, _Ref):
            raise TypeError(f"{self.name} of something that is no tensor")
        return inner

    def _tensor(self, storage: Any, start: Any, shape: Any, stride: Any, *rest: Any) -> _Ref:
        if not isinstance(storage, _Storage):
            raise TypeError("a tensor without a storage")
        dtype = storage.dtype
        if self.name == "_rebuild_tensor_v3":
            dtype, rest = rest[2], rest[:2] + rest[3:]
        if not isinstance(dtype, torch.dtype):
            raise TypeError("a tensor without a dtype")
        if len(rest) > 2 and rest[2]:
            raise _Refused("holds a tensor with pending conjugation or negation; resolve it before saving")
        return _Ref(storage, dtype, start, shape, stride)


class _Inert:
    """Stands in for an object of a class that is not imported: accepts everything, does nothing."""

    word = "?"

    def __new__(cls, *args: Any, **kwargs: Any):
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def _swallow(self, *args: Any) -> None:
        pass

    __setstate__ = append = extend = add = __setitem__ = _swallow  # all that a pickle can ask of it


class _Dict(dict):
    """What an OrderedDict becomes. It takes no attributes: a pickle could replace its methods by them."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        pass


class _Refused(ValueError):
    """The pickle asked for something that is neither a tensor nor known to be harmless."""


class _Unpickler(pickle.Unpickler):
    """Runs the pickle of a torch file without ever importing or calling anything that it names."""

    def __init__(self, data: bytes, inert: tuple[str, ...]):
        super().__init__(io.BytesIO(data), encoding="utf-8")
        self._inert_packages = INERT_PACKAGES + inert
        self._known: dict[tuple[str, str], Any] = {}  # one stand-in per class and file

    def find_class(self, module: str, name: str) -> Any:
        word = (module, name)
        if word not in self._known:
            self._known[word] = _meaning(module, name, self._inert_packages)
        return self._known[word]

    def persistent_load(self, token: Any) -> _Storage:
        if not (isinstance(token, tuple) and len(token) == 5 and token[0] == "storage"):
            raise pickle.UnpicklingError("a reference to something that is no storage")
        _, kind, key, _, count = token
        if not (isinstance(kind, _StorageType) and isinstance(key, str) and type(count) is int):
            raise pickle.UnpicklingError("a reference to a storage of an unknown kind")
        return _Storage(key, kind.dtype, count)


def _meaning(module: str, name: str, inert_packages: tuple[str, ...]) -> Any:
    """What a name in a pickle stands for here. Nothing is looked up in the modules of that name."""
    if (module, name) in REBUILD:
        return _Rebuild(name)
    if (module, name) == ("collections", "OrderedDict"):
        return _Dict
    if module in ("torch", "torch.cuda", "torch.storage") and name in STORAGES:
        return _StorageType(STORAGES[name])
    if module == "torch" and name in TORCH_DTYPES:
        return TORCH_DTYPES[name]
    if name in INERT_NAMES.get(module, ()) or any(f"{module}.".startswith(f"{p}.") for p in inert_packages):
        return type("_Inert", (_Inert,), {"word": f"{module}.{name}"})
    raise _Refused(_refusal(module, name))


def _refusal(module: str, name: str) -> str:
    word = _shown(f"{module}.{name}")
    if module in ("torch._utils", "torch._tensor"):
        return f"holds a tensor of a kind that is not read here ({word}); save dense tensors on the CPU"
    if module.startswith("torch.nn."):
        return f"holds a pickled model: this file would run {word} when loaded; refused; {SAVE_ANEW}"
    return f"holds more than tensors: this file would run {word} when loaded; refused; {SAVE_ANEW}"


def _open_zip(path: Path, buffer: mmap.mmap, inert: tuple[str, ...]) -> TensorFile:
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
    content = _unpickle(path, data, inert)
    held, extra = _unwrap(path, content)
    places, sums = {}, {}
    for name, ref in held.items():
        entry = entries.get(f"{root}data/{ref.storage.key}")
        if entry is None:
            raise ValueError(f"{path} lacks the numbers of {_shown(name)}; {DAMAGED}")
        offset = _stored_at(path, buffer, entry)
        places[name] = _place(f"{path}: {_shown(name)}", ref, offset, entry.file_size, len(buffer))
        sums[offset] = _Sum(entry.filename, entry.file_size, entry.CRC)
    return TensorFile(path, "torch", _Lazy(buffer, places), extra, {}, (), buffer, sums)


def _zip_entries(path: Path) -> tuple[dict[str, zipfile.ZipInfo], str]:
    """The archive's entries by name, and the folder in it that has data.pkl."""
    try:
        with zipfile.ZipFile(path) as archive:
            infos = archive.infolist()
    except (*ZIP_ERRORS, ValueError, OSError) as error:
        raise ValueError(f"{path} is a zip archive without its end ({_shown(error)}); {DAMAGED}") from error
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
    where = f"{path}: its entry {_shown(entry.filename)}"
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


def _unpickle(path: Path, data: bytes, inert: tuple[str, ...]) -> Any:
    try:
        for opcode, arg, _ in pickletools.genops(
            data
        ):  # lying lengths and positions, before they cost memory
            if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and arg > len(data):
                raise pickle.UnpicklingError("it counts more objects than it has bytes")
        return _Unpickler(data, inert).load()
    except _Refused as error:
        raise ValueError(f"{path} {error}") from None
    except (*UNPICKLING_ERRORS, ValueError) as error:
        raise ValueError(
            f"{path} has a broken description of its tensors ({_shown(error)}); {DAMAGED}"
        ) from error


def _place(where: str, ref: _Ref, offset: int, nbytes: int, file_size: int) -> _Place:
    """The tensor's place in the file, once all of it lies within its storage."""
    storage, dtype, start, shape, stride = ref
    counts = isinstance(shape, tuple) and isinstance(stride, tuple) and len(shape) == len(stride) <= MAX_AXES
    if not counts or not _are_counts([start, storage.count, *shape, *stride]) or not _fits(shape):
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
    return _Place(offset, nbytes - nbytes % dtype.itemsize, dtype, shape, stride, start)


# --- torch, the format before the zip


def _open_legacy(path: Path, buffer: mmap.mmap) -> TensorFile:
    """Old torch files have no places to map: they are read into memory, by torch's own careful reader."""
    if not _has_legacy_magic(buffer):
        name = _first_global(buffer)
        runs = f": this file would run {name} when loaded; refused" if name else "; refused"
        raise ValueError(f"{path} is a plain pickle, not a torch file{runs}; {SAVE_ANEW}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (*UNPICKLING_ERRORS, ValueError, RuntimeError, AssertionError) as error:
        name = _first_global(buffer)
        told = f"this file would run {name} when loaded" if name else f"it is damaged ({_shown(error)})"
        raise ValueError(
            f"{path} is in torch's format from before 2020 and {told}; refused; {SAVE_ANEW}"
        ) from None
    held, extra = _unwrap(path, _plain(content))
    return TensorFile(path, "torch", _Lazy(None, held), extra, {})


def _has_legacy_magic(buffer: mmap.mmap) -> bool:
    with contextlib.suppress(ValueError):
        return any(arg == LEGACY_MAGIC for _, arg, _ in pickletools.genops(buffer[:64]))
    return False


def _first_global(raw: bytes | mmap.mmap) -> str | None:
    """The first name in the leading pickles that is no word of tensors; for messages, enforces nothing."""
    stream = io.BytesIO(raw[:MAX_PICKLE])
    for _ in range(4):  # an old torch file: magic, version, system, content
        texts: list[str] = []
        with contextlib.suppress(ValueError, *UNPICKLING_ERRORS):
            for opcode, arg, _ in pickletools.genops(stream):
                if isinstance(arg, str):
                    texts.append(arg)
                if opcode.name in ("GLOBAL", "INST"):
                    module, name = arg.split(" ", 1)
                elif opcode.name == "STACK_GLOBAL" and len(texts) >= 2:
                    module, name = texts[-2:]
                else:
                    continue
                if not _is_tensor_word(module, name):
                    return _shown(f"{module}.{name}")
            continue
        return None
    return None


def _is_tensor_word(module: str, name: str) -> bool:
    plain = (module, name) in REBUILD or (module, name) == ("collections", "OrderedDict")
    known = (*STORAGES, *TORCH_DTYPES, *INERT_NAMES.get(module, ()))
    return plain or (module.split(".")[0] == "torch" and name in known)


# --- what a torch file holds


def _plain(content: Any, depth: int = MAX_WRAPPERS) -> Any:
    """Real dicts in place of torch's OrderedDicts, whose methods a pickle can replace."""
    if not isinstance(content, dict):
        return content
    return {key: _plain(value, depth - 1) if depth else value for key, value in dict.items(content)}


def _unwrap(path: Path, content: Any) -> tuple[dict[str, _Ref | Tensor], dict[str, Any]]:
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
    shown = [_shown(key) if isinstance(key, (str, int)) else type(key).__name__ for key in keys[:5]]
    return ", ".join(shown) + (", ..." if len(keys) > 5 else "")


def _is_tensor(value: Any) -> bool:
    return isinstance(value, (_Ref, Tensor))


def _set_aside(values: Mapping[Any, Any], extra: dict[str, Any], left_out: list[str]) -> None:
    for key, value in values.items():
        if isinstance(key, str) and (value is None or type(value) in (int, float, str, bool)):
            extra[key] = value
        else:
            left_out.append(_names([key]))


def _named_tensors(path: Path, content: Any) -> dict[str, _Ref | Tensor]:
    if _is_tensor(content):
        raise ValueError(f"{path} holds one tensor without a name; save {{name: tensor}} instead")
    if isinstance(content, _Inert):
        raise ValueError(f"{path} holds an object of {_shown(content.word)}, not a state dict; {SAVE_ANEW}")
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
        raise ValueError(f"{path}: {_shown(unfit[0])} is not a dense tensor; save dense tensors")
    return tensors


# --- shards


def _read_index(index: Path) -> tuple[dict[str, str], dict[str, str]]:
    with _opened(index) as file:
        raw = file.read(MAX_HEADER + 1)
    if len(raw) > MAX_HEADER:
        raise ValueError(
            f"{index} is larger than an index can be ({MAX_HEADER} bytes); is it the weights file?"
        )
    try:
        content = json.loads(raw.decode("utf-8"), object_pairs_hook=_without_repeats)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{index} is no index of shards ({_shown(error)}); download it again") from error
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(
            f"{index} is no index of shards: it should have a `weight_map` from tensors to files"
        )
    for name in weight_map.values():
        if not isinstance(name, str) or not name.isprintable() or Path(name).name != name or "\\" in name:
            raise ValueError(f"{index} names {_shown(name)}; a plain file name beside the index is expected")
    notes = content.get("metadata")
    return weight_map, {k: str(v) for k, v in notes.items()} if isinstance(notes, dict) else {}


def _agree(index: Path, weight_map: Mapping[str, str], parts: list[TensorFile]) -> dict[str, TensorFile]:
    """tensor name -> its file, if every file holds exactly what the index says."""
    holder: dict[str, TensorFile] = {}
    for part in parts:
        for name in part.tensors:
            if name in holder:
                raise ValueError(
                    f"{_shown(name)} is in {holder[name].path.name} and in {part.path.name}; keep one"
                )
            if name not in weight_map:
                raise ValueError(
                    f"{part.path} holds {_shown(name)}, which {index.name} does not list; {DAMAGED}"
                )
            holder[name] = part
    for name, file in weight_map.items():
        if name not in holder or holder[name].path.name != file:
            where = f"it is in {holder[name].path.name}" if name in holder else "no file has it"
            raise ValueError(f"{index} promises {_shown(name)} in {file}, but {where}; {DAMAGED}")
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
