"""Find the state dict in what torch.load gave, under the keys that training programs use (WRAPPERS)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from weights_conversion.mapped import (
    AVERAGED,
    DAMAGED,
    LEFT_OUT,
    MAX_AXES,
    NAMELESS,
    SAVE_ANEW,
    WRAPPER,
    fits,
    shown,
)
from weights_conversion.read_pickle import Inert

# Keys under which a training program puts the state dict, beside its step counter and the like.
WRAPPERS = ("state_dict", "model_state_dict", "model", "module", "params")
# The same for weights averaged over the training.
EMA = re.compile(r"(?:.*_)?(?:ema|swa|avg|averaged?|shadow)(?:_.*)?")
MAX_WRAPPERS = 3  # inside each other


def _plain(content: Any) -> Any:
    """Real dicts in place of OrderedDicts, whose methods a pickle can replace."""
    if not isinstance(content, dict):
        return content
    return {key: _plain(value) for key, value in dict.items(content)}


def unwrap(path: Path, content: Any, file_size: int, ema: bool) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state dict in what torch.load gave, the averaged one if `ema`, and the plain values beside it."""
    content = _plain(content)
    extra: dict[str, Any] = {}
    left_out: list[str] = []
    wrapper: list[str] = []
    while len(wrapper) < MAX_WRAPPERS and (key := _wrapper_key(path, content, ema)) is not None:
        _set_aside({k: v for k, v in content.items() if k != key}, extra, left_out)
        wrapper.append(key)
        content = content[key]
    tensors = _named_tensors(path, content)
    _set_aside({k: v for k, v in content.items() if k not in tensors}, extra, left_out)
    if wrapper:
        extra[WRAPPER] = ".".join(wrapper)
    if left_out:
        extra[LEFT_OUT] = ", ".join(left_out)
    return {name: _dense(f"{path}: {shown(name)}", t, file_size) for name, t in tensors.items()}, extra


def _dense(where: str, tensor: Tensor, file_size: int) -> Tensor:
    """The tensor without its attributes, hooks and class, once it is one that can be read safely."""
    tensor = Tensor.detach(tensor)
    if tensor.is_conj() or tensor.is_neg():
        raise ValueError(
            f"{where} holds a tensor with pending conjugation or negation; resolve it before saving"
        )
    if tensor.ndim > MAX_AXES or not fits(tensor.shape):
        raise ValueError(f"{where} has an impossible shape; {DAMAGED}")
    if tensor.numel() * tensor.element_size() > file_size:
        raise ValueError(f"{where} repeats its numbers to more than the whole file; save a plain copy of it")
    return tensor


def _wrapper_key(path: Path, content: Any, ema: bool) -> str | None:
    if not isinstance(content, dict):
        return None
    keys, averaged = [key for key in WRAPPERS if _holds_tensors(content.get(key))], _averaged(content)
    if averaged and (ema or not (keys or any(isinstance(value, Tensor) for value in content.values()))):
        keys = averaged
    if len(keys) > 1:
        raise ValueError(
            f"{path} holds several sets of tensors ({', '.join(keys)}); save the wanted one by itself"
        )
    return keys[0] if keys else None


def _averaged(content: Mapping[Any, Any]) -> list[str]:
    """The keys of averaged weights."""
    return [
        k for k, v in content.items() if isinstance(k, str) and EMA.fullmatch(k.lower()) and _holds_tensors(v)
    ]


def _averaged_by_number(key: Any, value: Any) -> bool:
    """Whether these are averaged weights in a list, such as `shadow_params`: nothing says which is which."""
    if isinstance(value, dict):
        averaged = isinstance(key, str) and EMA.fullmatch(key.lower())
        return any(_averaged_by_number(key if averaged else k, v) for k, v in value.items())
    if not (isinstance(key, str) and EMA.fullmatch(key.lower()) and isinstance(value, list | tuple)):
        return False
    return any(isinstance(one, Tensor) for one in value)


def _holds_tensors(value: Any) -> bool:
    """Whether it is a dict with a tensor at any depth."""
    if not isinstance(value, dict):
        return False
    return any(isinstance(v, Tensor) or _holds_tensors(v) for v in value.values())


def _names(keys: Iterable[Any]) -> str:
    keys = list(keys)
    words = [shown(key) if isinstance(key, (str, int)) else type(key).__name__ for key in keys[:5]]
    return ", ".join(words) + (", ..." if len(keys) > 5 else "")


def _set_aside(values: Mapping[Any, Any], extra: dict[str, Any], left_out: list[str]) -> None:
    if averaged := _averaged(values):
        extra[AVERAGED] = _names(averaged)
    if nameless := [key for key, value in values.items() if _averaged_by_number(key, value)]:
        extra[NAMELESS] = _names(nameless)
    for key, value in values.items():
        if isinstance(key, str) and (value is None or type(value) in (int, float, str, bool)):
            extra[key] = value
        else:
            left_out.append(_names([key]))


def _named_tensors(path: Path, content: Any) -> dict[str, Tensor]:
    if isinstance(content, Tensor):
        raise ValueError(f"{path} holds one tensor without a name; save {{name: tensor}} instead")
    if isinstance(content, Inert):
        raise ValueError(f"{path} holds an object of {shown(content.word)}, not a state dict; {SAVE_ANEW}")
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not tensors by name; {SAVE_ANEW}")
    tensors = {name: value for name, value in content.items() if isinstance(value, Tensor)}
    groups = [key for key, value in content.items() if _holds_tensors(value)]
    if groups and not (tensors and groups == _averaged(content)):
        raise ValueError(
            f"{path} holds its tensors in groups ({_names(groups)}); save the wanted one by itself"
        )
    if not tensors:
        raise ValueError(f"{path} holds no tensors, only {_names(content) or 'an empty dict'}; {SAVE_ANEW}")
    if not all(isinstance(key, str) for key in tensors):
        raise ValueError(f"{path} has tensors whose names are not text ({_names(tensors)}); {SAVE_ANEW}")
    return tensors
