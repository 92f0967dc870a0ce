"""Run the pickle of a torch file without ever importing or calling anything that it names.

That pickle is a small program; ours is the one interpreter that runs it, and it knows only the words that
describe tensors (REBUILD, OrderedDict), words that it takes for a lifeless stand-in (INERT), and refuses
every other by name. What comes out describes tensors (Ref) and holds none: `read_torch` finds their numbers.
"""

from __future__ import annotations

import contextlib
import io
import mmap
import pickle
import pickletools
import struct
from pathlib import Path
from typing import Any, NamedTuple

import torch

from i2vgen.files.safefile import DTYPES
from weights_conversion.mapped import DAMAGED, SAVE_ANEW, shown

MAX_PICKLE = 64 << 20  # bytes; the official UNet's has 0.2 MiB

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


class _Storage(NamedTuple):
    """A storage that the pickle speaks of: the archive's entry, its dtype and its number of elements."""

    key: str
    dtype: torch.dtype
    count: int


class Ref(NamedTuple):
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

    def __call__(self, *args: Any) -> Ref:
        if self.name == "_rebuild_from_type_v2":  # function, type, arguments, attributes
            inner, _, args, _ = args
        elif self.name.startswith("_rebuild_parameter"):  # tensor, requires_grad, hooks
            inner = args[0]
        else:
            return self._tensor(*args)
        if isinstance(inner, _Rebuild) and inner.name != self.name:
            inner = inner(*args)
        if not isinstance(inner, Ref):
            raise TypeError(f"{self.name} of something that is no tensor")
        return inner

    def _tensor(self, storage: Any, start: Any, shape: Any, stride: Any, *rest: Any) -> Ref:
        if not isinstance(storage, _Storage):
            raise TypeError("a tensor without a storage")
        dtype = storage.dtype
        if self.name == "_rebuild_tensor_v3":
            dtype, rest = rest[2], rest[:2] + rest[3:]
        if not isinstance(dtype, torch.dtype):
            raise TypeError("a tensor without a dtype")
        if len(rest) > 2 and rest[2]:
            raise _Refused("holds a tensor with pending conjugation or negation; resolve it before saving")
        return Ref(storage, dtype, start, shape, stride)


class Inert:
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
        return type("_Inert", (Inert,), {"word": f"{module}.{name}"})
    raise _Refused(_refusal(module, name))


def _refusal(module: str, name: str) -> str:
    word = shown(f"{module}.{name}")
    if module in ("torch._utils", "torch._tensor"):
        return f"holds a tensor of a kind that is not read here ({word}); save dense tensors on the CPU"
    if module.startswith("torch.nn."):
        return f"holds a pickled model: this file would run {word} when loaded; refused; {SAVE_ANEW}"
    return f"holds more than tensors: this file would run {word} when loaded; refused; {SAVE_ANEW}"


def unpickle(path: Path, data: bytes, inert: tuple[str, ...]) -> Any:
    """What the pickle describes, with a Ref for each tensor. ValueError if it is broken or wants more."""
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
            f"{path} has a broken description of its tensors ({shown(error)}); {DAMAGED}"
        ) from error


# --- pickles that are looked at and never run


def is_pickle(buffer: mmap.mmap) -> bool:
    """Whether the file reads as a pickle to its end; those of protocol 0 and 1 begin like any text."""
    try:
        return all(True for _ in pickletools.genops(buffer[:MAX_PICKLE]))
    except (ValueError, *UNPICKLING_ERRORS):
        return False


def first_global(raw: bytes | mmap.mmap) -> str | None:
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
                    return shown(f"{module}.{name}")
            continue
        return None
    return None


def _is_tensor_word(module: str, name: str) -> bool:
    plain = (module, name) in REBUILD or (module, name) == ("collections", "OrderedDict")
    known = (*STORAGES, *TORCH_DTYPES, *INERT_NAMES.get(module, ()))
    return plain or (module.split(".")[0] == "torch" and name in known)
