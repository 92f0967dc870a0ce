"""Case `memory`: what every memory plan takes at the official size, part by part, counted on `meta`."""

from __future__ import annotations

import dataclasses

from torch import nn

from i2vgen import memory
from i2vgen.bench.report import Report, Table
from i2vgen.config import Config, Runtime
from i2vgen.runtime import GIB

# bfloat16 where the default on a GPU is half precision, float32 where the official code computes so.
HALF = {"dtype": "bfloat16"}
ALL_HALF = {**HALF, "encoder_dtype": "bfloat16", "vae_dtype": "bfloat16"}
DTYPES = {"UNet bfloat16, VAE and CLIP float32": HALF, "all bfloat16": ALL_HALF}


def run(network: type[nn.Module], config: Config | None = None) -> Report:
    """`network` is the other side's, which has no plans and is not counted here."""
    config = config or Config()
    tables, values = [], {}
    for title, dtypes in DTYPES.items():
        found = plans(config, dtypes)
        values[title] = {plan: dataclasses.asdict(estimate) for plan, estimate in found.items()}
        values[title] |= {f"{plan}_gib": estimate.total / GIB for plan, estimate in found.items()}
        tables.append(table(f"{title}: GiB on the device, weights + activations", found))
    return Report(values, tuple(tables))


def plans(config: Config, dtypes: dict[str, str]) -> dict[str, memory.Estimate]:
    # As on a GPU: what waits on the CPU takes nothing. The device itself is never asked.
    config = dataclasses.replace(config, runtime=dataclasses.replace(Runtime(), **dtypes))
    ledger = memory.Ledger(config)
    return {plan: ledger.estimate(memory.settle(config, plan, "cuda"), "cuda") for plan in memory.PLANS}


def table(title: str, found: dict[str, memory.Estimate]) -> Table:
    rows = []
    for plan, estimate in found.items():
        cells = (f"{m.weights / GIB:.2f} + {m.activations / GIB:.2f}" for m in estimate.moments)
        rows.append((plan, *cells, f"{estimate.total / GIB:.2f}"))
    first = next(iter(found.values()))
    return Table(title, ("", *(m.name for m in first.moments), "peak"), tuple(rows))
