"""Picture and clip metrics that need no network, computed in float64.

Pictures are uint8 [.. h w 3], clips uint8 [f h w 3]; values are in levels, 0 to 255.
Axes: f frames, h w pixel rows and columns, n pictures.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

MAX_PSNR = 99.0  # PSNR of equal pictures, instead of infinity
LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601
# Wang et al. 2004, "Image quality assessment: from error visibility to structural similarity", section III.
SSIM_WINDOW, SSIM_SIGMA, SSIM_K1, SSIM_K2 = 11, 1.5, 0.01, 0.03


def psnr(one: np.ndarray, other: np.ndarray) -> float:
    """uint8 [..], uint8 [..] -> peak signal-to-noise ratio in dB, higher is better, at most MAX_PSNR.

    10 log10(255^2 / mean squared error), with the mean over all values.
    """
    same_shape(one, other)
    error = np.square(one.astype(np.float64) - other).mean()
    return MAX_PSNR if error == 0 else min(MAX_PSNR, 10.0 * math.log10(255.0**2 / error))


def ssim(one: np.ndarray, other: np.ndarray) -> float:
    """uint8 [.. h w 3], uint8 [.. h w 3] -> structural similarity, -1 to 1, higher is better.

    Wang et al. 2004, equation 13: Gaussian window of 11 x 11 pixels with standard deviation 1.5, without
    padding; mean over pixels, colour channels and pictures.
    """
    same_shape(one, other)
    if min(one.shape[-3:-1]) < SSIM_WINDOW:
        raise ValueError(
            f"pictures of {one.shape[-2]} x {one.shape[-3]} pixels are smaller than SSIM's window of "
            f"{SSIM_WINDOW} x {SSIM_WINDOW}; leave SSIM out"
        )
    c1, c2 = (SSIM_K1 * 255) ** 2, (SSIM_K2 * 255) ** 2
    found = []
    for a, b in zip(_planes(one), _planes(other), strict=True):  # one picture at a time, to save memory
        mean_a, mean_b = _window(a), _window(b)
        var_a, var_b = _window(a * a) - mean_a**2, _window(b * b) - mean_b**2
        cov = _window(a * b) - mean_a * mean_b
        same = (2 * mean_a * mean_b + c1) * (2 * cov + c2)
        found.append((same / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))).mean().item())
    return float(np.mean(found))


def sharpness(clip: np.ndarray) -> float:
    """uint8 [.. h w 3] -> variance of the luma's Laplacian, in squared levels; detail and noise raise it.

    Pech-Pacheco et al. 2000, "Diatom autofocusing in brightfield microscopy", with the 4-neighbour Laplacian;
    variance per picture, mean over pictures.
    """
    y = luma(clip)
    inner = y[..., 1:-1, 1:-1]
    edges = y[..., :-2, 1:-1] + y[..., 2:, 1:-1] + y[..., 1:-1, :-2] + y[..., 1:-1, 2:] - 4 * inner
    return float(edges.var(axis=(-2, -1)).mean())


def frame_change(clip: np.ndarray) -> float:
    """uint8 [f h w 3] -> mean absolute difference of neighbouring frames, in levels; 0 for a still clip.

    Motion and flicker both raise it, so neither direction is better. VBench's temporal flickering is
    (255 - this) / 255.
    """
    need_frames(clip, 2, "frame_change")
    return float(np.mean([np.abs(after - before).mean() for before, after in _pairs(clip)]))


def flicker(clip: np.ndarray) -> float:
    """uint8 [f h w 3] -> mean of |x[i+1] - 2 x[i] + x[i-1]| / 2 over frames i, in levels, lower is steadier.

    The distance of a frame from the mean of its neighbours, so uniform change counts as zero. Fast edges
    raise it too; `warp_error` compensates for motion.
    """
    need_frames(clip, 3, "flicker")
    found = []
    for k in range(1, len(clip) - 1):
        before, here, after = (clip[i].astype(np.float64) for i in (k - 1, k, k + 1))
        found.append(np.abs(before - 2 * here + after).mean() / 2)
    return float(np.mean(found))


def luma(pictures: np.ndarray) -> np.ndarray:
    """uint8 [.. h w 3] -> float64 [.. h w], luma of ITU-R BT.601."""
    return pictures.astype(np.float64) @ np.array(LUMA)


def same_shape(one: np.ndarray, other: np.ndarray) -> None:
    if one.shape != other.shape:
        raise ValueError(
            f"cannot compare pictures of shapes {one.shape} and {other.shape}; expected equal shapes"
        )


def need_frames(clip: np.ndarray, count: int, name: str) -> None:
    if len(clip) < count:
        raise ValueError(f"{name} needs at least {count} frames, but this clip has {len(clip)}")


def _pairs(clip: np.ndarray):
    for k in range(len(clip) - 1):
        yield clip[k].astype(np.float64), clip[k + 1].astype(np.float64)


def _planes(pictures: np.ndarray):
    """uint8 [.. h w 3] -> yields float64 [3 1 h w], one picture at a time."""
    for picture in pictures.reshape(-1, *pictures.shape[-3:]):
        yield torch.from_numpy(picture.astype(np.float64)).permute(2, 0, 1)[:, None]


def _window(x: Tensor) -> Tensor:
    """[n 1 h w] -> [n 1 h-10 w-10], Gaussian-weighted mean over the window, without padding."""
    place = torch.arange(SSIM_WINDOW, dtype=x.dtype) - SSIM_WINDOW // 2
    line = torch.exp(-place.square() / (2 * SSIM_SIGMA**2))
    line = line / line.sum()
    return F.conv2d(F.conv2d(x, line.view(1, 1, -1, 1)), line.view(1, 1, 1, -1))
