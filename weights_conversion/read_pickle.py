"""Inspect the pickle of a torch file before torch.load runs it.

torch.load(weights_only=True) calls no function outside a fixed list. A hostile pickle can still make it hang,
crash or allocate far more memory than the file has bytes, and it refuses files that hold a training program's
own objects beside the tensors. Therefore:

    pickle_names   find_refused: the first name that neither describes tensors nor is known to be harmless
    outline        follows the pickle without building anything; refuses what would hang or crash torch.load
    stand_ins      lifeless classes that torch.load uses in place of the harmless ones
"""

from __future__ import annotations

import pickletools
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, BinaryIO

from weights_conversion.pickle_names import (
    FROM_TYPE,
    MAX_OPCODES,
    REBUILD,
    VALUES,
    WORDS,
    dotted,
    is_inert,
)

MAX_PICKLE = 16 << 20  # bytes; the official UNet's pickle has 0.2 MiB
MAX_WAITING = 100_000  # objects on the stack: a tuple's, or a thousand entries of a dict at a time
MAX_REPEATED = 1_000_000  # objects that shared parts would add if they were written out at each use
MAX_DEPTH = 200

LATIN = (["latin1"], ["latin-1"])

# Opcodes that push an object, and of which kind; opcodes that take objects, and how many (None: to the mark).
PUSHES = {
    "GLOBAL": "name", "EMPTY_LIST": "list", "EMPTY_DICT": "dict", "EMPTY_TUPLE": "tuple",
    **dict.fromkeys(("EMPTY_SET", "NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "LONG1",
                     "BINFLOAT", "BINUNICODE", "SHORT_BINSTRING"), "value"),
}  # fmt: skip
TAKES = {
    "TUPLE": None, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3, "BINPERSID": 1, "REDUCE": 2, "NEWOBJ": 2,
    "BUILD": 1, "APPEND": 1, "APPENDS": None, "SETITEM": 2, "SETITEMS": None,
}  # fmt: skip

# --- contents


@dataclass
class Outline:
    """What one pickle describes."""

    storages: dict[str, int] = field(default_factory=dict)  # key -> numbers, in order of appearance
    stood_for: dict[str, str] = field(default_factory=dict)  # inert name -> "object", "list" or "dict"
    texts: set[str] = field(default_factory=set)


class _Object:
    """An object on the pickle's stack. `size` and `depth` count its parts, shared ones at each use."""

    __slots__ = ("depth", "kind", "shared", "size", "value")

    def __init__(self, kind: str, value: Any = None, parts: Sequence[_Object] = ()):
        self.kind = kind  # name, tuple, list, dict, value, storage, tensor; object: made by an inert name
        self.value = value  # a plain value, a dotted name, or a tuple's objects
        self.size, self.depth, self.shared = 1, 1, False
        self.add(parts)

    def add(self, parts: Sequence[_Object]) -> None:
        if self.shared:
            raise ValueError("a container is changed after it was used, or holds itself")
        self.size += sum(part.size for part in parts)
        self.depth = max([self.depth, *(1 + part.depth for part in parts)])
        if self.depth > MAX_DEPTH:
            raise ValueError(f"it nests more than {MAX_DEPTH} levels deep")


