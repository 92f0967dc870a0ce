"""What people hand over from Python: pictures, prompts, seeds and noise in the usual types, and their hashes.

Everything that cannot be meant is a ValueError that says what to give, before any work.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import math
import operator
import os
import re
import types
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from i2vgen.diffusion.schedulers import FromDiffusers, from_diffusers
from i2vgen.files import images, records
from i2vgen.model.conditioning import Conditions, Encoded
from i2vgen.settings.config import Config
from i2vgen.settings.wording import counted

Picture = str | os.PathLike | Image.Image | np.ndarray | Tensor
DTYPES = ("float64", "float32", "bfloat16", "float16")  # of `runtime.dtype`
WEIGHTED = re.compile(r"\([^()]*:\s*\d+(\.\d+)?\)")  # (yellow:1.3), as other programs weight words
UNNAMED = "<picture>"  # in a record, a picture that came from memory


def paired(pictures: Any, prompts: Any, seeds: Any) -> tuple[list, list[str], list[int]]:
    """Lists of one length; a lone picture, prompt or seed serves all clips."""
    if pictures is None:
        raise ValueError("no picture is given; give a path, a PIL picture or an array [h w 3]")
    arrays = isinstance(pictures, np.ndarray | Tensor) and pictures.ndim > 3
    lone = [
        not (arrays or isinstance(pictures, list | tuple)),
        not isinstance(prompts, list | tuple),
        not isinstance(seeds, list | tuple | range) and np.ndim(seeds) == 0,
    ]
    lists = [
        [one] if alone else list(one) for one, alone in zip((pictures, prompts, seeds), lone, strict=True)
    ]
    counts = {len(one) for one, alone in zip(lists, lone, strict=True) if not alone} or {1}
    if len(counts) > 1 or 0 in counts:
        told = zip(map(len, lists), ("picture", "prompt", "seed"), strict=True)
        got = ", ".join(counted(n, what) for n, what in told)
        raise ValueError(f"got {got}; give as many of each, or a single one for all")
    lists = [one * max(counts) if alone else one for one, alone in zip(lists, lone, strict=True)]
    return lists[0], [prompt(one) for one in lists[1]], [seed(one) for one in lists[2]]


def picture(
    given: Picture, *, exif: Literal["apply", "ignore"] = "apply", alpha: Literal["white", "drop"] = "white"
) -> Image.Image:
    """A path, a PIL picture or an array -> PIL RGB picture; `exif`, `alpha` as in `images.open_picture`."""
    if isinstance(given, str | os.PathLike):
        return images.open_picture(os.path.expanduser(os.fsdecode(given)), exif=exif, alpha=alpha)
    if isinstance(given, np.ndarray | Tensor):
        given = from_array(given)
    if isinstance(given, Image.Image):
        try:  # of a file, PIL may have read no more than its first bytes
            return images.to_rgb(given, alpha=alpha, exif=exif)
        except images.UserMistake:
            raise
        except images.DAMAGED as error:
            raise ValueError(f"the picture is damaged or cut short ({error}); save it again") from error
    raise ValueError(
        f"the picture is {kind(given)}; give a path, a PIL picture or an array [h w 3], or a list of them"
    )


def from_array(given: np.ndarray | Tensor) -> Image.Image:
    """uint8, or floats 0..1, [h w 3], [h w 4] or [3 h w] -> PIL picture"""
    if isinstance(given, Tensor):
        given = given.detach().cpu()
        given = (given.float() if given.is_floating_point() else given).numpy()
    if given.ndim == 3 and given.shape[0] == 3 != given.shape[-1]:
        given = given.transpose(1, 2, 0)
    if given.ndim != 3 or given.shape[-1] not in (3, 4) or 0 in given.shape:
        raise ValueError(f"the picture has shape {tuple(given.shape)}; give [h w 3], none of them 0")
    if given.dtype.kind == "f":
        if not np.isfinite(given).all():
            raise ValueError("the picture has values that are NaN or infinite; give floats from 0 to 1")
        if not 0 <= given.min() <= given.max() <= 1:
            raise ValueError(
                f"the picture's floats run from {given.min():g} to {given.max():g}; give 0 to 1, "
                "(x + 1) / 2 for a picture in -1 to 1, or uint8 for 0 to 255"
            )
        given = np.rint(255 * given).astype(np.uint8)
    if given.dtype != np.uint8:
        raise ValueError(f"the picture is an array of {given.dtype}; give uint8, or floats from 0 to 1")
    return Image.fromarray(np.ascontiguousarray(given))


def prompt(given: Any) -> str:
    if not isinstance(given, str):
        raise ValueError(f"the prompt is {kind(given)}; give a text ('' for none), or a list of them")
    if WEIGHTED.search(given):
        warnings.warn(
            f"{WEIGHTED.search(given)[0]!r} is read as plain text: prompts know no weighting syntax "
            "(docs/python.md shows how to weight tokens)",
            stacklevel=3,
        )
    try:
        given.encode()
    except UnicodeEncodeError:
        raise ValueError(f"the prompt {given!r} is not valid Unicode; write it again") from None
    return given


def seed(given: Any) -> int:
    """Any kind of integer; its range is checked with the settings."""
    if isinstance(given, torch.Generator):
        raise ValueError(
            "the seed is a torch.Generator, whose state no record can name; give a number, for example "
            "seed=generator.initial_seed()"
        )
    try:
        if not isinstance(given, bool):
            return operator.index(given)
    except TypeError:
        pass
    raise ValueError(f"the seed is {kind(given)}; give an integer, 0 or more")


def whole_number(name: str, given: Any, default: int) -> int:
    """None stands for the default."""
    if given is None:
        return default
    if isinstance(given, bool) or not isinstance(given, int | np.integer) or given < 1:
        raise ValueError(f"{name} is {given!r}; give a whole number, at least 1")
    return int(given)


def number(name: str, given: Any) -> float:
    if isinstance(given, bool) or not isinstance(given, int | float | np.number):
        raise ValueError(f"{name} is {given!r}; give a number")
    return float(given)


def path(given: Any) -> Path:
    if not isinstance(given, str | os.PathLike) or not Path(given).name:
        what = "empty" if isinstance(given, str | os.PathLike) else kind(given)
        raise ValueError(f"the output is {what}; give the path of a file, such as outputs/clip.mp4")
    return Path(os.path.expanduser(given))


def listed(given: Any) -> bool:
    """Whether several of something are given, not one."""
    many = isinstance(given, np.ndarray | Tensor)
    return isinstance(given, list | tuple | range) or (many and given.ndim in (1, 4))


def spread(given: Any, default: str, count: int) -> list[str]:
    """Negative prompts: one for each clip, one for all, or none for that of the settings"""
    texts = list(given) if isinstance(given, list | tuple) else [default if given is None else given]
    if len(texts) not in (1, count):
        got = counted(len(texts), "negative prompt")
        raise ValueError(f"got {got} for {counted(count, 'clip')}; give one, or as many")
    return [prompt(one) for one in texts] * (count // len(texts))


def choice(name: str, given: Any, known: Sequence[str]) -> None:
    if given not in known:
        raise ValueError(f"there is no {name}={given!r}; choose {', '.join(known)}")


def sampler(given: Any) -> Callable | None:
    """A function with a sampler's signature, or a scheduler object of diffusers -> a function"""
    if given is None:
        return None
    if isinstance(given, type):
        raise ValueError(f"the sampler is the class {given.__name__}; give an object of it")
    if callable(getattr(given, "set_timesteps", None)) and callable(getattr(given, "step", None)):
        return from_diffusers(given)
    if not callable(given):
        raise ValueError(
            f"the sampler is {kind(given)}; give the name of one of ours, a function like them, or a "
            "scheduler of diffusers"
        )
    try:
        inspect.signature(given).bind(None, None, None, steps=1, noise=None, on_step=None)
    except TypeError as error:
        raise ValueError(
            "the sampler cannot be called as sampler(predict, x, schedule, steps=, noise=, on_step=): "
            f"{error}"
        ) from None
    except ValueError:  # a function without a signature to look at
        pass
    return given


