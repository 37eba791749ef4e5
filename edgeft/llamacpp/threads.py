"""How many threads llama.cpp gets: one for each core this process may use, never one more.

ggml's threads wait for one another after every operation, so a thread without a core of its own holds up all others.
"""

from __future__ import annotations

import os
from pathlib import Path


def default_threads() -> int:
    """The physical cores this process may use, at least 1 and at most 8.

    Measured on 2 cores with SmolLM2-135M Q8_0, 512 tokens: 1 thread 2.7 s, 2 threads 1.5 s; with two other busy
    processes 3.9 s and 3.3 s.
    """
    import psutil

    physical = psutil.cpu_count(logical=False) or 1
    return max(1, min(8, min(physical, allowed_cpus())))


def allowed_cpus() -> int:
    """Processors this process may run on: its affinity mask, cut by its control group's quota."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = Path("/sys/fs/cgroup/cpu.max")
    if quota.is_file():
        limit, _, period = quota.read_text(encoding="utf-8").partition(" ")
        if limit != "max" and int(period):
            allowed = min(allowed, max(1, int(limit) // int(period)))
    return max(1, allowed)
