"""What people hand over from Python: pictures, prompts, seeds and noise in the usual types, and their hashes.

Everything that cannot be meant is a ValueError that says what to give, before any work.
"""

from __future__ import annotations

import functools
import hashlib
import math
import operator
import os
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from i2vgen.diffusion.schedulers import FromDiffusers
from i2vgen.files import images, records

Picture = str | os.PathLike | Image.Image | np.ndarray | Tensor
UNNAMED = "<picture>"  # in a record, a picture that came from memory


def paired(pictures: Any, prompts: Any, seeds: Any) -> tuple[list, list[str], list[int]]:
    """Lists of one length; a lone picture, prompt or seed serves all clips."""
    arrays = isinstance(pictures, np.ndarray | Tensor) and pictures.ndim > 3
    lone = [
        not (arrays or isinstance(pictures, list | tuple)),
        not isinstance(prompts, list | tuple),
        not isinstance(seeds, list | tuple | range) and np.ndim(seeds) == 0,
    ]
    lists = [
        [one] if alone else list(one) for one, alone in zip((pictures, prompts, seeds), lone, strict=True)
    ]
    count = max(len(one) for one, alone in zip(lists, lone, strict=True) if not alone or all(lone))
    lists = [one * count if alone else one for one, alone in zip(lists, lone, strict=True)]
    if not count or {len(one) for one in lists} != {count}:
        raise ValueError(
            "got {} pictures, {} prompts, {} seeds; give as many of each, or a single one for all".format(
                *map(len, lists)
            )
        )
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
        f"the picture is {_kind(given)}; give one path, PIL picture or array [h w 3], and several of them to "
        "model.generate(pictures, prompts, seeds)"
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
        if not 0 <= given.min() <= given.max() <= 1:  # also catches NaN
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
        raise ValueError(
            f"the prompt is {_kind(given)}; give one text ('' for none), and several of them to "
            "model.generate(pictures, prompts, seeds)"
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
    raise ValueError(f"the seed is {_kind(given)}; give an integer, 0 or more")


def path(given: Any) -> Path:
    if not isinstance(given, str | os.PathLike) or not Path(given).name:
        what = "empty" if isinstance(given, str | os.PathLike) else _kind(given)
        raise ValueError(f"the output is {what}; give the path of a file, such as outputs/clip.mp4")
    return Path(os.path.expanduser(given))


def functions(*, sampler: Any, on_step: Any) -> None:
    if sampler is not None and not callable(sampler):
        raise ValueError(
            f"the sampler is {_kind(sampler)}; give a function, for a scheduler of diffusers "
            "schedulers.from_diffusers(it), or name one of ours when loading: sample.sampler=NAME"
        )
    if on_step is not None and not callable(on_step):
        raise ValueError(f"on_step is {_kind(on_step)}; give a function of one argument")


def noise(given: Any, shape: Sequence[int]) -> Tensor:
    """Any array of finite floats of this shape -> Tensor"""
    if not isinstance(given, np.ndarray | Tensor):
        raise ValueError(f"noise is {_kind(given)}; give a tensor of floats {tuple(shape)}")
    given = torch.as_tensor(given)
    if tuple(given.shape) != tuple(shape):
        raise ValueError(f"noise has shape {tuple(given.shape)}; this job needs {tuple(shape)}")
    if not given.is_floating_point() or not given.isfinite().all():
        raise ValueError(f"noise is {given.dtype}, and must be finite floats, as torch.randn gives them")
    return given


def _kind(given: Any) -> str:
    return "None" if given is None else f"a {type(given).__name__}"


# ---------------------------------------------------------------------------------------------------
# What a record says of them


def facts(given: Picture, opened: Image.Image, start: Tensor | None, sampler: Callable | None) -> dict:
    """Entries of a clip's record: hashes of its inputs, and whether the settings alone remake it.

    `start` [c f h w] and `sampler` are what replaced the initial noise and the sampler of the settings.
    """
    named = isinstance(given, str | os.PathLike)
    inputs: dict[str, dict] = {"image": of_file(given) if named else of_pixels(opened)}
    if start is not None:
        inputs["noise"] = of_tensor(start)
    if sampler is not None:
        inputs["sampler"] = of_sampler(sampler)
    return {"reproducible": named and len(inputs) == 1, "inputs": inputs}


def of_file(path: str | os.PathLike) -> dict:
    path = os.path.expanduser(os.fsdecode(path))
    return {"file": path, "sha256": records.sha256(path)}


def of_pixels(opened: Image.Image) -> dict:
    return {"size": list(opened.size), "sha256": hashlib.sha256(opened.tobytes()).hexdigest()}


def of_tensor(tensor: Tensor) -> dict:
    data = tensor.detach().cpu().contiguous().view(torch.uint8).numpy()
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
    kind = sampler if isinstance(sampler, types.FunctionType) else type(sampler)
    return {"name": f"{kind.__module__}.{kind.__qualname__}", "settings": _plain(keywords)}


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
    return value if value is None or isinstance(value, str | bool | int | float) else _kind(value)
