"""Validation: the loss on clips that are not trained on, with noise and timesteps that never change.

The range of timesteps is cut into BANDS equal bands, and each clip is measured once in each of them: a
network may get better at one noise level while it gets worse at another.

Axes: b batch, f frames, H W pixel rows and columns; t is the timestep.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from i2vgen.training import draws
from i2vgen.training.draws import Clips, Encoded
from i2vgen.training.prepared import joined
from i2vgen.training.settings import Bucket

BANDS = 5
VALIDATION_STREAM = 20
LOSS = "validation_loss"


@dataclass(frozen=True)
class HeldOut:
    """Held-out clips, encoded, on the CPU, in batches of one bucket each."""

    batches: Sequence[Encoded]
    arguments: Callable[[Encoded, Sequence[int], Tensor], tuple]  # clips, seeds, t [b] -> a step's arguments
    num_timesteps: int
    shown: Encoded  # the first few, for the sample strip
    pixels: Tensor | None  # theirs, float32 [b 3 f H W]; None if they were read from prepared data

    @torch.no_grad()
    def measure(
        self, loss: Callable[..., dict[str, Tensor]], *, device: torch.device, rank: int = 0, ranks: int = 1
    ) -> dict[str, float]:
        """The mean loss, and that of each band. Every process makes the same number of calls to `loss`."""
        edges = band_edges(self.num_timesteps)
        sums = torch.zeros(len(edges), device=device, dtype=torch.float32)
        count = sum(len(batch.mean) for batch in self.batches)
        first = [*itertools.accumulate((len(batch.mean) for batch in self.batches), initial=0)]
        for turn in range(-(-len(self.batches) // ranks)):
            number = turn * ranks + rank
            counted = number < len(self.batches)
            number = number if counted else 0
            batch = self.batches[number]
            clips = range(first[number], first[number] + len(batch.mean))
            for band, (low, high) in enumerate(edges):
                seeds = [draws.derived_seed(VALIDATION_STREAM, clip, band) for clip in clips]
                t = torch.tensor([low + seed % (high - low) for seed in seeds])
                found = loss(*self.arguments(batch, seeds, t))["loss"].float()
                sums[band] += found * len(batch.mean) * counted
        if ranks > 1:
            torch.distributed.all_reduce(sums)
        means = (sums / count).tolist()
        bands = {f"{LOSS}_{low}_{high}": mean for (low, high), mean in zip(edges, means, strict=True)}
        return {LOSS: sum(means) / len(means), **bands}


def band_edges(num_timesteps: int) -> list[tuple[int, int]]:
    """The first timestep of each band, and the first one after it."""
    count = min(BANDS, num_timesteps)
    return [*itertools.pairwise(num_timesteps * i // count for i in range(count + 1))]


def collect(
    source: Callable, kinds: Sequence[Bucket], most: int, encode: Callable[[Clips], Encoded]
) -> list[Encoded]:
    """Up to `most` held-out clips, shared among the buckets, encoded in their batches.

    ValueError if a bucket has none.
    """
    batches = []
    for number, bucket in enumerate(kinds):
        share = max(1, most // len(kinds) + (number < most % len(kinds)))
        found = list(itertools.islice(source.fixed(bucket), share))
        if not found:
            raise ValueError(
                f"train.validate: none of the held-out clips has {bucket.frames} frames at {bucket.fps} fps; "
                "hold out more or longer clips"
            )
        for i in range(0, len(found), bucket.batch):
            part = found[i : i + bucket.batch]
            encoded = joined(part) if isinstance(part[0], Encoded) else encode(stacked(part))
            batches.append(on_cpu(encoded))
    return batches


def first_of(batches: Sequence[Encoded], count: int) -> Encoded:
    """The first `count` clips of batches of one bucket."""
    whole = joined(batches)
    cut = {n: one[:count] for n, one in whole._asdict().items() if isinstance(one, Tensor)}
    return whole._replace(captions=whole.captions[:count], **cut)


def stacked(clips: Sequence[Clips]) -> Clips:
    return Clips(
        torch.cat([one.pixels for one in clips]),
        tuple(caption for one in clips for caption in one.captions),
        clips[0].fps,
    )


def on_cpu(encoded: Encoded) -> Encoded:
    moved = {n: one.cpu() for n, one in encoded._asdict().items() if isinstance(one, Tensor)}
    return encoded._replace(**moved)
