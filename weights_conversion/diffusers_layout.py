"""Reads and writes the folder layout of diffusers' `I2VGenXLPipeline`.

Reading: `read_folder` finds the weights and configs, and `settings_from_folder` turns the configs into our
settings. Two values in the published folder differ from training: the VAE's scale (0.18125 instead of
0.18215) and the text padding (49407 instead of 0). The default is the trained values, `compat="diffusers"`
uses the folder's; a note reports each choice.

Writing: `write_folder` makes a folder that the pipeline loads without a network connection. diffusers adds
the concat branch once, so the branch's columns of the first convolution are multiplied by `use.concat_gain`.
unet/config.json records this (RECORD), and `read_folder` undoes it, so a round trip is the identity.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from i2vgen.files import checkpoint, whole
from i2vgen.files.safefile import Entry, write_safetensors
from i2vgen.settings import config
from weights_conversion import clip as clip_tables
from weights_conversion import readers, unet_diffusers
from weights_conversion import vae as vae_tables
from weights_conversion.diffusers_configs import (
    END,
    END_TOKEN,
    PAD,
    TRAINED_SCALE,
    WRITTEN_FOR,
    Json,
    feature_extractor_config,
    schedule_settings,
    scheduler_config,
    unet_config,
    unet_settings,
    vae_config,
    vae_settings,
    write_tokenizer,
)
from weights_conversion.rules import Row

Compat = Literal["diffusers"]

# folder -> (library, class, file with the settings, stem of the weights)
COMPONENTS = {
    "unet": ("diffusers", "I2VGenXLUNet", "config.json", "diffusion_pytorch_model"),
    "vae": ("diffusers", "AutoencoderKL", "config.json", "diffusion_pytorch_model"),
    "text_encoder": ("transformers", "CLIPTextModel", "config.json", "model"),
    "image_encoder": ("transformers", "CLIPVisionModelWithProjection", "config.json", "model"),
    "scheduler": ("diffusers", "DDIMScheduler", "scheduler_config.json", None),
    "feature_extractor": ("transformers", "CLIPImageProcessor", "preprocessor_config.json", None),
    "tokenizer": ("transformers", "CLIPTokenizer", "tokenizer_config.json", None),
}
MODELS = tuple(name for name, component in COMPONENTS.items() if component[3])
STEMS = (
    "diffusion_pytorch_model",
    "model",
    "pytorch_model",
)  # the last is for older copies of the CLIP towers
ENDINGS = ("safetensors", "bin")  # in order of preference
INDEX = "model_index.json"

# Our entry in unet/config.json: use.concat_gain, and the factor on conv_in's concat columns. diffusers keeps
# it when it saves the folder again (and warns about an unknown entry when loading).
RECORD = "i2vgen"
TRAINED_GAIN = 2.0
CONV_IN = "conv_in.weight"
MISTYPED_SCALE = 0.18125  # in the published VAE config, instead of TRAINED_SCALE

# ------------------------------------------------------------------------------------ files, reading


@dataclass(frozen=True)
class PartFiles:
    """The weights of one model of a folder, read on access, under the names of current library versions."""

    path: Path  # the file, or the index of several
    tensors: Mapping[str, Tensor]
    folded: float = 1.0  # factor on conv_in's concat columns in the file; `tensors` have it undone
    gain: float | None = None  # use.concat_gain, if we wrote the file
    shards: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Folder:
    """A diffusers folder as found on disk."""

    path: Path
    parts: dict[str, PartFiles]  # by folder name, the existing ones of MODELS
    configs: dict[str, Json]  # by folder name, the existing ones of COMPONENTS


class _Changed(Mapping):
    """Tensors under other names, with the factor folded into conv_in's concat columns undone."""

    def __init__(self, tensors: Mapping[str, Tensor], names: Mapping[str, str], folded: float = 1.0):
        self.tensors, self.names, self.folded = tensors, names, folded

    def __getitem__(self, name: str) -> Tensor:
        tensor = self.tensors[self.names[name]]
        return scale_concat(tensor, 1 / self.folded) if name == CONV_IN and self.folded != 1 else tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def is_folder(path: str | Path) -> bool:
    """Whether this looks like a diffusers folder, complete or not."""
    path = Path(path)
    return (path / INDEX).is_file() or any((path / name / "config.json").is_file() for name in MODELS)


