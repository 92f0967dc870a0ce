"""Statistics over clips: means with confidence intervals, paired differences, distances of two sets.

Axes: n and m clips, d width of a feature vector.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

Z = 1.959964  # 97.5 % quantile of the normal distribution
# 97.5 % quantiles of Student's t with 1 to 9 degrees of freedom; from 10 on, the series of `student` is
# within 0.0005.
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


class Mean(NamedTuple):
    """A mean over clips and its 95 % confidence interval, None for a single clip."""

    value: float | None
    low: float | None
    high: float | None
    clips: int

    @property
    def holds_zero(self) -> bool:
        """Whether the interval contains zero; True if there is no interval."""
        return self.low is None or self.high is None or self.low <= 0 <= self.high


def mean(values: Sequence[float | None]) -> Mean:
    """Values, None where a clip has none -> mean +- t standard errors (Student 1908).

    Assumes independent clips; several clips of one picture make the interval too narrow.
    """
    known = [v for v in values if v is not None]
    if not known:
        return Mean(None, None, None, 0)
    middle = math.fsum(known) / len(known)
    if len(known) == 1:
        return Mean(middle, None, None, 1)
    half_width = student(len(known) - 1) * float(np.std(known, ddof=1)) / math.sqrt(len(known))
    return Mean(middle, middle - half_width, middle + half_width, len(known))


def paired(one: Sequence[float | None], other: Sequence[float | None]) -> Mean:
    """Values of the same clips by two models -> mean of the differences one - other, over clips both have."""
    both = [(a, b) for a, b in zip(one, other, strict=True) if a is not None and b is not None]
    return mean([a - b for a, b in both])


def student(degrees: int) -> float:
    """97.5 % quantile of Student's t; from 10 degrees of freedom on, Abramowitz and Stegun 26.7.5."""
    if degrees <= len(STUDENT):
        return STUDENT[degrees - 1]
    z, n = Z, degrees
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / n + second / n**2 + third / n**3


def frechet(one: np.ndarray, other: np.ndarray) -> float:
    """Features [n d] and [m d] -> squared Fréchet distance between the Gaussians fitted to them.

    |mean1 - mean2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)), Dowson and Landau 1982, equation 4; with features of
    clips this is the FVD of Unterthiner et al. 2018. Computed in float64; the trace of the root comes from
    the eigenvalues of the symmetric C1^(1/2) C2 C1^(1/2), which are those of C1 C2.
    """
    one, other = _features(one, other)
    far = np.square(one.mean(axis=0) - other.mean(axis=0)).sum()
    first, second = (np.atleast_2d(np.cov(x, rowvar=False)) for x in (one, other))
    values, vectors = np.linalg.eigh(first)
    root = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    shared = np.linalg.eigvalsh(root @ second @ root).clip(min=0)
    distance = far + np.trace(first) + np.trace(second) - 2 * np.sqrt(shared).sum()
    return max(0.0, float(distance))  # rounding gives about -1e-15 for equal sets


def kernel_distance(one: np.ndarray, other: np.ndarray) -> float:
    """Features [n d] and [m d] -> squared maximum mean discrepancy, unbiased, so it may fall below zero.

    The kernel is (x . y / d + 1)^3, as for the KID of Binkowski et al. 2018 (section 4). It is right on
    average for few clips, where a Fréchet distance comes out too high.
    """
    one, other = _features(one, other)

    def kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return (x @ y.T / x.shape[1] + 1) ** 3

    def within(x: np.ndarray) -> float:
        each = kernel(x, x)
        return (each.sum() - np.trace(each)) / (len(x) * (len(x) - 1))

    return float(within(one) + within(other) - 2 * kernel(one, other).mean())


def _features(one: np.ndarray, other: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    one, other = np.asarray(one, np.float64), np.asarray(other, np.float64)
    if one.ndim != 2 or other.ndim != 2 or one.shape[1] != other.shape[1] or min(len(one), len(other)) < 2:
        raise ValueError(
            f"features of shapes {one.shape} and {other.shape}; a distance of two sets needs [n d] and [m d] "
            "with at least 2 clips each"
        )
    return one, other
