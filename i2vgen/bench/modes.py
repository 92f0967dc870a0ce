"""Our ways to take a guidance step, as settings of `runtime`. A new one is a row here.

All are exact: the same numbers up to rounding.
"""

from __future__ import annotations

from i2vgen.settings.config import SAVINGS

Settings = dict[str, object]

# One operation after the other, on a GPU with our kernels; the last row shows what these do.
EAGER: dict[str, Settings] = {
    "default": {},
    "batched": {"batch_guidance": True},
    "without kernels": {"savings": tuple(name for name in SAVINGS if name != "kernels")},
}
CPU: dict[str, Settings] = {
    "default": {},
    "batched": {"batch_guidance": True},
}
COMPILED: dict[str, Settings] = {
    "compiled": {"compile": True},
    "batched, compiled": {"batch_guidance": True, "compile": True},
}
# On a GPU, played back from a recording.
GRAPH: dict[str, Settings] = {
    "recorded": {"cuda_graph": True},
    "batched, recorded": {"batch_guidance": True, "cuda_graph": True},
}
