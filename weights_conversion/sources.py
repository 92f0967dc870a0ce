"""What a user names on the command line -> the parts found there, still unread."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from i2vgen.files import checkpoint
from i2vgen.files.eight_bits import Widened
from i2vgen.settings.config import FORMAT, SETTINGS_FILE
from i2vgen.settings.merge import read_stored_settings
from i2vgen.settings.wording import counted, first_line
from weights_conversion import adapters, diffusers_layout, readers
from weights_conversion.inspect_file import INDEX_ENDING, WEIGHT_ENDINGS
from weights_conversion.recognise import COMPILED, WORDS, Renamed, bare, recognise, recognise_below

SHARD = re.compile(r".+-\d{5}-of-(?P<count>\d{5})\.\w+")
TOOK_AVERAGED = "the averaged weights were taken"
RECORD = "i2vgen"  # what an exported file says about the folder that it came from, as JSON text
HUB = re.compile(r"hf:(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?(#(?P<inside>.+))?")


@dataclass(frozen=True)
class PartSource:
    """One part, where it was found, and what its folder says about its settings."""

    part: str  # unet, vae, clip, text or image
    layout: str
    tensors: Mapping[str, Tensor]
    files: tuple[Path, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)  # our settings, where the source states them
    notes: tuple[str, ...] = ()
    extra: Mapping[str, Any] = field(default_factory=dict)
    card: Mapping[str, Any] = field(default_factory=dict)  # the model's own config.json
    origin: Mapping[str, Any] = field(default_factory=dict)  # our record of where the weights came from


def gather(
    names: Sequence[str | Path],
    *,
    variant: str | None = None,
    compat: str | None = None,
    spatial_init: bool = False,
    ema: bool = False,
) -> list[PartSource]:
    """All parts in all sources. ValueError if a source holds nothing known, or two hold the same part."""
    if not names:
        raise ValueError("no source given; name checkpoint files, folders, or hf:OWNER/NAME[@REVISION]")
    parts: list[PartSource] = []
    for name in names:
        here = _from_source(str(name), variant, compat, ema)
        here = [p for p in here if not _unused(p, here, spatial_init)]
        if not here:
            raise ValueError(
                f"{name} holds no part that is used here: a UNet without temporal layers, such as Stable "
                "Diffusion's, can only initialise one (--spatial-init)"
            )
        for part in here:
            if twin := next((p for p in parts if p.part == part.part), None):
                raise ValueError(
                    f"the {WORDS[part.part]} was found twice, in {twin.files[0]} and in {part.files[0]}; "
                    "name only one of them"
                )
            parts.append(part)
    layouts = {part.layout for part in parts}
    for flag, given, needs in (
        ("--compat", compat, "diffusers"),
        ("--variant", variant, "diffusers"),
        ("--spatial-init", spatial_init, "sd"),
    ):
        if given and needs not in layouts:
            what = "diffusers folder" if needs == "diffusers" else "Stable Diffusion UNet"
            raise ValueError(f"{flag} was given but no source is a {what}; it would change nothing")
    if ema and not any(TOOK_AVERAGED in note for part in parts for note in part.notes):
        raise ValueError("--ema was given but no source holds averaged weights; it would change nothing")
    return parts


def download(name: str, *, on_start: Callable[[str], None] | None = None) -> tuple[Path, str]:
    """`hf:OWNER/NAME[@REVISION][#PATH]` -> local path and the revision's commit. The only place that uses a
    network.

    Resumes by itself; progress bars are the library's own.
    """
    match = HUB.fullmatch(name)
    if not match:
        raise ValueError(
            f"{name} is no hub source; write hf:OWNER/NAME, hf:OWNER/NAME@REVISION or ...#FOLDER_OR_FILE"
        )
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    except ImportError as error:
        raise ValueError("hf: sources need huggingface_hub; pip install 'huggingface_hub>=0.25'") from error
    inside = match["inside"]
    patterns = [inside, f"{inside}/*"] if inside else None
    if on_start is not None:
        on_start(f"downloading {match['repo']} from the Hugging Face hub")
    try:
        folder = Path(snapshot_download(match["repo"], revision=match["revision"], allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ValueError(f"{name} could not be downloaded: {first_line(error)}") from error
    return (folder / inside if inside else folder), folder.name


def located(name: str) -> tuple[Path, tuple[str, ...]]:
    """A source's path, downloaded if it is on the hub, and notes. ValueError if there is nothing."""
    if name.startswith("hf:"):
        path, commit = download(name)
        return path, (f"downloaded as {name}, revision {commit}",)
    if not Path(name).exists():
        raise ValueError(f"source {name} does not exist")
    return Path(name), ()


