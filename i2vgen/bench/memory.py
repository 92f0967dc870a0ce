"""How much a process grows while it takes one guidance step, each side in a fresh process of its own."""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from i2vgen.bench import pair
from i2vgen.bench.peer import Peer
from i2vgen.settings.config import Config

STATUS = Path("/proc/self/status")


def measurable() -> bool:
    """Linux tells a process' size and its largest size so far."""
    return STATUS.exists()


def growth_of_ours(config: Config, settings: Mapping[str, object]) -> int:
    """Bytes, one thread, float32 on the CPU."""
    return in_a_process(_ours, config, dict(settings))


def growth_of_theirs(config: Config, peer: Peer) -> int:
    return in_a_process(_theirs, config, peer)


def in_a_process(measure: Callable[..., int], *arguments) -> int:
    """`measure` must be a function of a module: the new process imports it."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(measure, arguments)


def _ours(config: Config, settings: Mapping[str, object]) -> int:
    torch.set_num_threads(1)
    both = pair.make_pair(config, torch.device("cpu"), torch.float32)
    return growth(pair.our_step(both.ours(settings), both.inputs()))


def _theirs(config: Config, peer: Peer) -> int:
    torch.set_num_threads(1)
    both = pair.make_pair(config, torch.device("cpu"), torch.float32)
    return growth(pair.their_step(both.theirs(peer), both.inputs(), config.sample.guidance))


def growth(step: Callable[[], object]) -> int:
    """Bytes: the largest size while the first step runs, less the size before it."""
    _give_back()
    before = _kilobytes("VmRSS")
    Path("/proc/self/clear_refs").write_text(
        "5", encoding="utf-8"
    )  # the largest size so far starts again from here
    step()
    return 1024 * (_kilobytes("VmHWM") - before)


def _give_back() -> None:
    """What building the model left free inside the process would be filled first, and not seen."""
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except AttributeError:  # another C library than glibc
        return


def _kilobytes(name: str) -> int:
    return int(re.search(rf"^{name}:\s+(\d+) kB", STATUS.read_text(encoding="utf-8"), re.MULTILINE).group(1))
