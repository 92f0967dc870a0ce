"""Optical flow, by OpenCV's dense inverse search: how much moves, and what the motion leaves unexplained.

Kroeger et al. 2016, "Fast optical flow using dense inverse search", preset medium, on grey frames.
Axes: f frames, h w pixels; a flow is [h w 2], columns then rows, in pixels.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import numpy as np

from i2vgen.scoring.metrics import need_frames

# A pixel is hidden where the way there and back does not end near its start: Ruder et al. 2016, "Artistic
# style transfer for videos", equation 5.
HIDDEN_SHARE, HIDDEN_PIXELS = 0.01, 0.5
SMALLEST = 16  # pixels of the shorter side that the search's patches need


class Moved(NamedTuple):
    motion: float  # per cent of the width per frame
    warp_error: float | None  # levels; None where no pixel could be followed


def measure(clip: np.ndarray) -> Moved:
    """uint8 [f h w 3] -> motion and warp error, each a mean over pairs of neighbouring frames.

    motion      mean length of the flow, in per cent of the picture's width per frame
    warp_error  mean absolute difference in levels between a frame and the next one, pulled back along the
                flow, over pixels that stay in sight; Lai et al. 2018, "Learning blind video temporal
                consistency", section 4.2, but absolute where they square, so that it reads as levels
    """
    need_frames(clip, 2, "optical flow")
    _, height, width, _ = clip.shape
    if min(height, width) < SMALLEST:
        raise ValueError(
            f"frames of {width} x {height} pixels are too small for optical flow, which needs {SMALLEST}"
        )
    flow = searcher()
    lengths, errors = [], []
    for before, after in itertools.pairwise(clip):
        there, back = flow(before, after), flow(after, before)
        lengths.append(np.linalg.norm(there, axis=-1).mean() / width * 100)
        pulled, seen = pull(after, there), in_sight(there, back)
        if seen.any():
            errors.append(np.abs(pulled - before)[seen].mean())
    return Moved(float(np.mean(lengths)), float(np.mean(errors)) if errors else None)


def searcher():
    """-> function of two uint8 frames [h w 3] -> flow [h w 2]"""
    import cv2

    search = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)

    def flow(before: np.ndarray, after: np.ndarray) -> np.ndarray:
        grey = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in (before, after)]
        return search.calc(*grey, None).astype(np.float64)

    return flow


def pull(frame: np.ndarray, flow: np.ndarray) -> np.ndarray:
    """[h w c], flow [h w 2] -> float64 [h w c]: at every pixel what lies where its flow leads, bilinear"""
    height, width = frame.shape[:2]
    x, y = (np.clip(place, 0, end - 1) for place, end in zip(targets(flow), (width, height), strict=True))
    left, top = np.minimum(x.astype(int), width - 2), np.minimum(y.astype(int), height - 2)
    right_share, low_share = (x - left)[..., None], (y - top)[..., None]
    frame = frame.astype(np.float64)
    upper = frame[top, left] * (1 - right_share) + frame[top, left + 1] * right_share
    lower = frame[top + 1, left] * (1 - right_share) + frame[top + 1, left + 1] * right_share
    return upper * (1 - low_share) + lower * low_share


def in_sight(there: np.ndarray, back: np.ndarray) -> np.ndarray:
    """Flows [h w 2] to the next frame and back -> bool [h w]: neither leaves the picture nor is covered."""
    height, width = there.shape[:2]
    x, y = targets(there)
    inside = (x >= 0) & (x <= width - 1) & (y >= 0) & (y <= height - 1)
    returned = pull(back, there)
    missed = np.square(there + returned).sum(-1)
    allowed = HIDDEN_SHARE * (np.square(there).sum(-1) + np.square(returned).sum(-1)) + HIDDEN_PIXELS
    return inside & (missed <= allowed)


def targets(flow: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Flow [h w 2] -> column and row, each [h w], at which every pixel arrives."""
    rows, columns = np.mgrid[: flow.shape[0], : flow.shape[1]]
    return columns + flow[..., 0], rows + flow[..., 1]