def _from_source(name: str, variant: str | None, compat: str | None, ema: bool) -> list[PartSource]:
    path, notes = located(name)
    parts = _from_folder(path, variant, compat, ema) if path.is_dir() else _from_file(path, ema)
    return [dataclasses.replace(part, notes=(*part.notes, *notes)) for part in parts]


def _from_file(path: Path, ema: bool) -> list[PartSource]:
    if (shard := SHARD.fullmatch(path.name)) and int(shard["count"]) > 1:
        raise ValueError(
            f"{path} is one of {int(shard['count'])} shards; give their index (*{INDEX_ENDING}) or the folder"
        )
    opener = readers.open_sharded if path.name.endswith(INDEX_ENDING) else readers.open_file
    file = opener(path, ema=ema)
    tensors, averaged = _chosen(file, ema)
    found, prefix = recognise_below(tensors)
    if not found:
        some = ", ".join(list(tensors)[:4])
        why = "; it is an adapter: convert it by itself" if adapters.has_matrices(tensors) else ""
        raise ValueError(
            f"{path} holds {counted(len(tensors), 'tensor')}, but nothing known (its names: {some}, ...){why}"
        )
    notes = averaged if any(f.part == "unet" for f in found) else []
    if prefix:
        notes.append(f"{path.name}: the names' prefix {prefix} was left out{_without(prefix, tensors)}")
    record = _record(path, file.extra)
    return [
        PartSource(
            f.part,
            f.layout,
            f.tensors,
            (path, *(part.path for part in file.parts)),
            _settings_of_part(record, f.part),
            tuple(notes),
            {key: value for key, value in file.extra.items() if key != RECORD},
            origin=record.get("origin", {}),
        )
        for f in found
    ]


def _chosen(file: readers.TensorFile, ema: bool) -> tuple[Mapping[str, Tensor], list[str]]:
    """The tensors to take, and notes if the file also holds those averaged over the training (EMA)."""
    tensors, path = file.tensors, file.extra.get(readers.WRAPPER, "")
    other = file.extra.get(readers.AVERAGED, "")
    took = any(readers.EMA.fullmatch(key.lower()) for key in path.split("."))
    words = {name: name.partition(".")[0] for name in tensors}
    averaged = {name: word for name, word in words.items() if readers.EMA.fullmatch(word.lower())}
    where = ", ".join(f"{word}." for word in sorted(set(averaged.values())))
    twins = {bare(name.partition(".")[2]): name for name in averaged}
    pairs = {n: twins.get(bare(n)) or twins.get(_without_dots(n)) for n in tensors if n not in averaged}
    if averaged and not pairs:
        took, path = True, where
    elif any(pairs.values()):
        took, path, other = ema, where, where
        tensors = Renamed(tensors, {n: (twin if ema else None) or n for n, twin in pairs.items()})
    if took:
        return tensors, [f"{file.path.name}: {TOOK_AVERAGED} ({path})"]
    if nameless := file.extra.get(readers.NAMELESS):
        return tensors, [
            f"{file.path.name} also holds averaged weights without names ({nameless}), which were left out: "
            "nothing says which belongs where; save them by name to convert them"
        ]
    if other:
        return tensors, [
            f"{file.path.name} also holds averaged weights ({other}), which were left out; --ema takes them"
        ]
    return tensors, []


def _without_dots(name: str) -> str:
    """What Lightning's LitEma calls the averaged weight of this name, after `model_ema.`."""
    return name.removeprefix("model.").replace(".", "")


def _without(prefix: str, tensors: Mapping[str, Tensor]) -> str:
    start = prefix.removeprefix(COMPILED)
    others = [name for name in tensors if not name.replace(COMPILED, "").startswith(start)]
    count = counted(len(others), "tensor")
    return f"; also left out: {count} without it, such as {others[0]}" if others else ""


