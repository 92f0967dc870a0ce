"""The refiner's pixels: a clip of any size to what its network takes, and back to the size asked for.

    frames - resized (keep, crop, pad or stretch) - padded to a legal size - network - cropped back

Sizes are always width, height.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

Fit = Literal["keep", "crop", "pad", "stretch"]
Resize = Literal["bilinear", "bicubic"]


class Geometry(NamedTuple):
    """Sizes on the way: the clip scaled, the clip as it is asked for, the clip as the network takes it."""

    scaled: tuple[int, int]
    wanted: tuple[int, int]
    legal: tuple[int, int]

    @property
    def corner(self) -> tuple[int, int]:
        """Left and top of `wanted` inside `legal`."""
        return (self.legal[0] - self.wanted[0]) // 2, (self.legal[1] - self.wanted[1]) // 2


def geometry(
    size: tuple[int, int], box: tuple[int, int], fit: Fit, *, multiple: int = 64, rest: int = 16
) -> Geometry:
    """A clip's (width, height) and the size asked for -> all sizes on the way.

    "keep" is the largest size of the clip's own aspect inside `box`, in even numbers; "crop" covers the box
    and loses what stands out; "pad" lies inside it between black bars; "stretch" is official and changes the
    aspect. The network takes widths that are multiples of `multiple`, heights `rest` more than one.
    """
    (w, h), (width, height) = size, box
    if fit == "stretch":
        scaled = wanted = box
    elif fit == "crop":
        scale = max(width / w, height / h)
        scaled = max(width, round(w * scale)), max(height, round(h * scale))
        wanted = box
    elif fit in ("keep", "pad"):
        scale = min(width / w, height / h)
        even = (max(2, 2 * round(side * scale / 2)) for side in size)
        scaled = tuple(min(side, limit) for side, limit in zip(even, box, strict=True))
        wanted = box if fit == "pad" else scaled
    else:
        raise ValueError(f"fit is {fit!r}; choose keep, crop, pad or stretch")
    legal = -(-wanted[0] // multiple) * multiple, -(-(wanted[1] - rest) // multiple) * multiple + rest
    return Geometry(scaled, wanted, (legal[0], max(legal[1], rest or multiple)))


def resized(
    frames: np.ndarray, width: int, height: int, *, antialias: bool, resize: Resize = "bilinear"
) -> Tensor:
    """uint8 [f h w 3] -> float32 [f 3 height width] in [-1, 1].

    `antialias` blurs what shrinks, so that it does not flicker; the official code does not.
    """
    pixels = (
        rearrange(torch.from_numpy(np.ascontiguousarray(frames)), "f h w c -> f c h w").float() / 127.5 - 1
    )
    if pixels.shape[-2:] == (height, width):
        return pixels
    pixels = F.interpolate(pixels, (height, width), mode=resize, antialias=antialias)
    return pixels.clamp(-1, 1) if resize == "bicubic" else pixels  # bicubic shoots over at edges


def prepared(frames: np.ndarray, shape: Geometry, *, antialias: bool, resize: Resize = "bilinear") -> Tensor:
    """uint8 [f h w 3] -> float32 [f 3 H W] in [-1, 1] of the legal size."""
    pixels = resized(frames, *shape.scaled, antialias=antialias, resize=resize)
    (w, h), (width, height) = shape.scaled, shape.wanted
    left, top = (w - width) // 2, (h - height) // 2  # negative where bars are missing
    pixels = pixels[:, :, max(top, 0) : max(top, 0) + height, max(left, 0) : max(left, 0) + width]
    bars = [max(-left, 0), max(width - w + left, 0), max(-top, 0), max(height - h + top, 0)]
    if any(bars):
        pixels = F.pad(pixels, bars, value=-1.0)
    left, top = shape.corner
    edges = [left, shape.legal[0] - width - left, top, shape.legal[1] - height - top]
    # The border's pixels repeated: no edge that the network would draw, and none of it is kept.
    return F.pad(pixels, edges, mode="replicate") if any(edges) else pixels


def cropped(pixels: Tensor, shape: Geometry) -> Tensor:
    """[.. H W] of the legal size -> the size asked for."""
    left, top = shape.corner
    return pixels[..., top : top + shape.wanted[1], left : left + shape.wanted[0]]
