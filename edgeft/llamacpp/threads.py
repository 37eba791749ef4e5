"""How many threads llama.cpp gets. ggml's threads spin at a barrier after every operation, so one thread more than
there are idle cores costs far more than it brings (measured: 40 times slower with 2 threads on 2 busy cores)."""

from __future__ import annotations

import os
from pathlib import Path


def default_threads() -> int:
    """Half of the physical cores this process may use, at least 1 and at most 8."""
    import psutil

    physical = psutil.cpu_count(logical=False) or 1
    return max(1, min(8, min(physical, allowed_cpus()) // 2))


def allowed_cpus() -> int:
    """Processors this process may run on: its affinity mask, cut by its control group's quota."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = Path("/sys/fs/cgroup/cpu.max")
    if quota.is_file():
        limit, _, period = quota.read_text(encoding="utf-8").partition(" ")
        if limit != "max" and int(period):
            allowed = min(allowed, max(1, int(limit) // int(period)))
    return max(1, allowed)
