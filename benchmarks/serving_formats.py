"""Tokens a second of one fine-tune on this machine's CPU, in each format by its own runtime.

GGUF by llama.cpp, ONNX by ONNX Runtime GenAI, AWQ by vLLM (docs/servers.md says how it is found) and by transformers. Every
runtime has a process of its own that loads the model once; then all answer in turn, round by round, and each one's fastest
time counts, since what else runs on the machine only ever adds time. A prompt is read for one token of answer; answering is the time
of more tokens less that of one. Prints a table; nothing is asserted.

python benchmarks/serving_formats.py [--threads 2] [--rounds 6] [--prompt 512] [--answer 48] KIND=PATH ...
    KIND: gguf, onnx, vllm, transformers; the first is what the others are compared with
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import platform
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

KINDS = ("gguf", "onnx", "vllm", "transformers")
SHORT = 32
"""Tokens of the prompt before an answer that is timed."""
TIMED = ("read", "one", "more")
"""A prompt; a short prompt with one token of answer; the same with more."""


def main() -> None:
    """Load every model, let them answer in turn, print the table."""
    parser = argparse.ArgumentParser()
    for name, default in (("threads", 2), ("rounds", 6), ("prompt", 512), ("answer", 48)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("models", nargs="+", metavar="KIND=PATH")
    given = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(given.threads)
    cores = ",".join(str(core) for core in sorted(os.sched_getaffinity(0))[: given.threads])
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = cores
    context = multiprocessing.get_context("spawn")
    rows: list[dict[str, Any]] = []
    for model in given.models:
        kind, _, path = model.partition("=")
        if kind not in KINDS:
            parser.error(f"{kind!r} is none of {', '.join(KINDS)}")
        here, there = context.Pipe()
        process = context.Process(target=worker, args=(there, kind, Path(path), given), daemon=True)
        process.start()
        there.close()  # so that a worker that ends is heard of
        try:
            rows.append({"line": here, "process": process, "kind": kind, "path": Path(path), **here.recv()})
        except EOFError:
            parser.error(f"{model} could not be opened; what went wrong stands above")
        print(f"loaded {rows[-1]['said']}", flush=True)
    for _ in range(given.rounds):
        for row in rows:
            time.sleep(0.3)  # the threads of the one before stop spinning
            row["line"].send("go")
            for key, seconds in zip(TIMED, row["line"].recv(), strict=True):
                row.setdefault(key, []).append(seconds)
    for row in rows:
        row["line"].send("")
        row["process"].join(20)
    table(rows, given)


def table(rows: list[dict[str, Any]], given: argparse.Namespace) -> None:
    """The fastest of each, and what it is of the first row's."""
    name = next(
        (
            line.split(":")[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        "",
    )
    print(
        f"\n{name or platform.machine()}, {given.threads} threads, {given.rounds} rounds, load {os.getloadavg()[0]:.1f}\n"
    )
    print("| model | runtime | MB | answering, tokens/s | of the first | reading, tokens/s | of the first |")
    print("|---|---|---|---|---|---|---|")
    speeds = [rates(row, given) for row in rows]
    for row, speed in zip(rows, speeds, strict=True):
        cells = [row["name"], row["said"], f"{row['mb']:.0f}"]
        for mine, first in zip(speed, speeds[0], strict=True):
            cells += [f"{mine:,.0f}", f"{mine / first:.2f}"]
        print(f"| {' | '.join(cells)} |")


def rates(row: dict[str, Any], given: argparse.Namespace) -> tuple[float, float]:
    """Tokens a second of answering and of reading, from the fastest of each kind."""
    best = {key: min(row[key]) for key in TIMED}
    return given.answer / (best["more"] - best["one"]), given.prompt / best["read"]


def worker(line: Connection, kind: str, path: Path, given: argparse.Namespace) -> None:
    """Hold one model; for every word from the other side say how long a prompt and an answer took."""
    longest = max(given.prompt, SHORT) + given.answer + 2
    session, said = opened(kind, path, longest, given.threads)
    files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
    line.send(
        {
            "said": said,
            "mb": sum(p.stat().st_size for p in files) / 1e6,
            "name": path.name if path.is_dir() else path.stem,
        }
    )
    prompt = [100 + i % 900 for i in range(given.prompt)]

    def took(ids: list[int], count: int) -> float:
        begin = time.perf_counter()
        answer = session.generate(ids, count)
        answer = answer[0] if isinstance(answer, tuple) else answer
        if len(answer) != count:
            raise SystemExit(
                f"{said} ended its answer after {len(answer)} of {count} tokens: take a shorter --answer"
            )
        return time.perf_counter() - begin

    took(prompt, 1)
    while line.recv():
        line.send((took(prompt, 1), took(prompt[:SHORT], 1), took(prompt[:SHORT], 1 + given.answer)))


def opened(kind: str, path: Path, longest: int, threads: int) -> tuple[Any, str]:
    """Something with `generate`, and what computes."""
    if kind == "gguf":
        from edgeft import llamacpp
        from edgeft.llamacpp import pin
        from edgeft.llamacpp.decode import Decoder

        llamacpp.activate()
        llamacpp.ensure("library")
        return Decoder(path, n_ctx=longest, threads=threads).__enter__(), f"llama.cpp {pin.load().commit[:7]}"
    if kind == "onnx":
        from edgeft.onnx.session import Session

        onnx = Session(path, context=longest, threads=threads)
        return onnx, onnx.said
    if kind == "vllm":
        from edgeft.servers import open_vllm

        vllm = open_vllm(path, context=longest)
        return vllm, vllm.said
    import torch

    from edgeft.awq.session import Session as Transformers

    torch.set_num_threads(threads)
    awq = Transformers(path, context=longest)
    return awq, awq.said


if __name__ == "__main__":
    main()