def read_folder(path: str | Path, *, variant: str | None = None) -> Folder:
    """Find weights and configs. Parts may be missing; ValueError if a part lacks its config or weights."""
    path = Path(path)
    if not is_folder(path):
        raise ValueError(
            f"{path} is not a diffusers folder; it should hold {INDEX} or one of "
            f"{', '.join(f'{name}/config.json' for name in MODELS)}"
        )
    configs = {
        name: read_json(path / name / component[2])
        for name, component in COMPONENTS.items()
        if (path / name / component[2]).is_file()
    }
    if "tokenizer" in configs and (path / "tokenizer" / "special_tokens_map.json").is_file():
        tokens = read_json(path / "tokenizer" / "special_tokens_map.json")
        configs["tokenizer"] = {
            **configs["tokenizer"],
            **tokens,
        }  # as in transformers, this file takes precedence
    parts = {}
    for name in MODELS:
        if not (path / name).is_dir():
            continue
        if name not in configs:
            raise ValueError(f"{path / name} lacks its config.json; download it too")
        parts[name] = open_part(name, find_weights(path / name, variant), configs[name])
    return Folder(path, parts, configs)


def find_weights(folder: Path, variant: str | None = None) -> Path:
    """The weights file of a component's folder, or the index of its shards."""
    infix = f".{variant}" if variant else ""
    for ending in ENDINGS:
        for stem in STEMS:
            for name in (f"{stem}{infix}.{ending}", f"{stem}.{ending}.index{infix}.json"):
                if (folder / name).is_file():
                    return folder / name
    if gone := [file for file in folder.iterdir() if file.is_symlink() and not file.exists()]:
        raise ValueError(f"{gone[0]} is a link to a file that is not there; download it again")
    found = {_variant(file.name) for file in folder.iterdir()} - {None}
    if not found:
        raise ValueError(f"{folder} holds no weights; it should hold {' or '.join(STEMS)}.safetensors")
    wanted = f"of the variant {variant}" if variant else "without a variant"
    others = sorted(found - {""})
    raise ValueError(
        f"{folder} has no weights {wanted}; "
        + (f"give one of variant={', '.join(others)} (--variant)" if others else "leave the variant out")
    )


def _variant(name: str) -> str | None:
    """`model.fp16.safetensors` -> fp16, `model.safetensors` -> "", anything else -> None"""
    for ending in ENDINGS:
        for stem in STEMS:
            if name.startswith(f"{stem}.{ending}.index"):
                return name.removeprefix(f"{stem}.{ending}.index").removesuffix("json").strip(".")
            if name.startswith(f"{stem}.") and name.endswith(f".{ending}") and "-of-" not in name:
                return name.removeprefix(stem).removesuffix(ending).strip(".")
    return None


def open_part(name: str, path: Path, settings: Mapping[str, Any]) -> PartFiles:
    """Open a file or index as the part `name`, with old names updated and a folded gain undone."""
    file = readers.open_sharded(path) if path.name.endswith(".json") else readers.open_file(path)
    shards = tuple(part.path for part in file.parts)
    if name == "vae":
        names = {_vae_name(old): old for old in file.tensors}
        return PartFiles(path, _Changed(file.tensors, names), shards=shards)
    if name == "unet":
        folded, gain = _gains(path, settings)
        tensors = _Changed(file.tensors, {n: n for n in file.tensors}, folded)
        return PartFiles(path, tensors, folded, gain, shards)
    return PartFiles(path, file.tensors, shards=shards)


OLD_VAE_NAMES = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}


