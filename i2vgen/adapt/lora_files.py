"""Files of low-rank adapters -> matrices by module, and back.

    folder with adapter_config.json, adapter_model.safetensors    peft's, which `write` writes too, with an
                                                                  origin.json as in a weights folder
    folder with pytorch_lora_weights.safetensors, or that file    diffusers'
    any other .safetensors file                                   kohya's names, or diffusers'

What an adapter adds depends on its settings as much as on its matrices, so every setting that is not known
to be harmless is refused by name. Pickles are not read.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from i2vgen.files import checkpoint, whole
from i2vgen.files.safefile import Entry, write_safetensors

WEIGHTS_FILE, SETTINGS_FILE = "adapter_model.safetensors", "adapter_config.json"
DIFFUSERS_FILE, DIFFUSERS_METADATA = "pytorch_lora_weights.safetensors", "lora_adapter_metadata"
PREFIX, DIFFUSERS_PREFIX = "base_model.model.", "unet."  # peft and diffusers put them before every path
KOHYA_PREFIX = "lora_unet_"  # before a path with _ for every dot

ENDINGS = {
    "lora_A.weight": "a", "lora_B.weight": "b",  # peft's, and diffusers'
    "lora.down.weight": "a", "lora.up.weight": "b",  # diffusers' earlier ones
    "lora_down.weight": "a", "lora_up.weight": "b", "alpha": "alpha",  # kohya's
}  # fmt: skip
NAME = re.compile(rf"(?P<path>.+)\.(?P<ending>{'|'.join(map(re.escape, ENDINGS))})")

# Settings of peft that are applied here, or that do not change what a trained adapter adds.
ACCEPTED = {
    "peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora",
    "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "lora_dropout",
    "fan_in_fan_out", "megatron_core", "loftq_config", "eva_config", "corda_config", "lora_ga_config",
    "qalora_group_size", "runtime_config", "ensure_weight_tying",
}  # fmt: skip
# Values under which the network's own weights and biases stay as they are.
BASE_UNCHANGED = {"bias": ["none"], "init_lora_weights": [True, False, "gaussian", "eva", "orthogonal"]}
LFS = b"version https://git-lfs"


class Matrices(NamedTuple):
    """What an adapter adds to one weight [o i ...]: alpha / r * B A."""

    a: Tensor  # [r i ...]
    b: Tensor  # [o r ...]
    alpha: float


def read(source: str | Path) -> dict[str, Matrices]:
    """A folder or file -> matrices by module, as the file names it without a library's prefix.

    ValueError for what is no adapter, is damaged, or does more than adding B A to weights.
    """
    file, settings = _find(Path(source))
    tensors, metadata = _tensors(file)
    prefix = PREFIX
    if settings is None:
        prefix = DIFFUSERS_PREFIX
        settings = _json(file, metadata.get(DIFFUSERS_METADATA, "{}"))
        settings = {name.removeprefix(prefix): value for name, value in settings.items()}
    _refuse_other_kinds(source, settings)
    held: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        match = NAME.fullmatch(name.removeprefix(prefix))
        if match is None or (settings and not match["ending"].startswith(("lora_A", "lora_B"))):
            raise ValueError(f"{source} holds {name}, which is no part of a plain LoRA")
        if not settings and name.startswith(PREFIX):
            raise ValueError(
                f"{source} is peft's: give its folder, with the {SETTINGS_FILE} that it came with"
            )
        whole = match["ending"] == "alpha" and not tensor.is_complex()  # kohya's may be a whole number
        if not (tensor.is_floating_point() or whole) or not tensor.float().isfinite().all():
            raise ValueError(f"{source} holds {name}, which is not made of finite numbers")
        held.setdefault(match["path"], {})[ENDINGS[match["ending"]]] = tensor
    return {path: _matrices(source, path, parts, settings) for path, parts in sorted(held.items())}


def _find(source: Path) -> tuple[Path, dict[str, Any] | None]:
    """-> the file with the matrices, and peft's settings if they stand beside it."""
    file = source
    if not source.exists():
        raise ValueError(f"adapter {source} does not exist; give its folder or .safetensors file")
    if source.is_dir():
        file = source / DIFFUSERS_FILE if (source / DIFFUSERS_FILE).is_file() else source / WEIGHTS_FILE
    elif source.is_file() and source.suffix != ".safetensors":
        raise ValueError(
            f"{source} is no .safetensors file; save the adapter in that format, or give its folder"
        )
    beside = file.with_name(SETTINGS_FILE)
    wanted = [beside, file] if file.name == WEIGHTS_FILE else [file]
    if lacking := next((path for path in wanted if not path.is_file()), None):
        inside = sorted(path.parent.name for path in source.glob(f"*/{SETTINGS_FILE}"))
        also = f"; its subfolders {', '.join(inside)} are adapters" if inside else ""
        raise ValueError(
            f"{source} is no adapter: it lacks {lacking.name}; give a folder with {SETTINGS_FILE} and "
            f"{WEIGHTS_FILE}, or a .safetensors file{also}"
        )
    if len(wanted) == 1:
        return file, None
    settings = _json(beside, beside.read_text(encoding="utf-8-sig", errors="replace"))
    if settings.get("peft_type") != "LORA":
        raise ValueError(f"{source} holds no LoRA but {settings.get('peft_type')}, which is not read")
    return file, settings


