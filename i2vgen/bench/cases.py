"""The cases of the benchmark by name. A new one is a function of the other side and of what was asked for."""

from __future__ import annotations

from collections.abc import Callable

from i2vgen.bench import count, cpu, gpu
from i2vgen.bench.peer import Options, Peer
from i2vgen.bench.report import Report

Case = Callable[[Peer, Options], Report]


def _named(run: Callable[[str, Peer, Options], Report], name: str) -> Case:
    return lambda peer, options: run(name, peer, options)


CASES: dict[str, Case] = {
    "count": lambda peer, options: count.run(peer.network),
    **{name: _named(cpu.run, name) for name in cpu.CASES},
    **{name: _named(gpu.run, name) for name in gpu.SIZES},
}


def check(name: str, options: Options) -> None:
    """ValueError for what a case cannot do, before anything is loaded or built."""
    if name == "count" and options != Options():
        raise ValueError("case=count only counts one guidance step: leave mode=, full=, parts= and dry= out")
    if name in cpu.CASES:
        cpu.check(name, options)
    if name in gpu.SIZES:
        gpu.check(name, options)
