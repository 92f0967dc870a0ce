"""Times several ways to do the same against each other, so that what disturbs one disturbs all.

The ways take turns in one process and the order turns round every other round. On a CPU the clock is the
thread's own, which stands still while another process has the core: run with one thread.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median

import torch

Clock = Callable[[Callable[[], object]], float]  # runs what it is given -> seconds


@dataclass(frozen=True)
class Times:
    """Seconds of every round, by name."""

    rounds: Mapping[str, tuple[float, ...]]

    def median(self, name: str) -> float:
        return median(self.rounds[name])

    def spread(self, name: str) -> tuple[float, float]:
        return min(self.rounds[name]), max(self.rounds[name])

    def ratio(self, slow: str, fast: str) -> float:
        """How often `fast` fits into `slow`: the median over rounds, each with its own neighbours."""
        pairs = zip(self.rounds[slow], self.rounds[fast], strict=True)
        return median(a / b for a, b in pairs)

    def best(self, names: list[str]) -> str:
        return min(names, key=self.median)


def thread_clock(call: Callable[[], object]) -> float:
    """Seconds that this thread computed; what other threads and processes do does not count."""
    begun = time.thread_time()
    call()
    return time.thread_time() - begun


def cuda_clock(call: Callable[[], object]) -> float:
    """Seconds between two events on the GPU's own clock."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def clock_of(device: torch.device) -> Clock:
    return cuda_clock if device.type == "cuda" else thread_clock


def interleaved(
    ways: Mapping[str, Callable[[], object]],
    *,
    clock: Clock = thread_clock,
    rounds: int = 5,
    warmups: int = 1,
) -> Times:
    """Every way once per round, in turn; odd rounds backwards."""
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(warmups):
        for call in ways.values():
            call()
    names = list(ways)
    for number in range(rounds):
        for name in names if number % 2 == 0 else reversed(names):
            taken[name].append(clock(ways[name]))
    return Times({name: tuple(seconds) for name, seconds in taken.items()})
