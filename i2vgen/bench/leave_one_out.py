"""Mode `savings`: what each exact saving is worth, found by leaving it out of all the others.

A saving that is worth less than one percent everywhere should go.
"""

from __future__ import annotations

import torch

from i2vgen.bench import count, pair
from i2vgen.bench.report import Report
from i2vgen.bench.timing import interleaved
from i2vgen.fast import savings
from i2vgen.files.tables import Table
from i2vgen.settings.config import SAVINGS, Config

ALL, NONE, BATCHED = "all", "none", "batched"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
ROUNDS = 7
COUNTED = ("flops", "memory_bound_bytes", "operations", "peak")


def ways(names: tuple[str, ...]) -> dict[str, dict[str, object]]:
    """Settings of `runtime` by name: all of these savings, all but one, none, and all with one batch."""
    without = {f"without {n}": {"savings": tuple(other for other in names if other != n)} for n in names}
    return {
        ALL: {"savings": names},
        **without,
        NONE: {"savings": ("none",)},
        BATCHED: {"savings": names, "batch_guidance": True},
    }


def here(device: torch.device) -> tuple[str, ...]:
    """The savings that `all` means on a device"""
    return tuple(name for name in SAVINGS if name in savings.chosen(("all",), device))


def timed(name: str, sizes: list[Config]) -> Report:
    """On one thread of a CPU, where there are no kernels: seconds of every way relative to all savings."""
    names = here(torch.device("cpu"))
    found: dict[str, dict[str, float]] = {}
    for settings in sizes:
        for label, dtype in DTYPES.items():
            both = pair.make_pair(settings, torch.device("cpu"), dtype)
            inputs = both.inputs()
            steps = {way: pair.our_step(m, inputs) for way, m in both.all_ours(ways(names)).items()}
            times = interleaved(steps, rounds=ROUNDS)
            size = "x".join(map(str, (settings.sample.frames, *settings.latent_size)))
            found[f"{size} {label}"] = {way: times.ratio(way, ALL) for way in steps}
    values = {"case": name, "mode": "savings", "threads": 1, "torch": torch.__version__, "ratios": found}
    rows = tuple((way, *(f"{found[size][way]:.3f}" for size in found)) for way in ways(names))
    title = f"{name}: time of a guidance step relative to all savings, one thread"
    return Report(values, (Table(title, ("", *found), rows),))


def counted(settings: Config) -> Report:
    """At the official size, with the kernels that `all` means on CUDA"""
    names = tuple(SAVINGS)
    meters = {way: count.count_ours(plan, settings) for way, plan in ways(names).items()}
    found = {
        way: {figure: getattr(meter, figure) / getattr(meters[ALL], figure) for figure in COUNTED}
        for way, meter in meters.items()
    }
    rows = tuple((way, *(f"{figures[figure]:.3f}" for figure in COUNTED)) for way, figures in found.items())
    title = "count: a guidance step relative to all savings"
    return Report(
        {"case": "count", "mode": "savings", "ratios": found}, (Table(title, ("", *COUNTED), rows),)
    )
