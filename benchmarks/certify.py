"""What a certificate costs against the two forward passes that it cannot do without, in one run. Prints a table.

python benchmarks/certify.py REFERENCE SHIPPED.gguf [WINDOWS] [GENERAL_WINDOWS] [N_CTX]

REFERENCE is a checkpoint folder or a GGUF file. The passes alone: each model loaded once, logits of every window's
scored half, thrown away. The scoring: the same with base file, KL divergence, statistics. The whole certificate adds
the exact checks, llama-server, answers and the kernels' noise floor, whose time does not grow with the text.
"""

from __future__ import annotations

import os
import platform
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from edgeft import llamacpp
from edgeft.parity import evidence, reference
from edgeft.parity.certify import Request, certify
from edgeft.parity.gates import Limits, judge
from edgeft.parity.opening import opened
from edgeft.parity.questions import Sample, sample


def passes(request: Request, taken: Sample) -> None:
    """The two models' forward passes over all windows, loading included."""
    for path in (request.reference, request.shipped):
        with opened(path, n_ctx=request.n_ctx) as model:
            for text in taken.texts.values():
                for window in text.ids:
                    model.speaker.logits(window)


def scoring(request: Request) -> None:
    """Everything that depends on the text: passes, base file, divergence, bootstrap, verdict."""
    with tempfile.TemporaryDirectory(dir=".") as folder:
        with opened(request.reference, n_ctx=request.n_ctx) as model:
            taken = sample(request, model)
            nll = {
                n: reference.write(model.speaker, t, Path(folder) / f"{n}.kld")
                for n, t in taken.texts.items()
            }
        said = evidence.Reference(texts=taken.texts, nll=nll, base=None)
        with opened(request.shipped, n_ctx=request.n_ctx) as model:
            found = evidence.measure(model.speaker, said, Path(folder))
        judge(said.compare(found), None, Limits.of("parity"))


def whole(request: Request) -> None:
    """The whole certificate."""
    with tempfile.TemporaryDirectory(dir=".") as folder:
        certify(request, Limits.of("parity"), Path(folder))


def timed(work: Callable[[], None]) -> tuple[float, float]:
    """Seconds by the clock, and of all processors, child processes included: the second counts on a shared machine."""
    started, used = time.perf_counter(), cpu()
    work()
    return time.perf_counter() - started, cpu() - used


def cpu() -> float:
    return sum(
        u.ru_utime + u.ru_stime
        for u in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    )


def main() -> None:
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")  # as every heavy stage has it, and `edgeft certify`
    llamacpp.activate()
    for part in ("library", "server", "portable"):
        llamacpp.ensure(part)
    numbers = [int(n) for n in sys.argv[3:]] + [32, 16, 512][len(sys.argv) - 3 :]
    text = Path(__file__).parents[1] / "recipes/data/wordnet_medical_qa.jsonl"
    request = Request(
        reference=Path(sys.argv[1]), shipped=Path(sys.argv[2]), text=text, windows=numbers[0],
        general_windows=numbers[1], n_ctx=numbers[2],
    )  # fmt: skip
    with opened(request.reference, n_ctx=request.n_ctx) as model:
        taken = sample(request, model)
    rows = [
        ("the two passes alone", timed(lambda: passes(request, taken))),
        ("scoring", timed(lambda: scoring(request))),
        ("certificate", timed(lambda: whole(request))),
    ]
    (seconds, busy) = rows[0][1]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{platform.processor() or platform.machine()}, {request.reference.name} against {request.shipped.name}, "
          f"{numbers[0]} + {numbers[1]} windows of {numbers[2]}, peak memory {peak:,.0f} MB")  # fmt: skip
    print(f"{'':>22} {'seconds':>8} {'CPU s':>8} {'against the passes, both':>26}")
    for name, (wall, used) in rows:
        print(
            f"{name:>22} {wall:>8.1f} {used:>8.1f} {wall / seconds:>18.2f}x {used / busy:>6.2f}x", flush=True
        )


if __name__ == "__main__":
    main()
