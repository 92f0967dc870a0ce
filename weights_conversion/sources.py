"""What a user names on the command line -> the parts found there, still unread."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from i2vgen.files import checkpoint
from i2vgen.settings.config import SETTINGS_FILE
from i2vgen.settings.merge import first_line, read_stored_settings
from weights_conversion import diffusers_layout, readers
from weights_conversion.recognise import WORDS, Found, recognise

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


def gather(
    names: Sequence[str | Path],
    *,
    variant: str | None = None,
    compat: str | None = None,
    spatial_init: bool = False,
) -> list[PartSource]:
    """All parts in all sources. ValueError if a source holds nothing known, or two hold the same part."""
    if not names:
        raise ValueError("no source given; name checkpoint files, folders, or hf:OWNER/NAME[@REVISION]")
    parts: list[PartSource] = []
    for name in names:
        here = _from_source(str(name), variant, compat)
        here = [p for p in here if not _unused(p, here, spatial_init)]
        if not here:
            raise ValueError(
                f"{name} holds no part that is used here (a Stable Diffusion UNet needs --spatial-init)"
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


def _from_source(name: str, variant: str | None, compat: str | None) -> list[PartSource]:
    if name.startswith("hf:"):
        path, commit = download(name)
        note = f"downloaded as {name}, revision {commit}"
        return [_with_note(part, note) for part in _from_source(str(path), variant, compat)]
    path = Path(name)
    if not path.exists():
        raise ValueError(f"source {path} does not exist")
    if path.is_dir():
        return _from_folder(path, variant, compat)
    file = readers.open_sharded(path) if path.name.endswith(".index.json") else readers.open_file(path)
    found = recognise(file.tensors)
    if not found:
        some = ", ".join(list(file.tensors)[:4])
        raise ValueError(
            f"{path} holds {len(file.tensors)} tensors, but nothing known (its names: {some}, ...)"
        )
    return [_part(f, (path,), extra=file.extra) for f in found]


def _from_folder(path: Path, variant: str | None, compat: str | None) -> list[PartSource]:
    if (path / SETTINGS_FILE).is_file():
        return native(path)
    if diffusers_layout.is_folder(path):
        return from_diffusers(path, variant=variant, compat=compat)
    if (path / "config.json").is_file():
        return from_component(path, variant=variant, compat=compat)
    files = [
        f for f in sorted(path.iterdir()) if f.suffix in (".pth", ".pt", ".bin", ".ckpt", ".safetensors")
    ]
    if not files:
        raise ValueError(f"{path} is neither a native nor a diffusers folder and holds no checkpoint files")
    return [part for file in files for part in _from_source(str(file), variant, compat)]


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
            parts.append(PartSource(part, "native", tensors, tuple(files), settings))
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
        parts.append(_part(found[0], (held.path,), settings=settings, notes=tuple(notes), extra=extra))
    return parts


def from_component(path: Path, *, variant: str | None, compat: str | None) -> list[PartSource]:
    """One model of diffusers or transformers in a folder of its own, read as in a whole folder."""
    card = diffusers_layout.read_json(path / "config.json")
    file = diffusers_layout.find_weights(path, variant)
    found = recognise(diffusers_layout.open_part("", file, card).tensors)
    if not found:
        raise ValueError(f"{path} holds nothing known")
    parts = []
    for f in found:
        if f.layout != "diffusers":
            # What a CLIP tower is takes both towers' configs; `convert` puts them together.
            parts.append(PartSource(f.part, f.layout, f.tensors, (file,), card=card))
            continue
        held = diffusers_layout.open_part(f.part, file, card)
        folder = diffusers_layout.Folder(path, {f.part: held}, {f.part: card})
        parts += _of_folder(folder, compat)
    return parts


def _open(path: Path) -> Mapping[str, Tensor]:
    return readers.open_file(path).tensors


def _part(
    found: Found,
    files: tuple[Path, ...],
    *,
    settings: Mapping[str, Any] | None = None,
    notes: tuple[str, ...] = (),
    extra: Mapping[str, Any] | None = None,
) -> PartSource:
    return PartSource(found.part, found.layout, found.tensors, files, settings or {}, notes, extra or {})


def _with_note(part: PartSource, note: str) -> PartSource:
    return dataclasses.replace(part, notes=(*part.notes, note))


def _unused(part: PartSource, here: list[PartSource], spatial_init: bool) -> bool:
    """A Stable Diffusion UNet is an initialisation, not a video model: taken only when asked for."""
    return part.layout == "sd" and not spatial_init