def setting(given: Any) -> str:
    """A value as a command line would have it"""
    if given is None or isinstance(given, bool | list | tuple | dict):
        return json.dumps(given)
    return dtype(given) if isinstance(given, torch.dtype) else str(given)


def dtype(given: Any) -> str:
    """torch.bfloat16 or its name -> "bfloat16\""""
    name = str(given).removeprefix("torch.")
    choice("dtype", name, DTYPES)
    return name


def function(on_step: Any) -> None:
    if on_step is not None and not callable(on_step):
        raise ValueError(f"on_step is {kind(on_step)}; give a function of one argument")


def noise(given: Any, shape: Sequence[int]) -> Tensor:
    """Any array of finite floats of this shape -> Tensor; that of a single clip may lack the axis of clips"""
    if not isinstance(given, np.ndarray | Tensor):
        raise ValueError(f"noise is {kind(given)}; give a tensor of floats {tuple(shape)}")
    given = torch.as_tensor(given)
    if shape[0] == 1 and given.ndim == len(shape) - 1:
        given = given[None]
    if tuple(given.shape) != tuple(shape):
        raise ValueError(f"noise has shape {tuple(given.shape)}; this job needs {tuple(shape)}")
    if not given.is_floating_point():
        raise ValueError(f"noise is {given.dtype}, and must be finite floats, as torch.randn gives them")
    if not given.isfinite().all():
        raise ValueError("noise has values that are NaN or infinite, and must be finite floats")
    return given


