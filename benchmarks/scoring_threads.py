"""llama.cpp's scoring speed with one thread and with one a core, in one run. Prints a table; nothing is asserted.

python benchmarks/scoring_threads.py MODEL.gguf
"""

from __future__ import annotations

import platform
import sys
import time
from pathlib import Path

from edgeft import llamacpp
from edgeft.llamacpp.decode import Decoder
from edgeft.llamacpp.threads import default_threads

TOKENS, ROUNDS = 512, 3


def seconds(model: Path, threads: int) -> float:
    """The best of some rounds of one window with logits for its second half."""
    ids = list(range(100, 100 + TOKENS))
    with Decoder(model, n_ctx=TOKENS, threads=threads) as decoder:
        decoder.logits(ids[:32])
        best = float("inf")
        for _ in range(ROUNDS):
            started = time.perf_counter()
            decoder.logits(ids, first=TOKENS // 2)
            best = min(best, time.perf_counter() - started)
    return best


def main() -> None:
    llamacpp.activate()
    llamacpp.ensure("library")
    model = Path(sys.argv[1])
    counts = sorted({1, default_threads()})
    times = {n: seconds(model, n) for n in counts}
    print(f"{platform.processor() or platform.machine()}, {model.name}, {TOKENS} tokens, best of {ROUNDS}")
    print(f"{'threads':>8} {'seconds':>8} {'tokens/s':>9} {'against 1':>10}")
    for n, t in times.items():
        print(f"{n:>8} {t:>8.2f} {TOKENS / t:>9.0f} {times[1] / t:>9.2f}x")


if __name__ == "__main__":
    main()