def outline(stream: BinaryIO, inert: tuple[str, ...]) -> Outline:
    """Follow one pickle. ValueError, or another of UNPICKLING_ERRORS, if torch.load should not see it.

    A container that was used a second time must not change any more: so `size` is right when it is added up.
    """
    found = Outline()
    stack: list[_Object] = []
    marked: list[list[_Object]] = []
    memo: dict[int, _Object] = {}
    repeated = 0
    for count, (opcode, arg, _) in enumerate(pickletools.genops(stream)):
        code = opcode.name
        if count > MAX_OPCODES or len(stack) > MAX_WAITING or len(marked) > MAX_DEPTH:
            raise ValueError("it is larger or nests deeper than a checkpoint's")
        if code == "STOP":
            return found
        if code == "MARK":
            marked.append(stack)
            stack = []
        elif code in ("BINPUT", "LONG_BINPUT"):
            memo[arg] = stack[-1]
        elif code in ("BINGET", "LONG_BINGET"):
            stack.append(memo[arg])
            stack[-1].shared = True
            repeated += stack[-1].size - 1
            if repeated > MAX_REPEATED:
                raise ValueError("it repeats its own parts too often")
        elif code in PUSHES:
            stack.append(_pushed(found, PUSHES[code], arg, inert))
        elif code in TAKES:
            if TAKES[code] is None:
                parts, stack = stack, marked.pop()
            else:
                parts = [stack.pop() for _ in range(TAKES[code])][::-1]
            if code.startswith("TUPLE"):
                stack.append(_Object("tuple", parts, parts))
            elif code == "BINPERSID":
                stack.append(_storage(found, *parts))
            elif code in ("REDUCE", "NEWOBJ"):
                stack.append(_called(*parts, new=code == "NEWOBJ"))
            elif code != "BUILD":
                _fill(found, stack[-1], "list" if code.startswith("APPEND") else "dict", parts)
            elif stack[-1].kind not in ("dict", "object"):
                raise ValueError(f"it sets attributes of a {stack[-1].kind}")
        elif code != "PROTO":
            raise ValueError(f"torch.load(weights_only=True) does not know its instruction {code}")
    raise EOFError("it does not end")


def _pushed(found: Outline, kind: str, arg: Any, inert: tuple[str, ...]) -> _Object:
    if kind == "name":
        arg = dotted(*arg.split(" ", 1))
        if arg not in WORDS:
            if not is_inert(arg, inert):
                raise ValueError(f"it names {arg}")
            found.stood_for.setdefault(arg, "object")
    elif isinstance(arg, str):
        found.texts.add(arg)
    return _Object(kind, [] if kind == "tuple" else arg)


def _storage(found: Outline, token: _Object) -> _Object:
    """A reference to a storage: ("storage", its type, its key, its device, how many numbers it has, ...)."""
    words = [part.value for part in token.value] if token.kind == "tuple" else []
    if len(words) not in (5, 6) or words[0] != "storage":
        raise ValueError("a reference to something that is no storage")
    key, count = words[2], words[4]
    if type(key) is not str or not key.isascii() or type(count) is not int or count < 0:
        raise ValueError("a storage without a key or a size")
    if found.storages.setdefault(key, count) != count:
        raise ValueError(f"storage {key} has two sizes")
    return _Object("storage")


def _called(callee: _Object, args: _Object, *, new: bool) -> _Object:
    if callee.kind != "name" or args.kind != "tuple":
        raise ValueError(f"it calls a {callee.kind} with a {args.kind}")
    name = callee.value
    if name not in WORDS:  # so it is inert
        if name == "_codecs.encode" and [part.value for part in args.value[1:]] not in LATIN:
            raise ValueError("bytes in an encoding other than latin1")
        return _Object("object", name, [args])
    if name in REBUILD and not new:
        first = args.value[0]
        if name == FROM_TYPE and (first.kind != "name" or first.value not in REBUILD - {FROM_TYPE}):
            raise ValueError("a tensor that is rebuilt by an unknown function")
        return _Object("tensor")
    if name == "collections.OrderedDict" and not new:
        return _Object("dict", None, [args])
    if name in VALUES and not new:
        return _Object("value")
    raise ValueError(f"it calls {name}")


def _fill(found: Outline, target: _Object, kind: str, parts: Sequence[_Object]) -> None:
    if target.kind == "object":
        if found.stood_for[target.value] not in ("object", kind):
            raise ValueError(f"{target.value} is used as a list and as a dict")
        found.stood_for[target.value] = kind
    elif target.kind != kind:
        raise ValueError(f"it fills a {target.kind} as a {kind}")
    target.add(parts)


# --- stand-ins


class Inert:
    """Stands in for an object of a class that is not imported: accepts everything, does nothing."""

    word = "?"

    def __init__(self, *args: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        pass


# What an inert class becomes whose objects the pickle fills: torch.load fills no others than these.
FILLED = {
    "object": {},
    "list": {"__new__": lambda cls, *args: []},
    "dict": {"__new__": lambda cls, *args: OrderedDict()},
}


def stand_ins(found: Outline) -> list[tuple[type, str]]:
    """The lifeless classes, for torch.serialization.safe_globals."""
    return [
        (type("Inert", (Inert,), {"word": word, **FILLED[kind]}), word)
        for word, kind in found.stood_for.items()
    ]
