"""Low-rank adapters for other layouts of the UNet: to our names, for `adapter=`, and to diffusers'."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from i2vgen.adapt import lora_files
from i2vgen.files import checkpoint, whole
from i2vgen.settings import config
from weights_conversion import diffusers_configs, diffusers_layout, readers, unet_diffusers, unet_vgen
from weights_conversion.rules import Row

ENDINGS = (".lora_A.weight", ".lora_down.weight", ".lora.down.weight")


def is_adapter(path: Path) -> bool:
    """Whether a folder or a .safetensors file is an adapter, as far as names say."""
    if path.is_dir():
        return any((path / name).is_file() for name in (lora_files.SETTINGS_FILE, lora_files.DIFFUSERS_FILE))
    return path.suffix == ".safetensors" and has_matrices(readers.open_file(path, check=False).tensors)


def has_matrices(names: Iterable[str]) -> bool:
    return any(name.endswith(ENDINGS) for name in names)


def convert(source: str | Path, out: str | Path, cfg: config.Config, *, dry_run: bool = False) -> str:
    """Write the adapter in peft's format -> a line for the report.

    Its modules may have diffusers' names, the official ones or ours. ValueError for those of another network.
    """
    out = Path(out)
    if out.is_file() or (
        out.is_dir() and any(out.iterdir()) and not (out / lora_files.SETTINGS_FILE).is_file()
    ):
        raise ValueError(f"{out} exists and is no adapter; choose another place")
    weights = checkpoint.build("unet", cfg).state_dict()
    matrices, foreign = lora_files.renamed(lora_files.read(source), _known(cfg, weights))
    if foreign:
        raise ValueError(
            f"{source} is an adapter for another network: the UNet has no {foreign[0]}, under any of its "
            f"names ({len(foreign)} modules are missing)"
        )
    fitting = {}
    for path, (a, b, alpha) in matrices.items():
        weight = weights[f"{path}.weight"]
        if a[0].numel() != weight[0].numel() or len(b) != len(weight):
            raise ValueError(
                f"{source} does not fit: its matrices for {path} have shapes {tuple(a.shape)} and "
                f"{tuple(b.shape)}, the weight is {tuple(weight.shape)}; give its UNet's settings: unet.*"
            )
        ones = [1] * (weight.ndim - 2)
        fitting[path] = lora_files.Matrices(
            a.reshape(len(a), *weight.shape[1:]), b.reshape(*b.shape[:2], *ones), alpha
        )
    if not dry_run:
        lora_files.write(out, fitting, origin=lora_files.origin(source))
    return f"low-rank adapters of {len(fitting)} modules, from {Path(source).name}"


def export(source: str | Path, out: str | Path, cfg: config.Config, *, fold: bool = True) -> list[str]:
    """Write an adapter of ours in peft's format under the names of diffusers' UNet -> notes for the user.

    `cfg` are the settings of the weights that it adapts. `fold` as in the export of those. ValueError for an
    adapter of another network, and for modules that diffusers has in another form.
    """
    try:
        diffusers_configs.unet_config(cfg.unet, cfg.use)
    except diffusers_configs.Unlike as error:
        raise ValueError(
            f"{source} is for {cfg.weights or 'the released model'}, which diffusers cannot build: {error}; "
            "share the adapter and its weights as they are"
        ) from error
    weights = checkpoint.build("unet", cfg).state_dict()
    rows = {row.ours[0]: row for row in unet_diffusers.rows(cfg.unet) if len(row.ours) == 1}
    notes, made = [], {}
    for path, (a, b, alpha) in lora_files.read(source).items():
        name, weight = f"{path}.weight", weights.get(f"{path}.weight")
        if weight is None or a[0].numel() != weight[0].numel() or len(b) != len(weight):
            raise ValueError(
                f"{source} does not fit {cfg.weights or 'the released model'}, whose {path} is not there or "
                "has another shape; name the folder that it was trained on with weights="
            )
        row = rows.get(name)
        if row is None or row.transpose:
            raise ValueError(f"{source}: diffusers' UNet has no layer of its own for {path}")
        if name == diffusers_layout.CONV_IN and fold and cfg.use.concat and cfg.use.concat_gain != 1:
            a = diffusers_layout.scale_concat(a.reshape(len(a), *weight.shape[1:]), cfg.use.concat_gain)
            notes.append(
                f"conv_in's columns for the concat branch are multiplied by {cfg.use.concat_gain:g}, as in "
                "exported weights"
            )
        theirs = row.to_theirs({name: weight}).shape
        a, b = a.reshape(len(a), *theirs[1:]), b.reshape(*b.shape[:2], *[1] * (len(theirs) - 2))
        made[row.theirs.removesuffix(".weight")] = lora_files.Matrices(a, b, alpha)
    with whole.replacing_folder(out) as temporary:
        lora_files.write(temporary, made)
    return notes


def _known(cfg: config.Config, weights: dict) -> dict[str, str]:
    """The modules with a weight, by every name that they have."""

    def of(rows: list[Row]) -> dict[str, str]:
        pairs = [(row.theirs, row.ours[0]) for row in rows if len(row.ours) == 1]
        return {theirs.removesuffix(".weight"): ours.removesuffix(".weight") for theirs, ours in pairs
                if ours in weights and ours.endswith(".weight")}  # fmt: skip

    own = [Row(name, (name,)) for name in weights]
    return of(unet_diffusers.rows(cfg.unet)) | of(unet_vgen.rows(cfg.unet, cfg.use)) | of(own)