def _vae_name(name: str) -> str:
    """Early copies use other names for the parts of the middle attention."""
    if ".attentions." in name:
        for old, new in OLD_VAE_NAMES.items():
            name = name.replace(old, new)
    return name


def _gains(path: Path, unet: Mapping[str, Any]) -> tuple[float, float | None]:
    """-> the factor folded into the file, and use.concat_gain if we wrote the folder."""
    if RECORD not in unet:
        return 1.0, None
    record = unet[RECORD] if isinstance(unet[RECORD], dict) else {}
    gain, folded = record.get("concat_gain"), record.get("folded")
    if (
        not all(type(number) in (int, float) and math.isfinite(number) for number in (gain, folded))
        or not folded
    ):
        raise ValueError(
            f"{path.parent}/config.json has {RECORD} = {unet[RECORD]}; "
            "expected the numbers concat_gain and folded"
        )
    return float(folded), float(gain)


def read_json(path: Path) -> Json:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not readable JSON ({error}); download it again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, expected an object of settings")
    return content


# --------------------------------------------------------------------------------- settings, reading

COMPAT_NOTES = (
    "diffusers compatibility: the negative prompt is empty unless given (negative_prompt=)",
    "diffusers compatibility: preprocess.crop=official, save.rounding=nearest",
    "not supported: diffusers draws the posterior noise from the global generator and the latents from "
    "`generator`; pass the same noise to compare",
    "not supported: in float16, diffusers also keeps latents, VAE and CLIP in float16",
)


def settings_from_folder(folder: Folder, *, compat: str | None = None) -> tuple[Json, list[str]]:
    """-> our settings (a nested dict over our defaults), and notes on choices and unsupported settings.

    The default is the trained values; `compat="diffusers"` makes our pipeline compute what diffusers' does
    with this folder. ValueError for configs that our model cannot express.
    """
    if compat not in (None, "diffusers"):
        raise ValueError(f"compat is {compat!r}; give diffusers, or leave it out for the trained values")
    settings: Json = {}
    notes: list[str] = []
    if "unet" in folder.parts:
        settings["unet"] = unet_settings(folder.configs["unet"])
        use, said = _use_settings(folder.parts["unet"], compat)
        settings["use"] = use
        notes += said
    if "vae" in folder.parts:
        settings["vae"], said = _vae_settings_and_notes(folder.configs["vae"], compat)
        notes += said
    if {"text_encoder", "image_encoder"} <= folder.parts.keys():
        settings["clip"] = _clip_settings(folder.configs)
    if "scheduler" in folder.configs:
        settings["schedule"], said = schedule_settings(folder.configs["scheduler"])
        notes += said
        settings["sample"], said = _sample_settings(folder.configs["scheduler"], compat)
        notes += said
    pad, note = _padding(folder.configs.get("tokenizer"), compat)
    if pad is not None and "clip" in settings:
        settings["clip"]["pad_token"] = pad
    notes += [note] if note else []
    if compat:
        settings["negative_prompt"] = ""
        settings["preprocess"] = {"crop": "official"}
        settings["save"] = {"rounding": "nearest"}
        notes += COMPAT_NOTES
    return settings, notes


def _use_settings(unet: PartFiles, compat: str | None) -> tuple[Json, list[str]]:
    if compat:
        use = {"concat_gain": unet.folded, "sinusoid": "exp", "frame_planes": "network"}
        said = "use.sinusoid=exp, use.frame_planes=network"
        return use, [
            f"diffusers compatibility: use.concat_gain={unet.folded}, as its network computes, {said}"
        ]
    if unet.gain is not None:
        how = (
            f"the factor {unet.folded} folded into {CONV_IN} is undone"
            if unet.folded != 1
            else "nothing is folded"
        )
        return {"concat_gain": unet.gain}, [f"use.concat_gain={unet.gain} as unet/config.json says; {how}"]
    note = f"use.concat_gain={TRAINED_GAIN}: the concat branch is added twice, as in training, not once"
    return {"concat_gain": TRAINED_GAIN}, [note]


