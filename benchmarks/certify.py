"""What a certificate costs against the two forward passes that it cannot do without, in one run. Prints a table.

python benchmarks/certify.py REFERENCE SHIPPED.gguf [WINDOWS] [GENERAL_WINDOWS] [N_CTX]

REFERENCE is a checkpoint folder or a GGUF file. The passes alone: each model loaded once, logits of every window's
scored half, thrown away. The scoring: the same with base file, KL divergence, statistics. The whole certificate adds
the exact checks, llama-server, answers and the kernels' noise floor, whose time does not grow with the text.
"""

from __future__ import annotations

import platform
import resource
import sys
import tempfile
import time
from pathlib import Path

from edgeft import llamacpp
from edgeft.parity import evidence, reference
from edgeft.parity.certify import Request, certify
from edgeft.parity.gates import Limits, judge
from edgeft.parity.opening import opened
from edgeft.parity.questions import Sample, sample


def passes(request: Request, taken: Sample) -> float:
    """Seconds of the two models' forward passes over all windows, loading included."""
    started = time.perf_counter()
    for path in (request.reference, request.shipped):
        with opened(path, n_ctx=request.n_ctx) as model:
            for text in taken.texts.values():
                for window in text.ids:
                    model.speaker.logits(window)
    return time.perf_counter() - started


def scoring(request: Request) -> float:
    """Seconds of everything that depends on the text: passes, base file, divergence, bootstrap, verdict."""
    started = time.perf_counter()
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
    return time.perf_counter() - started


def whole(request: Request) -> float:
    """Seconds of the whole certificate."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=".") as folder:
        certify(request, Limits.of("parity"), Path(folder))
    return time.perf_counter() - started


def main() -> None:
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
        ("the two passes alone", passes(request, taken)),
        ("scoring", scoring(request)),
        ("certificate", whole(request)),
    ]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{platform.processor() or platform.machine()}, {request.reference.name} against {request.shipped.name}, "
          f"{numbers[0]} + {numbers[1]} windows of {numbers[2]}, peak memory {peak:,.0f} MB")  # fmt: skip
    print(f"{'':>22} {'seconds':>8} {'against the passes':>19}")
    for name, seconds in rows:
        print(f"{name:>22} {seconds:>8.1f} {seconds / rows[0][1]:>18.2f}x")


if __name__ == "__main__":
    main()
