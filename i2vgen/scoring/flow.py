"""Amount of motion and warp error, from OpenCV's dense inverse search optical flow.

Kroeger et al. 2016, "Fast optical flow using dense inverse search", preset medium, on grey frames.
Axes: f frames, c channels, h w pixel rows and columns; a flow is [h w 2] in pixels, columns then rows.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import numpy as np

from i2vgen.scoring.metrics import need_frames

# A pixel is occluded if following the flow forward and backward does not end near its start: Ruder et al.
# 2016, "Artistic style transfer for videos", equation 5.
OCCLUSION_RATIO, OCCLUSION_PIXELS = 0.01, 0.5
SMALLEST = 16  # minimum pixels of the shorter side, for the patches of the search


class Moved(NamedTuple):
    motion: float  # percent of the width per frame
    warp_error: float | None  # levels; None if no pixel is visible in both frames


def measure(clip: np.ndarray) -> Moved:
    """uint8 [f h w 3] -> motion and warp error, each averaged over pairs of neighbouring frames.

    motion      mean length of the flow, in percent of the picture's width per frame
    warp_error  mean absolute difference, in levels, between a frame and the next one warped back along the
                flow, over visible pixels; Lai et al. 2018, "Learning blind video temporal consistency",
                section 4.2, with absolute instead of squared differences
    """
    need_frames(clip, 2, "optical flow")
    _, height, width, _ = clip.shape
    if min(height, width) < SMALLEST:
        raise ValueError(
            f"frames of {width} x {height} pixels are too small for optical flow; each side needs at least "
            f"{SMALLEST}"
        )
    flow = flow_estimator()
    lengths, errors = [], []
    for before, after in itertools.pairwise(clip):
        forward, backward = flow(before, after), flow(after, before)
        lengths.append(np.linalg.norm(forward, axis=-1).mean() / width * 100)
        warped, seen = warp(after, forward), visible(forward, backward)
        if seen.any():
            errors.append(np.abs(warped - before)[seen].mean())
    return Moved(float(np.mean(lengths)), float(np.mean(errors)) if errors else None)


def flow_estimator():
    """-> a function that maps two frames, uint8 [h w 3], to the flow [h w 2] from the first to the second."""
    import cv2

    search = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)

    def flow(before: np.ndarray, after: np.ndarray) -> np.ndarray:
        grey = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in (before, after)]
        return search.calc(*grey, None).astype(np.float64)

    return flow


def warp(frame: np.ndarray, flow: np.ndarray) -> np.ndarray:
    """Frame [h w c], flow [h w 2] -> float64 [h w c]: the frame sampled bilinearly at each pixel's target."""
    height, width = frame.shape[:2]
    x, y = (np.clip(place, 0, end - 1) for place, end in zip(targets(flow), (width, height), strict=True))
    left, top = np.minimum(x.astype(int), width - 2), np.minimum(y.astype(int), height - 2)
    right_share, low_share = (x - left)[..., None], (y - top)[..., None]
    frame = frame.astype(np.float64)
    upper = frame[top, left] * (1 - right_share) + frame[top, left + 1] * right_share
    lower = frame[top + 1, left] * (1 - right_share) + frame[top + 1, left + 1] * right_share
    return upper * (1 - low_share) + lower * low_share


def visible(forward: np.ndarray, backward: np.ndarray) -> np.ndarray:
    """Flows [h w 2] to the next frame and back -> bool [h w]: pixels that neither leave nor get occluded."""
    height, width = forward.shape[:2]
    x, y = targets(forward)
    inside = (x >= 0) & (x <= width - 1) & (y >= 0) & (y <= height - 1)
    returned = warp(backward, forward)
    missed = np.square(forward + returned).sum(-1)
    allowed = OCCLUSION_RATIO * (np.square(forward).sum(-1) + np.square(returned).sum(-1)) + OCCLUSION_PIXELS
    return inside & (missed <= allowed)


def targets(flow: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Flow [h w 2] -> target column and target row of every pixel, each [h w]."""
    rows, columns = np.mgrid[: flow.shape[0], : flow.shape[1]]
    return columns + flow[..., 0], rows + flow[..., 1]
