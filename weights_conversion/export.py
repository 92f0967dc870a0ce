"""Exports a native folder to the official files or a diffusers folder: the exact inverse of `convert`."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from i2vgen.files import checkpoint, whole
from i2vgen.settings import config, merge
from weights_conversion import clip as clip_tables
from weights_conversion import diffusers_configs, diffusers_layout, rules, sources, unet_vgen
from weights_conversion import vae as vae_tables

LAYOUTS = ("vgen", "diffusers")
SHARE_NATIVE = "share the native folder itself, which `i2vgen generate weights=FOLDER` reads"
UNET_FILE = "i2vgen_xl_{step:08d}.pth"
CLIP_FILE = "open_clip_pytorch_model.bin"
VAE_FILE = "v2-1_512-ema-pruned.ckpt"
RELEASED_STEP = 854500  # written if the origin of the weights names no step


def export(
    native: str | Path,
    out: str | Path,
    *,
    layout: str,
    fold: bool = True,
    dtype: torch.dtype | None = None,
    shard_bytes: int | None = None,
    on_bytes: Callable[[int, int], None] | None = None,
) -> list[str]:
    """Write a native folder to `out` in another layout -> notes for the user. On failure, writes nothing.

    `fold` (diffusers only) multiplies the columns of conv_in for the concat branch by the concat gain, so
    that diffusers' network computes what the official one does; this is exact for the official gain 2.0.
    ValueError if the folder lacks a part that the layout needs, or if the layout cannot express its settings.
    """
    native, out = Path(native), Path(out)
    if layout not in LAYOUTS:
        raise ValueError(f"there is no layout {layout!r}; choose from {', '.join(LAYOUTS)}")
    if out.exists() and (out.is_file() or any(out.iterdir())):
        raise ValueError(f"{out} exists and is not empty; choose a new folder")
    parts = {p.part: p.tensors for p in sources.native(native)}
    if not parts:
        raise ValueError(f"{native} holds no part to export")
    cfg = merge.from_dict(merge.read_stored_settings(native))
    if layout == "diffusers":
        total = sum(t.numel() * (dtype or t.dtype).itemsize for held in parts.values() for t in held.values())
        tick = None if on_bytes is None else checkpoint.counter(total, on_bytes)
        try:
            return diffusers_layout.write_folder(
                cfg, parts, out, fold=fold, dtype=dtype, shard_bytes=shard_bytes, on_bytes=tick
            )
        except diffusers_configs.Unlike as error:
            raise ValueError(f"{error}; {SHARE_NATIVE}") from error
    if not fold:
        raise ValueError("--no-fold needs --layout diffusers; the official layout never folds")
    if shard_bytes is not None:
        raise ValueError("--shard-size needs --layout diffusers; official checkpoints are one file per part")
    with whole.replacing_folder(out, sync=True) as temporary:
        record = {"format": config.FORMAT, "settings": merge.read_stored_settings(native)}
        return _write_vgen(cfg, parts, temporary, record, checkpoint.read_origin(native), dtype, on_bytes)


def _write_vgen(
    cfg: config.Config,
    parts: Mapping[str, Mapping[str, Tensor]],
    folder: Path,
    record: Mapping[str, Any],
    origin: Mapping[str, Any],
    dtype: torch.dtype | None,
    on_bytes: Callable[[int, int], None] | None,
) -> list[str]:
    if "unet" in parts:
        _refuse_own_parts(cfg.use)
    total = sum(t.numel() * (dtype or t.dtype).itemsize for held in parts.values() for t in held.values())
    tick = checkpoint.counter(total, on_bytes)
    steps = [extra["step"] for extra in origin.get("extra", {}).values() if "step" in extra]
    step = int(steps[0]) if steps else RELEASED_STEP
    # Beside the tensors, where official code does not look: what shapes do not show, for the way back.
    beside = {sources.RECORD: json.dumps({**record, "origin": origin})}
    notes = []
    if "unet" in parts:
        state = _theirs(unet_vgen.rows(cfg.unet, cfg.use), parts["unet"], "", dtype)
        _save({"state_dict": state, "step": step} | beside, folder / UNET_FILE.format(step=step), tick)
        if cfg.use.concat and cfg.use.concat_gain != 2.0:
            notes.append(
                f"use.concat_gain is {cfg.use.concat_gain}, but the official code always adds the branch "
                "twice (2.0)"
            )
    if "vae" in parts:
        state = _theirs(vae_tables.rows(cfg.vae), parts["vae"], vae_tables.PREFIX, dtype)
        _save({"state_dict": state} | beside, folder / VAE_FILE, tick)
    if "clip" in parts:
        same = [rules.Row(name, (name,)) for name in parts["clip"]]
        state = _theirs(same, parts["clip"], "", dtype)
        shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
        plain = clip_tables.shows_its_settings(cfg.clip, shapes)  # as official files are
        _save(state if plain else {"state_dict": state} | beside, folder / CLIP_FILE, tick)
    return notes


def _refuse_own_parts(use: config.Use) -> None:
    """ValueError if the UNet has a part that the official one has no place for."""
    plain = config.Use()
    for name in ("frame_positions", "output"):
        if (value := getattr(use, name)) != getattr(plain, name):
            raise ValueError(
                f"use.{name} is {str(value).lower()}, a part of this project's own that the official UNet "
                f"lacks; {SHARE_NATIVE}"
            )


def _theirs(
    rows: list[rules.Row], ours: Mapping[str, Tensor], prefix: str, dtype: torch.dtype | None
) -> dict[str, Tensor]:
    missing = sorted({name for row in rows for name in row.ours} - set(ours))
    unknown = sorted(set(ours) - {name for row in rows for name in row.ours})
    if missing or unknown:
        raise ValueError(
            f"the folder's tensors do not fit its settings: {len(missing)} missing, {len(unknown)} unknown, "
            f"e.g. {(missing + unknown)[0]}"
        )
    state = {}
    for row in rows:
        tensor = row.to_theirs(ours)
        state[prefix + row.theirs] = _own_storage(tensor if dtype is None else tensor.to(dtype))
    return state


def _own_storage(tensor: Tensor) -> Tensor:
    """A view with its own storage, without reading the data, because torch.save writes whole storages."""
    tensor = tensor.detach().contiguous()
    start = tensor.storage_offset() * tensor.element_size()
    end = start + tensor.numel() * tensor.element_size()
    piece = tensor.untyped_storage()[start:end]
    return torch.empty(0, dtype=tensor.dtype).set_(piece, 0, tensor.shape, tensor.stride())


def _save(content: Mapping[str, Any], path: Path, tick: Callable[[int], None]) -> None:
    """ValueError from torch about its writer, such as on a full disk, becomes the OSError that caused it."""
    with path.open("wb") as file:
        counted = _Counted(file, tick)
        try:
            torch.save(content, counted)
        except RuntimeError:
            if counted.error is None:
                raise
            raise OSError(counted.error.errno, counted.error.strerror, str(path)) from counted.error


class _Counted:
    """A file that reports the bytes written to it; torch.save needs only these two methods."""

    def __init__(self, file: IO[bytes], tick: Callable[[int], None]):
        self.file, self.tick = file, tick
        self.error: OSError | None = None

    def write(self, data) -> int:
        try:
            written = self.file.write(data)
        except OSError as error:
            self.error = error
            raise
        self.tick(written)
        return written

    def flush(self) -> None:
        self.file.flush()
