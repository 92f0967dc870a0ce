"""How much memory a new run may take."""

from __future__ import annotations

from pathlib import Path

import torch

GIB = 2**30


def free_memory(where: torch.device) -> int:
    """Bytes that a new run may take on a device; practically infinite if that is unknown."""
    if where.type == "cuda":
        free, _ = torch.cuda.mem_get_info(where)
        return free + torch.cuda.memory_reserved(where) - torch.cuda.memory_allocated(where)
    limits = []
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        fields = dict(line.split(":", 1) for line in meminfo.read_text(encoding="utf-8").splitlines())
        if "MemAvailable" in fields:
            limits.append(int(fields["MemAvailable"].split()[0]) * 1024)
    # A container's own limit (cgroup v2) can be below the machine's free memory.
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and used.exists() and limit.read_text(encoding="utf-8").strip() != "max":
        limits.append(max(0, int(limit.read_text(encoding="utf-8")) - int(used.read_text(encoding="utf-8"))))
    return min(limits, default=2**63)
