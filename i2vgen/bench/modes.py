"""Our ways to take a guidance step, as settings of `runtime`. A new one is a row here.

All are exact: the same numbers up to rounding.
"""

from __future__ import annotations

Settings = dict[str, object]

# PyTorch's own operations, one after the other.
EAGER: dict[str, Settings] = {
    "default": {},
    "batched": {"batch_guidance": True},
}
# What a CPU can do besides: feed-forwards in pieces that its caches hold.
CPU = EAGER | {
    "in pieces": {"feed_forward_chunk": 1024},
    "batched, in pieces": {"batch_guidance": True, "feed_forward_chunk": 1024},
}
COMPILED: dict[str, Settings] = {
    "compiled": {"compile": True},
    "batched, compiled": {"batch_guidance": True, "compile": True},
}
# On a GPU, played back from a recording.
GRAPH: dict[str, Settings] = {}