def _vae_settings_and_notes(vae: Mapping[str, Any], compat: str | None) -> tuple[Json, list[str]]:
    settings = vae_settings(vae)
    if settings["scale"] != MISTYPED_SCALE:
        return settings, []
    if compat:
        return settings, [f"diffusers compatibility: vae.scale={MISTYPED_SCALE} from the folder's config"]
    settings["scale"] = TRAINED_SCALE
    return settings, [
        f"the folder's VAE config says {MISTYPED_SCALE}, a known typo; using vae.scale={TRAINED_SCALE}, with "
        "which the model was trained (compat=diffusers keeps the folder's)"
    ]


def _clip_settings(configs: Mapping[str, Json]) -> Json:
    clip = clip_tables.settings_from_transformers(configs["text_encoder"], configs["image_encoder"])
    settings = dataclasses.asdict(clip)
    extractor = configs.get("feature_extractor", {})
    for name in ("image_mean", "image_std"):
        settings[name] = list(extractor.get(name, settings[name]))
    crop = extractor.get("crop_size", clip.image_size)
    size = crop.get("height") if isinstance(crop, dict) else crop
    if size != clip.image_size:
        raise ValueError(f"the feature extractor crops to {crop}; the image encoder reads {clip.image_size}")
    return settings


def _sample_settings(scheduler: Mapping[str, Any], compat: str | None) -> tuple[Json, list[str]]:
    if not compat:
        return {}, []
    spacing = scheduler.get("timestep_spacing", "leading")
    one = scheduler.get("set_alpha_to_one", True)
    settings = {"spacing": spacing, "final_alpha": "one" if one else "first"}
    alpha, offset = settings["final_alpha"], scheduler.get("steps_offset", 0)
    notes = [f"diffusers compatibility: sample.spacing={spacing}, sample.final_alpha={alpha}"]
    if spacing == "leading" and offset != 1:
        notes.append(f"not supported: steps_offset {offset}; our leading spacing uses 1")
    return settings, notes


def _padding(tokenizer: Mapping[str, Any] | None, compat: str | None) -> tuple[int | None, str | None]:
    """-> the padding token id if it differs from our default, and a note."""
    if tokenizer is None:
        return None, None
    pad = tokenizer.get("pad_token", END)
    pad = pad.get("content") if isinstance(pad, dict) else pad
    if pad == PAD:
        return None, None
    if compat and pad == END:
        return (
            END_TOKEN,
            f"diffusers compatibility: clip.pad_token={END_TOKEN}, as the folder's tokenizer pads",
        )
    if compat:
        return None, f"not supported: the folder's tokenizer pads with {pad}; we pad with token 0"
    return None, f"the folder's tokenizer pads with {pad}; using token 0, as in training"


def build_unet(unet: config.UNet) -> nn.Module:
    """diffusers' network on `meta`, for comparisons; the only function here that imports diffusers."""
    try:
        from diffusers import I2VGenXLUNet
    except ImportError as error:
        raise ValueError("diffusers is not installed; to compare with it: pip install diffusers") from error
    with torch.device("meta"):
        return I2VGenXLUNet.from_config(unet_config(unet)).eval()


# ------------------------------------------------------------------------------------ files, writing