def latents(given: Any, channels: int) -> None:
    if not isinstance(given, Tensor) or given.ndim not in (4, 5) or given.shape[-4] != channels:
        what = f"of shape {tuple(given.shape)}" if isinstance(given, Tensor) else kind(given)
        raise ValueError(f"the latents are {what}; give a tensor [{channels} f h w] or [b {channels} f h w]")
    if not given.is_floating_point() or not given.isfinite().all():
        raise ValueError("the latents must be finite floats")


def instead_of_conditions(pictures: Any, prompts: Any, negatives: Any, settings: Sequence[str]) -> None:
    """ValueError for what conditions hold already, and what would have no effect beside them."""
    both = {"image": pictures, "prompt": prompts, "negative_prompt": negatives}
    given = [name for name, one in both.items() if one is not None]
    given += [name for name in ("fps", "posterior", "negative_image", "negative_prompt") if name in settings]
    if given:
        raise ValueError(
            f"{given[0]}= was given together with conditions=, which hold it already; give it to model.encode"
        )


def seeds_for(given: Any, count: int) -> list[int]:
    """Seeds of clips whose conditions are `count`: as many, or any number if one serves all"""
    seeds = [seed(one) for one in given] if listed(given) else [seed(given)] * count
    if count not in (1, len(seeds)) or not seeds:
        got = f"conditions of {counted(count, 'clip')} and {counted(len(seeds), 'seed')}"
        raise ValueError(f"got {got}; give as many of each")
    return seeds


def conditions_count(given: Any) -> int:
    """The number of clips; ValueError for anything but what `encode` returns."""
    pair = isinstance(given, tuple) and len(given) == 2
    if not (pair and all(isinstance(part, Conditions) for part in given)):
        raise ValueError(f"the conditions are {kind(given)}; give those that model.encode(...) returns")
    counts = {len(one) for part in given for one in part if isinstance(one, Tensor)}
    if len(counts) != 1:
        raise ValueError(
            f"the conditions are of {sorted(counts)} clips; all their tensors must be of as many"
        )
    return counts.pop()


