"""The cases of the benchmark by name. A new one is a function here."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from i2vgen.bench import count, memory
from i2vgen.bench.report import Report

# diffusers' network class -> what was found
CASES: dict[str, Callable[[type[nn.Module]], Report]] = {"count": count.run, "memory": memory.run}
