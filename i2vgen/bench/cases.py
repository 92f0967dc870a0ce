"""The cases of the benchmark by name. A new one is a function of the other side and of what was asked for."""

from __future__ import annotations

from collections.abc import Callable

from i2vgen.bench import count, cpu
from i2vgen.bench.peer import Options, Peer
from i2vgen.bench.report import Report

Case = Callable[[Peer, Options], Report]


def _cpu(name: str) -> Case:
    return lambda peer, options: cpu.run(name, peer, options)


CASES: dict[str, Case] = {
    "count": lambda peer, options: count.run(peer.network),
    **{name: _cpu(name) for name in cpu.CASES},
}