def write_folder(
    cfg: config.Config,
    parts: Mapping[str, Mapping[str, Tensor]],
    out: str | Path,
    *,
    fold: bool = True,
    dtype: torch.dtype | None = None,
    variant: str | None = None,
    shard_bytes: int | None = None,
    on_bytes: Callable[[int], None] | None = None,
) -> list[str]:
    """Write native parts (unet, vae, clip) as a folder for `I2VGenXLPipeline.from_pretrained` -> notes.

    `out` must be new or empty; on failure, nothing is written. `fold` multiplies conv_in's concat columns by
    `use.concat_gain`, so that diffusers' network computes what ours does; ValueError if that is not exact.
    `dtype` None keeps the dtype of each tensor. If `parts` are read lazily, memory stays at about one tensor.
    """
    out = Path(out)
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise ValueError(f"{out} exists and is not empty; choose a new folder")
    if missing := [part for part in checkpoint.PARTS if part not in parts]:
        raise ValueError(f"a diffusers folder needs every part; {', '.join(missing)} is missing")
    if variant is not None and not variant.isalnum():
        raise ValueError(f"variant is {variant!r}; give letters and digits only, such as fp16")
    configs = _configs(cfg, dtype)  # checks the settings before anything is written
    for part in checkpoint.PARTS:
        _check_fit(part, cfg, parts[part])
    entries = {name: _cast(_entries(name, cfg, parts), dtype) for name in MODELS}
    gain = cfg.use.concat_gain if fold else 1.0
    if gain != 1:
        entries["unet"] = [_fold(entry, gain) for entry in entries["unet"]]
    configs["unet"][RECORD] = {"concat_gain": cfg.use.concat_gain, "folded": gain}

    with whole.replacing_folder(out, sync=True) as temporary:
        for name, (_, _, file, stem) in COMPONENTS.items():
            (temporary / name).mkdir()
            if name == "tokenizer":
                write_tokenizer(temporary / name, cfg.clip)
                continue
            whole.write_json(temporary / name / file, configs[name])
            if stem is not None:
                _write_weights(temporary / name, stem, entries[name], variant, shard_bytes, on_bytes)
        whole.write_json(temporary / INDEX, _index())
    return _written_notes(cfg, fold)


def _configs(cfg: config.Config, dtype: torch.dtype | None) -> dict[str, Json]:
    text, image = clip_tables.transformers_configs(cfg.clip)
    if dtype is not None:
        text["torch_dtype"] = image["torch_dtype"] = str(dtype).removeprefix("torch.")
    return {
        "unet": unet_config(cfg.unet, cfg.use),
        "vae": vae_config(cfg.vae),
        "text_encoder": text,
        "image_encoder": image,
        "scheduler": scheduler_config(cfg.schedule, cfg.sample),
        "feature_extractor": feature_extractor_config(cfg.clip),
    }


def _index() -> Json:
    models = {name: [library, cls] for name, (library, cls, _, _) in sorted(COMPONENTS.items())}
    return {"_class_name": "I2VGenXLPipeline", "_diffusers_version": WRITTEN_FOR, **models}


NATIVE = {"unet": "unet", "vae": "vae", "text_encoder": "clip", "image_encoder": "clip"}


def _entries(name: str, cfg: config.Config, parts: Mapping[str, Mapping[str, Tensor]]) -> list[Entry]:
    """The tensors of one of their models, each read from our part when it is written."""
    part = NATIVE[name]
    ours = parts[part]
    entries = []
    if part == "clip":
        table = clip_tables.text_rows if name == "text_encoder" else clip_tables.vision_rows
        for row in table(cfg.clip):
            for theirs, tensor in row.to_ours(ours[row.theirs]).items():
                read = partial(_exported, row, ours, theirs)
                entries.append(Entry(theirs, tuple(tensor.shape), tensor.dtype, read))
        return entries
    rows = unet_diffusers.rows(cfg.unet) if part == "unet" else vae_tables.diffusers_rows(cfg.vae)
    for row in rows:
        tensor = row.to_theirs(ours)
        read = partial(row.to_theirs, ours)
        entries.append(Entry(row.theirs, tuple(tensor.shape), tensor.dtype, read))
    return entries


def _exported(row: Row, ours: Mapping[str, Tensor], name: str) -> Tensor:
    return row.to_ours(ours[row.theirs])[
        name
    ]  # in CLIP's table, `theirs` are open_clip's names, which we use


