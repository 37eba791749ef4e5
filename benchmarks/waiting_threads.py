"""What OpenMP's spinning costs torch: default against GOMP_SPINCOUNT=2000, on an idle and on a busy machine.

    python benchmarks/waiting_threads.py

Small products are what generation does, large ones what training does. The busy half runs as many other processes as
there are cores. Prints a table; nothing is asserted.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys

WORK = """
import time, torch
weights = [torch.randn(576, 1536) for _ in range(60)]
def seconds(rows, rounds):
    x = torch.randn(rows, 576)
    (x @ weights[0]).relu()
    started = time.perf_counter()
    for _ in range(rounds):
        for w in weights:
            (x @ w).relu()
    return time.perf_counter() - started
print(seconds(1, 150), seconds(512, 12))
"""
SETTINGS = {"default": {}, "GOMP_SPINCOUNT=2000": {"GOMP_SPINCOUNT": "2000"}}


def measured(settings: dict[str, str]) -> list[float]:
    done = subprocess.run(
        [sys.executable, "-c", WORK],
        env={**os.environ, **settings},
        check=True,
        capture_output=True,
        text=True,
    )
    return [float(s) for s in done.stdout.split()]


def main() -> None:
    print(
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores; seconds, and against the default"
    )
    print(f"{'':6} {'':20} {'small products':>16} {'large products':>16}")
    for state in ("idle", "busy"):
        others = [
            subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(os.cpu_count() or 1)
        ]
        if state == "idle":
            for other in others:
                other.kill()
        times = {name: measured(env) for name, env in SETTINGS.items()}
        for other in others:
            other.kill()
            other.wait()
        for name, found in times.items():
            ratios = [f"{t:8.2f} {t / d:6.2f}x" for t, d in zip(found, times["default"], strict=True)]
            print(f"{state:6} {name:20} {ratios[0]:>16} {ratios[1]:>16}")


if __name__ == "__main__":
    main()
