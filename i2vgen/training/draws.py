"""What every source of clips shares: batches, and the draws that decide which clip is shown and how.

Axes: b batch, f frames, c channels, h w latent rows and columns, H W pixel rows and columns, k context
tokens, d width.
"""

from __future__ import annotations

import functools
import itertools
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from i2vgen.training.settings import Bucket

# Keys that make the draws of a visit independent of each other and of those of the loop.
CAPTION_STREAM, FLIP_STREAM, CROP_STREAM = 10, 11, 12
SIDES = re.compile(r"\b(left|right)|clockwise", re.IGNORECASE)


class Clips(NamedTuple):
    """A batch: `pixels` float32 [b c f H W] in [-1, 1], b captions, the frame rate it was sampled at."""

    pixels: Tensor
    captions: tuple[str, ...]
    fps: int
    # With `train.flow_weight`: where each place of the grid that moves goes, and how much it counts,
    # [b 3 f gh gw].
    flow: Tensor | None = None


class Encoded(NamedTuple):
    """Clips as encoded by the frozen VAE and CLIP; deterministic, so it can be kept in memory or on disk."""

    mean: Tensor  # [b c f h w] of the posterior, unscaled
    std: Tensor  # [b c f h w]
    vector: Tensor | None  # [b d] CLIP vectors of the first frames
    tokens: Tensor | None  # int64 [b k] of the captions
    fps: int
    start: Tensor | None = None  # [b c f h w] latents of the first stage's upscaled clips, for a refiner
    text: Tensor | None = None  # [b k d] what the text tower makes of `tokens`, from prepared data
    captions: tuple[str, ...] = ()
    flow: Tensor | None = None  # [b 3 f gh gw] as in `Clips`


Source = Callable[[Bucket, Sequence[int]], Clips | Encoded]  # positions of the clips in the run -> the clips


def generator(*keys: int) -> torch.Generator:
    """A CPU generator for (seed, step, rank, ...); different keys give independent streams."""
    return torch.Generator().manual_seed(derived_seed(*keys))


def derived_seed(*keys: int) -> int:
    return int(np.random.SeedSequence(keys).generate_state(1, np.uint64)[0]) >> 1


def visits(seed: int, position: int, count: int) -> Iterator[int]:
    """Numbers of the clips to try at this position, of `count` in all: each epoch has an order of its own."""
    epoch, turn = divmod(position, count)
    order = _order(seed, epoch, count)
    return (int(order[(turn + i) % count]) for i in range(count))


@functools.lru_cache(maxsize=2)
def _order(seed: int, epoch: int, count: int) -> np.ndarray:
    return np.random.Generator(np.random.PCG64([seed, epoch])).permutation(count)


def one_of(count: int, *keys: int) -> int:
    """A number below `count`; no draw where there is no choice."""
    return derived_seed(*keys) % count if count > 1 else 0


def flipped(seed: int, position: int) -> bool:
    return bool(one_of(2, seed, position, FLIP_STREAM))


def may_flip(captions: Sequence[str]) -> bool:
    """Whether a mirror image still shows what the captions say: none of them names a side or a turn."""
    return not any(SIDES.search(caption) for caption in captions)


def name_hash(name: str) -> int:
    return zlib.crc32(name.encode("utf-8", "surrogatepass"))


def held_out(
    hashes: np.ndarray, fraction: float, usable: Callable[[int], bool] = lambda number: True
) -> np.ndarray:
    """Hashes of clips' names -> bool: which clips are for validation.

    At least one is, if any is usable, and one is not. New clips in a folder leave most of the others where
    they were.
    """
    count = min(max(1, round(fraction * len(hashes))), len(hashes) - 1)
    order = (int(number) for number in np.argsort(hashes, kind="stable"))
    chosen = np.zeros(len(hashes), bool)
    chosen[list(itertools.islice(filter(usable, order), count))] = True
    return chosen