def _check_fit(part: str, cfg: config.Config, ours: Mapping[str, Tensor]) -> None:
    wanted = checkpoint.inner(checkpoint.build(part, cfg)).state_dict()
    optional = set(clip_tables.ABSENT) if part == "clip" else set()
    missing, unknown = sorted(wanted.keys() - set(ours) - optional), sorted(set(ours) - wanted.keys())
    wrong = [name for name in ours if name in wanted and ours[name].shape != wanted[name].shape]
    if missing or unknown or wrong:
        raise ValueError(
            f"the {part}'s tensors do not fit its settings: {len(missing)} are missing, {len(unknown)} "
            f"unknown, {len(wrong)} of wrong shape, such as {(missing + unknown + wrong)[0]}"
        )


def _cast(entries: Sequence[Entry], dtype: torch.dtype | None) -> list[Entry]:
    if dtype is None:
        return list(entries)
    return [dataclasses.replace(e, dtype=dtype) if e.dtype.is_floating_point else e for e in entries]


def _fold(entry: Entry, gain: float) -> Entry:
    if entry.name != CONV_IN:
        return entry
    if gain == 0:
        raise ValueError("use.concat_gain is 0; folding it would erase weights, use fold=False (--no-fold)")
    plain = entry.read().to(entry.dtype)
    folded = scale_concat(plain, gain)
    if not torch.equal(scale_concat(folded, 1 / gain), plain):
        raise ValueError(
            f"use.concat_gain = {gain} cannot be folded into {CONV_IN} without rounding in {entry.dtype}; "
            "use fold=False (--no-fold)"
        )
    return dataclasses.replace(entry, read=lambda: folded)


def scale_concat(conv_in: Tensor, gain: float) -> Tensor:
    """Scale the second half of the input channels, which in diffusers always belongs to the concat branch."""
    picture = conv_in.shape[1] // 2
    return torch.cat([conv_in[:, :picture], conv_in[:, picture:] * gain], dim=1)


def _write_weights(
    folder: Path,
    stem: str,
    entries: Sequence[Entry],
    variant: str | None,
    shard_bytes: int | None,
    on_bytes: Callable[[int], None] | None,
) -> None:
    metadata = {"format": "pt"}  # transformers insists on it
    infix = f".{variant}" if variant else ""
    shards = checkpoint.shards(entries, shard_bytes)
    if len(shards) == 1:
        path = folder / f"{stem}{infix}.safetensors"
        write_safetensors(path, entries, metadata=metadata, on_bytes=on_bytes)
        return
    weight_map = {}
    for i, shard in enumerate(shards, start=1):
        name = f"{stem}{infix}-{i:05}-of-{len(shards):05}.safetensors"
        write_safetensors(folder / name, shard, metadata=metadata, on_bytes=on_bytes)
        weight_map.update({entry.name: name for entry in shard})
    index = {"metadata": {"total_size": sum(e.nbytes for e in entries)}, "weight_map": weight_map}
    whole.write_json(folder / f"{stem}.safetensors.index{infix}.json", index)


def _written_notes(cfg: config.Config, fold: bool) -> list[str]:
    gain = cfg.use.concat_gain
    notes = [
        f"{CONV_IN}: the concat columns were multiplied by use.concat_gain = {gain}, exactly, so that "
        "diffusers' network computes what ours does"
        if fold and gain != 1
        else f"{CONV_IN} is unchanged: diffusers adds the concat branch once, ours {gain} times",
        f"vae scaling_factor = {cfg.vae.scale}, the tokenizer pads with token 0, the last step ends at "
        f"{'1' if cfg.sample.final_alpha == 'one' else 'abar[0]'}",
        f"{' and '.join(clip_tables.ABSENT)} do not exist in transformers' CLIP towers and were left out; "
        "nothing here uses them",
        "to get the same video, use the same posterior noise and latents, a step count that divides "
        f"{cfg.schedule.num_timesteps}, an explicit negative prompt, and transformers < 5.6",
    ]
    if cfg.clip.text_layer == "last":
        notes.append("clip.text_layer is last: call the pipeline with clip_skip=None")
    return notes
