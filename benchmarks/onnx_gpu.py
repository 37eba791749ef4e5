"""An ONNX folder computed by an NVIDIA GPU against the same folder computed by the CPU: logits, answers, speed. Prints tables.

python benchmarks/onnx_gpu.py FOLDER REFERENCE [--devices cuda cpu] [--texts domain general] [--windows 4] [--out FOLDER]

FOLDER holds genai_config.json; REFERENCE is a result of a build, a folder `reference-…` in `.edgeft/done`. On each device the folder
is scored against REFERENCE as `verify` does, answers the reference's questions, and reads 512 tokens and writes 128, one
sequence at a time; the first --windows windows of each text are compared between the two devices, and on one device with
themselves. Scores go into --out, one .npz a device. docs/onnx.md says what to install for cuda.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edgeft.onnx.session import Session
    from edgeft.parity.evidence import Reference

READ, WRITE, RUNS = 512, 128, 3


def main() -> None:
    import numpy as np

    from edgeft.onnx.session import Session, read_config
    from edgeft.parity import evidence

    given = _arguments()
    reference = evidence.Reference.of(dict(np.load(given.reference / "reference.npz")))
    size = sum(f.stat().st_size for f in given.folder.iterdir()) / 1e6
    options = read_config(given.folder)["model"]["decoder"].get("session_options", {})
    print(
        f"\n{_machine()}; {size:,.1f} MB, provider_options {json.dumps(options.get('provider_options', []))}\n"
    )
    print("| computed by | text | KLD | 95 % bound | PPL ratio | same top | kept of the gain | seconds |")
    print("|---|---|--:|--:|--:|--:|--:|--:|", flush=True)
    logits, answers, speeds = {}, {}, []
    for device in given.devices:
        with Session(given.folder, device=device) as session:
            _score(session, device, reference, given)
            logits[device] = _first(session, reference, given)
            logits[f"{device} again"] = _first(session, reference, given)
            answers[device] = _answers(session, given.reference)
            speeds.append(_speed(session))
    _differences(logits)
    _print_answers(answers)
    print("\n| computed by | first token of 512 the first time, ms | tokens/s read | tokens/s written |")
    print("|---|--:|--:|--:|")
    print("\n".join(speeds), flush=True)


def _score(session: Session, device: str, reference: Reference, given: argparse.Namespace) -> None:
    import numpy as np

    from edgeft.parity import evidence
    from edgeft.parity.served import Served

    begun = time.monotonic()
    found = evidence.measure(Served(session), reference, given.reference, texts=given.texts)
    took = time.monotonic() - begun
    if given.out:
        given.out.mkdir(parents=True, exist_ok=True)
        np.savez(given.out / f"{device}.npz", **evidence.as_arrays(found))
    for text, c in reference.compare(found).items():
        kept = reference.retention(found["domain"]) if text == "domain" else None
        share = f"{kept.retention:.1%}" if kept and kept.retention is not None else ""
        print(
            f"| {session.said} | {text} | {c.kld:.4f} | {c.kld_bound:.4f} | {c.ppl_ratio:.4f} | {c.same_top:.1%} | {share} | {took:,.1f} |",
            flush=True,
        )


def _first(session: Session, reference: Reference, given: argparse.Namespace) -> list[Any]:
    """Logits of whole windows."""
    return [
        session.logits([int(i) for i in window])
        for name in given.texts
        for window in reference.texts[name].ids[: given.windows]
    ]


def _differences(logits: dict[str, list[Any]]) -> None:
    """Between the devices, and between two readings by one."""
    import numpy as np

    from edgeft.llamacpp.score import compare_logits

    print("\n| logits of | against | tokens | KLD | largest | same top | largest difference |")
    print("|---|---|--:|--:|--:|--:|--:|")
    names = [name for name in logits if not name.endswith("again")]
    pairs = [(names[1], names[0])] if len(names) > 1 else []
    for one, other in [*pairs, *((name, f"{name} again") for name in names)]:
        kld, top, apart = [], [], 0.0
        for a, b in zip(logits[one], logits[other], strict=True):
            scores = compare_logits(a, b, [0] * len(a))
            kld.append(scores.kld.ravel())
            top.append(scores.same_top.ravel())
            apart = max(apart, float(np.abs(a - b).max()))
        every, same = np.concatenate(kld), np.concatenate(top)
        print(
            f"| {one} | {other} | {every.size:,} | {every.mean():.2e} | {every.max():.2e} | {same.mean():.2%} | {apart:.3g} |",
            flush=True,
        )


def _answers(session: Session, reference: Path) -> list[str]:
    asked = json.loads((reference / "questions.json").read_text(encoding="utf-8"))
    return [session.detokenize(session.generate(q["prompt_ids"], 96)[0]).strip() for q in asked]


def _print_answers(answers: dict[str, list[str]]) -> None:
    """Every answer once, with the devices that gave it."""
    print()
    for number, given in enumerate(zip(*answers.values(), strict=True), 1):
        for text in dict.fromkeys(given):
            who = ", ".join(device for device, said in zip(answers, given, strict=True) if said == text)
            print(f"{number}. [{who}] {text}")


def _speed(session: Session) -> str:
    """A row: the first token of 512, and tokens a second, medians; the first reading counts apart."""
    ids = [100 + i % 900 for i in range(READ)]

    def took(length: int, count: int) -> tuple[float, int]:
        begun = time.perf_counter()
        wrote, _ = session.generate(ids[:length], count)
        return time.perf_counter() - begun, len(wrote)

    first, _ = took(READ, 1)
    reads = statistics.median(took(READ, 1)[0] for _ in range(RUNS))
    rates = []
    for _ in range(RUNS):
        start, (whole, wrote) = took(16, 1)[0], took(16, WRITE)
        rates.append((wrote - 1) / (whole - start))
    return f"| {session.said} | {first * 1e3:,.1f} | {READ / reads:,.0f} | {statistics.median(rates):,.1f} ({wrote} tokens) |"


def _machine() -> str:
    """The processor, its cores, and the GPU where there is one."""
    try:
        asked = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
        gpu = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        gpu = "no NVIDIA GPU"
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        cpu = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        cpu = platform.processor()
    return f"{cpu}, {os.cpu_count()} cores; {gpu}"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("reference", type=Path)
    parser.add_argument("--devices", nargs="+", default=["cuda", "cpu"], choices=["cuda", "cpu"])
    parser.add_argument("--texts", nargs="+", default=["domain", "general"])
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