def _json(file: Path, text: str) -> dict[str, Any]:
    try:
        settings = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"the adapter {file} is damaged: its settings are no JSON ({error})") from error
    if not isinstance(settings, dict):
        raise ValueError(f"the adapter {file} is damaged: its settings are a {type(settings).__name__}")
    return settings


def _tensors(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata() or {}
            return {name: opened.get_tensor(name) for name in opened.keys()}, metadata  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        with file.open("rb") as raw:
            pointer = raw.read(len(LFS)) == LFS
        why = "a Git LFS pointer; run `git lfs pull` in its repository" if pointer else error
        raise ValueError(f"the adapter {file} is damaged: {why}") from error


def _refuse_other_kinds(source: str | Path, settings: Mapping[str, Any]) -> None:
    """ValueError names the first setting under which an adapter is more than alpha / r * B A."""
    for name, value in settings.items():
        if name in BASE_UNCHANGED:
            if value not in BASE_UNCHANGED[name]:
                advice = ""
                if name == "init_lora_weights":
                    advice = (
                        "; peft converts it: save_pretrained(path_initial_model_for_weight_conversion=...)"
                    )
                raise ValueError(f"{source} changes the network's own weights: {name} is {value!r}{advice}")
        elif name not in ACCEPTED and value:
            raise ValueError(f"{source} is no plain LoRA: {name} is {value!r}, which is not supported")


def _matrices(
    source: str | Path, path: str, parts: Mapping[str, Tensor], settings: Mapping[str, Any]
) -> Matrices:
    if not {"a", "b"} <= parts.keys():
        raise ValueError(f"{source} lacks one of the two matrices of {path}")
    a, b = parts["a"], parts["b"]
    if min(a.ndim, b.ndim) < 2 or not (len(a) and len(b)) or len(a) != b[0].numel():
        raise ValueError(
            f"{source}: the matrices of {path} have shapes {tuple(a.shape)} and {tuple(b.shape)}"
        )
    if not settings:
        alpha = parts.get("alpha", torch.tensor(len(a)))  # without it diffusers and kohya divide by nothing
        if alpha.numel() != 1:
            raise ValueError(f"{source}: the alpha of {path} has shape {tuple(alpha.shape)}; give one number")
        return Matrices(a, b, alpha.item())
    rank = _of_module(source, settings, "rank_pattern", path, settings.get("r", len(a)))
    alpha = _of_module(source, settings, "alpha_pattern", path, settings.get("lora_alpha"))
    if rank != len(a):
        raise ValueError(f"{source}: its settings say rank {rank} for {path}, its matrices have {len(a)}")
    return Matrices(a, b, alpha * math.sqrt(rank) if settings.get("use_rslora") else alpha)


def _of_module(source: str | Path, settings: Mapping[str, Any], name: str, path: str, default: Any) -> float:
    """The value of the first regular expression that matches the end of the path, from a dot on."""
    patterns = settings.get(name) or {}
    if not isinstance(patterns, dict):
        raise ValueError(f"the adapter {source} is damaged: {name} is {patterns!r}")
    value = default
    for key in patterns:
        # re could try for hours where a group repeats, or where much does.
        if re.search(r"\)[*+{]", key) or sum(map(key.count, "*+{")) > 4:
            raise ValueError(f"{source}: {name} holds {key!r}; simpler regular expressions are read")
        try:
            matches = re.match(rf"(.*\.)?({key})$", path)
        except re.error as error:
            raise ValueError(f"{source}: {name} holds {key!r}, no regular expression ({error})") from error
        if matches:
            value = patterns[key]
            break
    if type(value) not in (int, float) or not math.isfinite(value):
        raise ValueError(
            f"the adapter {source} is damaged: the {name.partition('_')[0]} of {path} is {value!r}"
        )
    return value


def renamed(
    matrices: Mapping[str, Matrices], known: Mapping[str, str]
) -> tuple[dict[str, Matrices], list[str]]:
    """Matrices under the names that `known` gives to theirs, and the names that it lacks.

    A name may also be kohya's form of a known one: a prefix, and _ for every dot.
    """
    flat = {KOHYA_PREFIX + theirs.replace(".", "_"): ours for theirs, ours in known.items()}
    found = {known.get(name) or flat.get(name): held for name, held in matrices.items()}
    found.pop(None, None)
    return found, [name for name in matrices if name not in known and name not in flat]


def origin(source: str | Path) -> dict[str, Any]:
    """How a folder's adapter was made, as far as its origin.json says."""
    source = Path(source)
    if source.is_dir() or source.name == WEIGHTS_FILE:
        return checkpoint.read_origin(source if source.is_dir() else source.parent)
    return {}


def write(folder: str | Path, matrices: Mapping[str, Matrices], *, origin: Mapping | None = None) -> Path:
    """Files in peft's format: the matrices, float32, and what they are for. Each appears whole.

    `origin`, how they were made, stands beside them as it does in a weights folder.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if origin:
        whole.write_json(folder / checkpoint.ORIGIN_FILE, dict(origin), indent=1)
    else:
        (folder / checkpoint.ORIGIN_FILE).unlink(missing_ok=True)  # of the adapter that was here before
    entries = [
        Entry(f"{PREFIX}{path}.lora_{which}.weight", tuple(t.shape), torch.float32, t.contiguous)
        for path, held in matrices.items()
        for which, t in (("A", held.a), ("B", held.b))
    ]
    write_safetensors(folder / WEIGHTS_FILE, entries)
    ranks = {path: len(held.a) for path, held in matrices.items()}
    alphas = {path: held.alpha for path, held in matrices.items()}
    usual_rank, usual_alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    settings = {
        "peft_type": "LORA",
        "r": usual_rank,
        "rank_pattern": _except(usual_rank, ranks),
        "lora_alpha": usual_alpha,
        "alpha_pattern": _except(usual_alpha, alphas),
        "target_modules": list(ranks),
        "bias": "none",
    }
    whole.write_json(folder / SETTINGS_FILE, settings, indent=1)
    return folder


def _except(usual: float, values: Mapping[str, float]) -> dict[str, float]:
    """peft reads the keys as regular expressions for the end of a path; these match the whole one."""
    return {f"^{re.escape(path)}": value for path, value in values.items() if value != usual}