def conditions(given: Encoded, config: Config, count: int) -> Encoded:
    """Conditions of one clip or of `count`, of the widths and sizes of the settings -> of `count`"""
    c, (h, w) = config.unet.image_channels, config.latent_size
    shapes = {
        "text": (config.use.text, (config.unet.context_width,)),
        "image_vector": (config.use.global_tokens, (config.unet.image_vector_width,)),
        "image_latent": (config.use.concat or config.use.local_tokens, (c, h, w)),
        "fps": (config.use.fps, ()),
    }
    for side, part in zip(("with the prompt", "without it"), given, strict=True):
        for name, (read, shape) in shapes.items():
            one = getattr(part, name)
            if not read or (one is None and name == "image_vector"):
                continue
            wanted = " ".join(("[b k" if name == "text" else "[b", *map(str, shape))) + "]"
            if not isinstance(one, Tensor):
                raise ValueError(f"the conditions {side}: {name} is {kind(one)}; give a tensor {wanted}")
            if one.ndim != len(shape) + 1 + (name == "text") or one.shape[one.ndim - len(shape) :] != shape:
                raise ValueError(
                    f"the conditions {side}: {name} has shape {list(one.shape)}; this model and size need "
                    f"{wanted}"
                )
            if one.is_floating_point() and not one.isfinite().all():
                raise ValueError(f"the conditions {side}: {name} holds values that are not finite")

    def repeated(part: Conditions) -> Conditions:
        return type(part)(*(one if one is None else one.expand(count, *one.shape[1:]) for one in part))

    return Encoded(*map(repeated, given))


def kind(given: Any) -> str:
    name = type(given).__name__
    return "None" if given is None else f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


# ---------------------------------------------------------------------------------------------------
# What a record says of them


def facts(
    given: Picture | None,
    opened: Image.Image | None,
    *,
    noise: Tensor | None,
    sampler: Callable | None,
    conditions: Sequence[Tensor] | None,
    adapters: Sequence[dict],
) -> dict:
    """Entries of a clip's record: hashes of its inputs, and whether the settings alone remake it.

    `noise` [c f h w], `sampler` and `conditions` are what replaced those of settings, picture and prompt.
    """
    named = isinstance(given, str | os.PathLike)
    inputs: dict[str, object] = {}
    if given is not None:
        inputs["image"] = of_file(given) if named else of_pixels(opened)
    if conditions is not None:
        inputs["conditions"] = [of_tensor(one) for one in conditions]
    if noise is not None:
        inputs["noise"] = of_tensor(noise)
    if sampler is not None:
        inputs["sampler"] = of_sampler(sampler)
    told: dict[str, object] = {"reproducible": named and list(inputs) == ["image"] and not adapters}
    if adapters:
        inputs["adapters"] = list(adapters)
        told["changed"] = "adapters are attached to the UNet"
    return {**told, "inputs": inputs}


def of_file(path: str | os.PathLike) -> dict:
    path = os.path.expanduser(os.fsdecode(path))
    return {"file": path, "sha256": records.sha256(path)}


def of_pixels(opened: Image.Image) -> dict:
    return {"size": list(opened.size), "sha256": hashlib.sha256(opened.tobytes()).hexdigest()}


def of_tensor(tensor: Tensor) -> dict:
    data = tensor.detach().cpu().clone(memory_format=torch.contiguous_format).view(torch.uint8).numpy()
    return {
        "shape": list(tensor.shape),
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "sha256": hashlib.sha256(data.tobytes()).hexdigest(),
    }


def of_sampler(sampler: Callable) -> dict:
    """Its name, and its settings as far as they are known."""
    if isinstance(sampler, FromDiffusers):
        settings = dict(sampler.scheduler.config)
        return {"name": f"diffusers.{type(sampler.scheduler).__name__}", "settings": _plain(settings)}
    keywords = {}
    if isinstance(sampler, functools.partial):
        sampler, keywords = sampler.func, sampler.keywords
    cls = sampler if isinstance(sampler, types.FunctionType) else type(sampler)
    return {"name": f"{cls.__module__}.{cls.__qualname__}", "settings": _plain(keywords)}


def _plain(value: Any) -> Any:
    """What JSON can hold; arrays by their hashes, objects by their kinds."""
    if isinstance(value, dict):
        return {str(name): _plain(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if isinstance(value, np.ndarray | Tensor):
        return of_tensor(torch.as_tensor(value))
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if value is None or isinstance(value, str | bool | int | float) else kind(value)
