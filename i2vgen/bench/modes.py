"""Our ways to take a guidance step, as settings of `runtime`. A case picks the rows that its device can do.

All are exact: the same numbers up to rounding. A new one is a row here.
"""

from __future__ import annotations

Settings = dict[str, object]

# The modules as they are, with the exact savings that need nothing but memory.
EAGER: dict[str, Settings] = {
    "default": {},
    "batched": {"batch_guidance": True},
}
# On a CPU: weights laid out anew for its kernels.
CPU: dict[str, Settings] = {}
# On a GPU.
GPU: dict[str, Settings] = {
    "compiled": {"batch_guidance": True, "compile": True},
}
# What the one-layout modules do without any saving, one call for each branch.
PLAIN: Settings = {
    "share_prefix": False,
    "project_once": False,
    "fuse_projections": False,
    "subpixel_upsampling": False,
    "in_place": False,
}
