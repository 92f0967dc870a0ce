"""Formulas for the goldens' random weights, computed from the official parameter names and shapes."""

from __future__ import annotations

import hashlib
import math
import zlib
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor


def _normal(key: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    state = np.random.RandomState((zlib.crc32(key.encode()) + 1000003 * seed) % 2**32)
    return state.standard_normal(shape)


def grid_weight(key: str, shape: tuple[int, ...], seed: int, exponent: int) -> Tensor:
    """UNet goldens: integers in -127..127 times a power of two, exact in every float format."""
    center, scale = (64, 10) if len(shape) == 1 and key.endswith("weight") else (0, 32)
    code = np.clip(np.rint(center + scale * _normal(key, shape, seed)), -127, 127).astype(np.int8)
    return torch.from_numpy(code.astype(np.float32) * 2.0**exponent)


def fan_in_weight(key: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """Pipeline goldens (VAE, CLIP): scaled by fan-in, with norm weights near 1 and small biases."""
    if not shape:
        return torch.tensor(math.log(1 / 0.07))  # CLIP's logit_scale
    z = _normal(key, shape, seed)
    if len(shape) >= 2:
        z = z / math.sqrt(math.prod(shape[1:]))
    else:
        z = 1 + 0.1 * z if key.endswith("weight") else 0.05 * z
    return torch.from_numpy(z.astype(np.float32))


def fingerprint(state: Mapping[str, Tensor]) -> str:
    """SHA-256 over the keys in sorted order, each as UTF-8 followed by its little-endian float32 bytes."""
    digest = hashlib.sha256()
    for key in sorted(state):
        digest.update(key.encode())
        digest.update(state[key].numpy().astype("<f4").tobytes())
    return digest.hexdigest()
