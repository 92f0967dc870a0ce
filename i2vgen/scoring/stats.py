"""From numbers of clips to numbers of a model: means with intervals, paired differences, Fréchet distance."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

Z = 1.959964  # standard deviations on either side of a 95 % interval
# Student's t for 95 % with 1 to 9 degrees of freedom; above, the series in `student` is right to 0.0005.
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


class Mean(NamedTuple):
    """A mean over clips and its 95 % interval; no interval for a single clip."""

    value: float | None
    low: float | None
    high: float | None
    clips: int

    @property
    def holds_zero(self) -> bool:
        """Whether zero lies within the error bars; where there are none nothing can be told apart from it."""
        return self.low is None or self.high is None or self.low <= 0 <= self.high


def mean(values: Sequence[float | None]) -> Mean:
    """Values, None where a clip has none -> mean +- t standard errors (Student 1908).

    The clips count as independent draws; several of one picture are less than that.
    """
    there = [v for v in values if v is not None]
    if not there:
        return Mean(None, None, None, 0)
    middle = math.fsum(there) / len(there)
    if len(there) == 1:
        return Mean(middle, None, None, 1)
    reach = student(len(there) - 1) * float(np.std(there, ddof=1)) / math.sqrt(len(there))
    return Mean(middle, middle - reach, middle + reach, len(there))


def paired(one: Sequence[float | None], other: Sequence[float | None]) -> Mean:
    """Values of the same clips by two models -> mean of the differences one - other, over clips both have."""
    both = [(a, b) for a, b in zip(one, other, strict=True) if a is not None and b is not None]
    return mean([a - b for a, b in both])


def student(freedom: int) -> float:
    """The 97.5 % point of Student's t; Abramowitz and Stegun 26.7.5 from 10 degrees of freedom on."""
    if freedom <= len(STUDENT):
        return STUDENT[freedom - 1]
    z, n = Z, freedom
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / n + second / n**2 + third / n**3


def frechet(one: np.ndarray, other: np.ndarray) -> float:
    """Features [n d] and [m d] -> squared Fréchet distance of the Gaussians through them, 0 or more.

    |mean1 - mean2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)): Dowson and Landau 1982, equation 4; with features of
    clips it is the FVD of Unterthiner et al. 2018. In float64; the root by the eigenvalues of the symmetric
    C1^(1/2) C2 C1^(1/2), which are those of C1 C2.
    """
    one, other = np.asarray(one, np.float64), np.asarray(other, np.float64)
    if one.ndim != 2 or other.ndim != 2 or one.shape[1] != other.shape[1] or min(len(one), len(other)) < 2:
        raise ValueError(
            f"features of shapes {one.shape} and {other.shape}; a Fréchet distance needs [n d] and [m d] "
            "with at least 2 clips each"
        )
    far = np.square(one.mean(axis=0) - other.mean(axis=0)).sum()
    first, second = (np.atleast_2d(np.cov(x, rowvar=False)) for x in (one, other))
    values, vectors = np.linalg.eigh(first)
    root = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    shared = np.linalg.eigvalsh(root @ second @ root).clip(min=0)
    distance = far + np.trace(first) + np.trace(second) - 2 * np.sqrt(shared).sum()
    return max(0.0, float(distance))  # equal sets end at -1e-15 or so
