"""The names that a pickle may import: those that describe tensors (WORDS), and harmless ones (INERT)."""

from __future__ import annotations

import contextlib
import itertools
import pickle
import pickletools
import struct
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Iterator
from typing import BinaryIO

from i2vgen.files.safefile import DTYPES

MAX_OPCODES = 1_000_000

# What the pickle of a torch file needs to describe dense tensors.
FROM_TYPE = "torch._tensor._rebuild_from_type_v2"
REBUILD = {
    "torch._utils._rebuild_tensor",
    "torch._utils._rebuild_tensor_v2",
    "torch._utils._rebuild_tensor_v3",
    "torch._utils._rebuild_parameter",
    "torch._utils._rebuild_parameter_with_state",
    FROM_TYPE,
}
VALUES = {"torch.Size", "torch.device"}
TYPES = {"torch.Tensor", "torch.nn.parameter.Parameter", *map(str, DTYPES.values()), "torch.complex128"}
KINDS = "Double Float Half BFloat16 Long Int Short Char Byte Bool ComplexFloat ComplexDouble"
STORAGES = {f"{module}.{kind}Storage" for module in ("torch", "torch.cuda") for kind in KINDS.split()}
WORDS = REBUILD | VALUES | TYPES | STORAGES | {"torch.storage.UntypedStorage", "collections.OrderedDict"}

# Classes found in checkpoints beside the tensors: packages (all of their names), then single names.
INERT_PACKAGES = (
    "pytorch_lightning", "lightning", "lightning_fabric", "lightning_utilities", "torchmetrics", "omegaconf",
    "easydict", "ldm", "open_clip", "transformers", "diffusers", "torch.optim",
)  # fmt: skip
INERT = {
    f"{module}.{name}"
    for module, names in {
        "argparse": "Namespace",
        "types": "SimpleNamespace",
        "typing": "Any Union Optional",
        "collections": "defaultdict Counter deque",
        "builtins": "set frozenset list tuple dict int float bool complex str bytes slice object",
        "pathlib": "Path PosixPath WindowsPath PurePath PurePosixPath PureWindowsPath",
        "pathlib._local": "Path PosixPath WindowsPath PurePath PurePosixPath PureWindowsPath",  # Python 3.13
        "datetime": "datetime date time timedelta timezone",
        "numpy": "dtype ndarray",
        "numpy.core.multiarray": "scalar _reconstruct",
        "numpy._core.multiarray": "scalar _reconstruct",
        "numpy.core.numeric": "_frombuffer",
        "numpy._core.numeric": "_frombuffer",
        "_codecs": "encode",  # how numpy writes bytes
    }.items()
    for name in names.split()
}

# What a malformed pickle makes pickletools, `outline` and torch raise.
UNPICKLING_ERRORS = (
    pickle.UnpicklingError, struct.error, ArithmeticError, AssertionError, AttributeError, EOFError,
    LookupError, MemoryError, RuntimeError, TypeError, ValueError,
)  # fmt: skip


def find_refused(stream: BinaryIO, inert: tuple[str, ...]) -> str | None:
    """The first name in one pickle that is neither a word of tensors nor inert, as the pickle spells it."""
    for module, name in _names(stream):
        word = dotted(module, name)
        if word not in WORDS and not is_inert(word, inert):
            return f"{module}.{name}"
    return None


def is_pickle(data: bytes) -> bool:
    """Whether the bytes read as one pickle to their end; those of protocol 0 and 1 begin like any text."""
    try:
        return all(True for _ in pickletools.genops(data))
    except UNPICKLING_ERRORS:
        return False


def _names(stream: BinaryIO) -> Iterator[tuple[str, str]]:
    """Module and name of all that one pickle would import, as far as it can be read."""
    texts = ("", "")
    with contextlib.suppress(*UNPICKLING_ERRORS):
        for opcode, arg, _ in itertools.islice(pickletools.genops(stream), MAX_OPCODES):
            if opcode.name in ("GLOBAL", "INST"):
                module, name = arg.split(" ", 1)
                yield module, name
            elif opcode.name == "STACK_GLOBAL":
                yield texts
            elif isinstance(arg, str):
                texts = (texts[1], arg)


def dotted(module: str, name: str) -> str:
    """The dotted name that torch.load looks up; Python 2 names are translated as it translates them."""
    return ".".join(NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name)))


def is_inert(word: str, inert: tuple[str, ...]) -> bool:
    # torch.load takes its own functions and builtins for what they are, whatever stands in for them.
    packages = INERT_PACKAGES if word.startswith(("torch.", "builtins.")) else INERT_PACKAGES + inert
    return word in INERT or word.startswith(tuple(f"{package}." for package in packages))
