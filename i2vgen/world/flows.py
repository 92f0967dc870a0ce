"""Where everything that a clip's first frame shows is in each later frame: the true optical flow of a clip.

Axes: f frames, h w rows and columns of the grid on which the flow is asked for, such as that of latents.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from i2vgen.world import drawing
from i2vgen.world.drawing import Facts


def flow(
    facts: Facts, covers: Sequence[np.ndarray], *, width: int, height: int, frames: int, speed: float = 1.0
) -> np.ndarray:
    """Shift of each of width x height places of the first frame -> float32 [2 f h w].

    It counts to the right and down, in halves of a frame's width and height, as `model.moved` does. covers:
    how much of each place each thing covers in the first frame, [h w], in the order in which they are drawn.
    """
    time = speed * np.linspace(0.0, 1.0, frames)
    half = min(width, height) / 2.0
    x = np.broadcast_to((np.arange(width) + 0.5 - width / 2.0) / half, (height, width))
    y = np.broadcast_to(((np.arange(height) + 0.5 - height / 2.0) / half)[:, None], (height, width))
    look_x, look_y, zoom = (_per_frame(one) for one in drawing.camera_path(facts.camera, time))
    to_x, to_y = (x - look_x) * zoom, (y - look_y) * zoom
    for thing, move, cover in zip(facts.things, facts.moves, covers, strict=True):
        path = drawing.track(thing, move, facts.camera, time)
        centre_x, centre_y, radius, angle = (_per_frame(one) for one in path)
        size, turn = radius / radius[0], np.deg2rad(angle - angle[0])
        u, v = (x - centre_x[0]) * size, (y - centre_y[0]) * size
        own = cover > 0.5
        to_x = np.where(own, centre_x + u * np.cos(turn) - v * np.sin(turn), to_x)
        to_y = np.where(own, centre_y + u * np.sin(turn) + v * np.cos(turn), to_y)
    sides = 2.0 * half / np.array([width, height], np.float32)[:, None, None, None]
    return (np.stack([to_x - x, to_y - y]) * sides).astype(np.float32)


def shares(covers: Sequence[np.ndarray], *, width: int, height: int) -> np.ndarray:
    """How much each place counts in a mean in which all things and the background count alike -> [h w].

    A small thing is a twentieth of the picture, but what moves in most clips. The mean of the shares is 1.
    """
    part = np.zeros((height, width), int)
    for number, cover in enumerate(covers, 1):
        part[cover > 0.5] = number
    sizes = np.bincount(part.ravel(), minlength=len(covers) + 1)
    return (part.size / np.count_nonzero(sizes) / sizes[part]).astype(np.float32)


def _per_frame(path: np.ndarray) -> np.ndarray:
    return path[:, None, None]
