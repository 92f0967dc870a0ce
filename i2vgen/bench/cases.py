"""The cases of the benchmark by name. A new one is a function of the other side and of what was asked for."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from i2vgen.bench import count, cpu, gpu, leave_one_out, plans, split
from i2vgen.bench.peer import Options, Peer
from i2vgen.bench.report import Report
from i2vgen.settings.config import Config

Case = Callable[[Peer, Options], Report]
COUNTED = {"count": count.run, "memory": plans.run, "parallel": split.run}


def _named(run: Callable[[str, Peer, Options], Report], name: str) -> Case:
    return lambda peer, options: run(name, peer, options)


def _counted(run: Callable[[type[nn.Module]], Report]) -> Case:
    def case(peer: Peer, options: Options) -> Report:
        return run(peer.network) if options.mode == "infer" else leave_one_out.counted(Config())

    return case


CASES: dict[str, Case] = {
    **{name: _counted(run) for name, run in COUNTED.items()},
    **{name: _named(cpu.run, name) for name in cpu.CASES},
    **{name: _named(gpu.run, name) for name in gpu.SIZES},
}


def check(name: str, options: Options) -> None:
    """ValueError for what a case cannot do, before anything is loaded or built."""
    allowed = (Options(), Options(mode="savings")) if name == "count" else (Options(),)
    if name in COUNTED and options not in allowed:
        raise ValueError(f"case={name} only counts: leave mode=, full=, parts= and dry= out")
    if options.dtype != "float32" and name not in cpu.CASES:
        raise ValueError(f"case={name} has no dtype=; it belongs to {', '.join(cpu.CASES)}")
    if name in cpu.CASES:
        cpu.check(name, options)
    if name in gpu.SIZES:
        gpu.check(name, options)