def _record(path: Path, extra: Mapping[str, Any]) -> dict[str, Any]:
    """What `export` wrote beside the tensors; empty for a file from elsewhere."""
    if RECORD not in extra:
        return {}
    try:
        record = json.loads(extra[RECORD])
        if not isinstance(record["settings"], dict) or record["format"] != FORMAT:
            raise ValueError(f"format {record['format']}; this version reads format {FORMAT}")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(
            f"{path}: its record `{RECORD}` is not readable ({error!r}); export it again"
        ) from error
    return record


def _settings_of_part(record: Mapping[str, Any], part: str) -> dict[str, Any]:
    """The UNet's file speaks for everything but the other two parts."""
    settings, own = record.get("settings", {}), ("vae", "clip")
    return {
        name: held for name, held in settings.items() if (name == part if part in own else name not in own)
    }


def _from_folder(path: Path, variant: str | None, compat: str | None, ema: bool) -> list[PartSource]:
    if (path / SETTINGS_FILE).is_file():
        return native(path)
    if diffusers_layout.is_folder(path):
        return from_diffusers(path, variant=variant, compat=compat)
    if (path / "config.json").is_file():
        return from_component(path, variant=variant, compat=compat)
    indices = sorted(path.glob(f"*{INDEX_ENDING}"))
    shards = {name for index in indices for name in readers.shard_names(index)}
    files = [f for f in sorted(path.iterdir()) if f.suffix in WEIGHT_ENDINGS and f.name not in shards]
    if not indices + files:
        raise ValueError(f"{path} is neither a native nor a diffusers folder and holds no checkpoint files")
    return [part for file in sorted(indices + files) for part in _from_file(file, ema)]


def native(path: Path) -> list[PartSource]:
    """The parts of a native folder."""
    settings = read_stored_settings(path)
    parts = []
    for part in checkpoint.PARTS:
        files = checkpoint.part_files(path, part)
        if files:
            tensors = (
                {name: t for f in files for name, t in _open(f).items()}
                if len(files) > 1
                else _open(files[0])
            )
            origin = checkpoint.read_origin(path)
            parts.append(PartSource(part, "native", Widened(tensors), tuple(files), settings, origin=origin))
    return parts


def from_diffusers(path: Path, *, variant: str | None, compat: str | None) -> list[PartSource]:
    return _of_folder(diffusers_layout.read_folder(path, variant=variant), compat)


def _of_folder(folder: diffusers_layout.Folder, compat: str | None) -> list[PartSource]:
    settings, notes = diffusers_layout.settings_from_folder(folder, compat=compat)
    parts = []
    for name, held in folder.parts.items():
        found = recognise(held.tensors)
        if not found:
            raise ValueError(
                f"{held.path} holds nothing known; it should be the {name} of a diffusers folder"
            )
        extra = {"folded": held.folded} if name == "unet" else {}
        one = found[0]
        parts.append(
            PartSource(
                one.part, one.layout, one.tensors, (held.path, *held.shards), settings, tuple(notes), extra
            )
        )
    return parts


def from_component(path: Path, *, variant: str | None, compat: str | None) -> list[PartSource]:
    """One model of diffusers or transformers in a folder of its own, read as in a whole folder."""
    card = diffusers_layout.read_json(path / "config.json")
    file = diffusers_layout.find_weights(path, variant)
    opened = diffusers_layout.open_part("", file, card)
    found = recognise(opened.tensors)
    if not found:
        raise ValueError(f"{path} holds nothing known")
    parts = []
    for f in found:
        if f.layout != "diffusers":
            # What a CLIP tower is takes both towers' configs; `convert` puts them together.
            parts.append(PartSource(f.part, f.layout, f.tensors, (file, *opened.shards), card=card))
            continue
        held = diffusers_layout.open_part(f.part, file, card)
        folder = diffusers_layout.Folder(path, {f.part: held}, {f.part: card})
        parts += _of_folder(folder, compat)
    return parts


def _open(path: Path) -> Mapping[str, Tensor]:
    return readers.open_file(path).tensors


def _unused(part: PartSource, here: list[PartSource], spatial_init: bool) -> bool:
    """A Stable Diffusion UNet is an initialisation, not a video model: taken only when asked for."""
    return part.layout == "sd" and not spatial_init
