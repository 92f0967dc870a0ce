"""`inspect PATH`: say what is in a weights file or folder, as text. Reads headers only, executes nothing."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from torch import Tensor

from i2vgen.files import records
from i2vgen.settings.wording import counted
from weights_conversion import readers
from weights_conversion.readers import OnBytes, TensorFile

Recognise = Callable[[Mapping[str, Tensor]], str | None]

INDEX_ENDING = ".index.json"
WEIGHT_ENDINGS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
MAX_LINES = 24  # groups of names that are listed
NUM_LARGEST = 5
MAX_VALUE = 200  # characters shown of a note


def describe(
    path: str | Path,
    *,
    hash: bool = False,
    recognise: Recognise | None = None,
    on_bytes: OnBytes | None = None,
) -> str:
    """A report on a weights file, an index of shards, or every weights file in a folder.

    `hash` adds SHA-256 (which reads the files whole; `on_bytes` gets the number of bytes just read),
    `recognise` what the names and shapes say it is. ValueError if a single file cannot be read; in a folder
    the reason stands in the report in place of the file.
    """
    path = Path(path)
    if not path.is_dir():
        return _report(path, hash, recognise, on_bytes)
    reports = []
    for file in _weight_files(path):
        try:
            reports.append(_report(file, hash, recognise, on_bytes))
        except ValueError as error:
            reports.append(f"{file}\n  CANNOT BE READ: {error}")
    if not reports:
        raise ValueError(f"{path} holds no weights: no file in it ends with {', '.join(WEIGHT_ENDINGS)}")
    return "\n\n".join(reports)


def _weight_files(folder: Path) -> Iterator[Path]:
    """Weights files in a folder and its subfolders, hidden ones left out; an index stands for its shards."""
    names = sorted(
        path
        for path in folder.rglob("*")
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )
    indices = [path for path in names if path.name.endswith(INDEX_ENDING)]
    shards = {shard for index in indices for shard in _shards(index)}
    for path in names:
        if path in indices or (path.suffix in WEIGHT_ENDINGS and path not in shards):
            yield path


def _shards(index: Path) -> set[Path]:
    try:
        return {index.parent / name for name in readers.shard_names(index)}
    except ValueError:
        return set()  # the report on the index gives the reason


def _report(path: Path, hash: bool, recognise: Recognise | None, on_bytes: OnBytes | None) -> str:
    opener = readers.open_sharded if path.name.endswith(INDEX_ENDING) else readers.open_file
    file = opener(path, check=False)
    lines = [str(path), *(f"  {line}" for line in _lines(file, recognise))]
    if hash:
        for part in file.parts or (file,):
            lines.append(f"  SHA-256 {records.sha256(part.path, on_bytes)}  {part.path.name}")
    return "\n".join(lines)


def _lines(file: TensorFile, recognise: Recognise | None) -> Iterator[str]:
    told = recognise(file.tensors) if recognise is not None else None
    if told is not None:
        yield f"what      {told}"
    num, size, dtypes = _totals(file.tensors)
    parts = f" in {counted(len(file.parts), 'file')}" if file.parts else ""
    yield f"format    {file.format}{parts}"
    yield f"tensors   {len(file.tensors):,}"
    yield f"numbers   {num:,}"
    yield f"bytes     {size:,} ({_readable(size)})"
    yield f"dtypes    {', '.join(f'{name} x {count:,}' for name, count in dtypes.most_common())}"
    for part in file.parts:
        yield f"file      {part.path.name}: {len(part.tensors):,} tensors"
    for label, notes in (("beside", file.extra), ("metadata", file.metadata)):
        for key, value in notes.items():
            yield f"{label:<9} {_short(key)} = {_short(value)}"
    yield "groups"
    yield from (f"  {line}" for line in _groups(file.tensors))
    yield "largest"
    largest = sorted(file.tensors.items(), key=lambda item: -item[1].numel())[:NUM_LARGEST]
    for name, tensor in largest:
        yield f"  {_short(name)}  {_shape(tensor)}"


def _totals(tensors: Mapping[str, Tensor]) -> tuple[int, int, Counter[str]]:
    """Numbers and bytes of all tensors, and how many tensors have which dtype."""
    dtypes: Counter[str] = Counter()
    num = size = 0
    for tensor in tensors.values():
        dtypes[_dtype(tensor)] += 1
        num += tensor.numel()
        size += tensor.numel() * tensor.element_size()
    return num, size, dtypes


def _groups(tensors: Mapping[str, Tensor]) -> Iterator[str]:
    """One line per group of names: by their first word, by more words while the groups stay few."""
    groups = _by_prefix(tensors, 1)
    for words in (2, 3):
        finer = _by_prefix(tensors, words)
        if len(finer) > MAX_LINES:
            break
        groups = finer
    width = max(len(_short(prefix)) for prefix in groups)
    for prefix, names in list(groups.items())[:MAX_LINES]:
        num = sum(tensors[name].numel() for name in names)
        example = f"  {_shape(tensors[names[0]])}" if len(names) == 1 else ""
        yield f"{_short(prefix):<{width}}  {len(names):>6,} tensors  {num:>15,} numbers{example}"
    if len(groups) > MAX_LINES:
        yield f"... and {len(groups) - MAX_LINES:,} more groups"


def _by_prefix(tensors: Mapping[str, Tensor], words: int) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for name in sorted(tensors, key=_natural):
        pieces = name.split(".")
        prefix = ".".join(pieces[:words]) + (".*" if len(pieces) > words else "")
        groups.setdefault(prefix, []).append(name)
    return groups


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorting key that puts block 2 before block 10."""
    return [(len(piece), piece) if piece.isdigit() else (0, piece) for piece in re.split(r"(\d+)", name)]


def _shape(tensor: Tensor) -> str:
    return f"{_dtype(tensor)} {' x '.join(map(str, tensor.shape)) or 'scalar'}"


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _readable(size: int) -> str:
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.4g} {unit}"
        size /= 1024
    return f"{size:.4g} GiB"


def _short(value: object) -> str:
    text = str(value)
    text = text if text.isprintable() else repr(text)
    return text if len(text) <= MAX_VALUE else f"{text[:MAX_VALUE]}... ({len(text):,} characters)"
