"""Measures how far correct kernels differ on one file: the noise floor below which no gate can be.

Quantized kernels round activations to 8 bits and sum in an order that depends on the processor's instructions, so one
file's logits differ between two right computations. No second machine is needed to see by how much: ggml's kernels
compiled for older processors of this kind (the part "portable") run here too, in a process of their own, for one process
holds one libggml. docs/device-kernels.md has measured floors beside what ARM kernels gave.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from edgeft import progress
from edgeft.errors import DataError, ToolError
from edgeft.llamacpp import build, runtime
from edgeft.llamacpp.base_file import blocks, first_scored
from edgeft.llamacpp.decode import Decoder
from edgeft.llamacpp.score import compare_logits, scored_logits
from edgeft.llamacpp.threads import default_threads
from edgeft.tool import run

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True)
class Pair:
    """One file under two sets of kernels of this machine."""

    what: str
    kld: float
    """Mean KL(this machine's own kernels ‖ the other ones), nats a token, from float32 logits."""
    same_top: float
    """Share of tokens for which both find the same next token most probable."""
    kernels: str
    """What the other ones were compiled with, in llama.cpp's words."""


@dataclass(frozen=True, kw_only=True)
class Floor:
    """A file's noise floor on this machine."""

    pairs: tuple[Pair, ...]
    kernels: str
    """What this machine's own kernels were compiled with, in llama.cpp's words."""
    tokens: int
    """Scored tokens, the same ones for each pair."""

    @property
    def largest(self) -> float:
        """The largest mean KLD of the pairs. 0 when all kernels agree bit for bit, which says nothing of others."""
        return max(pair.kld for pair in self.pairs)

    def facts(self) -> dict[str, Any]:
        """Everything of it, ready for JSON."""
        return {"largest": self.largest, **asdict(self), "pairs": [asdict(pair) for pair in self.pairs]}


def floor(gguf: Path, windows: Sequence[Sequence[int]], *, threads: int = 0) -> Floor:
    """Run a file under this machine's kernels, the same without weight repacking, and the portable ones.

    `windows` are of equal length, as score.windows cuts them; their second halves are scored, at full precision and
    not through a base file, whose 16 bits cost as much as F16 kernels differ by. One model and one window's logits are
    in memory at a time; the others wait in a temporary folder, 2 * 4 bytes * scored tokens * vocabulary.
    Compiles the portable kernels when they are not there (50 CPU seconds). Raises DataError for windows of several
    lengths or a file that is no model, SetupError when this machine cannot compile, ToolError when the portable
    kernels did not run. A processor that lacks what they need is compared with itself only, without repacking.
    """
    import numpy as np

    if len({len(window) for window in windows}) != 1:
        raise DataError("the windows of a noise floor must be of one length, and there must be one")
    threads = threads or default_threads()
    native = runtime.native().llama_print_system_info().decode().strip(" |")
    with tempfile.TemporaryDirectory(prefix="edgeft-floor-") as name:
        folder = Path(name)
        _write(gguf, windows, folder / "plain.f32", threads=threads, repack=False)
        others = {"repack on / off": (folder / "plain.f32", native)}
        if runs_portable(platform.machine(), _cpuinfo()):
            portable = _portable(gguf, windows, threads, folder)
            others[f"native / portable {platform.machine()}"] = (folder / "portable.f32", portable)
        found: dict[str, list[tuple[float, float]]] = {what: [] for what in others}
        with Decoder(gguf, n_ctx=len(windows[0]), threads=threads) as decoder:
            for number, window in enumerate(windows):
                progress.report("kernel noise: native", number, len(windows), unit="windows")
                rows = scored_logits(decoder, window)
                targets = window[first_scored(len(window)) + 1 :]
                for what, (path, _) in others.items():
                    shape = (len(windows), *rows.shape)
                    theirs = np.memmap(path, np.float32, mode="r", shape=shape)[number]
                    found[what].append(_difference(rows, theirs, targets))
    pairs = [
        Pair(what=what, kernels=kernels, kld=fmean(k for k, _ in found[what]), same_top=fmean(t for _, t in found[what]))
        for what, (_, kernels) in others.items()
    ]  # fmt: skip
    return Floor(pairs=tuple(pairs), kernels=native, tokens=len(windows) * len(rows))


def runs_portable(machine: str, cpuinfo: str) -> bool:
    """Whether a processor has what the portable kernels need: on x86-64 AVX and F16C, which is since 2012.

    `cpuinfo` is the text of /proc/cpuinfo.
    """
    flags = next((x.partition(":")[2].split() for x in cpuinfo.splitlines() if x.startswith("flags")), [])
    return machine != "x86_64" or {"avx", "f16c"} <= set(flags)


def _cpuinfo() -> str:
    path = Path("/proc/cpuinfo")
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _difference(
    ours: NDArray[np.float32], theirs: NDArray[np.float32], targets: Sequence[int]
) -> tuple[float, float]:
    """Mean KLD and share of equal top tokens over one window's rows [scored, n_vocab]."""
    kld = same = 0.0
    for block in blocks(*ours.shape):
        found = compare_logits(ours[block], theirs[block], targets[block])
        kld += float(found.kld.sum())
        same += float(found.same_top.sum())
    return kld / len(ours), same / len(ours)


def _write(
    gguf: Path, windows: Sequence[Sequence[int]], path: Path, *, threads: int, repack: bool = True
) -> None:
    """Write the scored logits [windows, scored, n_vocab] as plain float32."""
    with (
        Decoder(gguf, n_ctx=len(windows[0]), threads=threads, repack=repack) as decoder,
        path.open("wb") as to,
    ):
        for number, window in enumerate(windows):
            progress.report("kernel noise: without repacking", number, len(windows), unit="windows")
            scored_logits(decoder, window).tofile(to)


def _portable(gguf: Path, windows: Sequence[Sequence[int]], threads: int, folder: Path) -> str:
    """Let a process with the portable kernels write portable.f32 into the folder; what its kernels are."""
    libraries = build.ensure("portable")
    job = {
        "gguf": os.fspath(gguf.resolve()), "windows": [[int(i) for i in window] for window in windows],
        "threads": threads,
        "libraries": os.fspath(libraries),
    }  # fmt: skip
    (folder / "job.json").write_text(json.dumps(job), encoding="utf-8")
    progress.report("kernel noise: portable kernels")
    # libllama and libggml ask for libggml-cpu.so.0 by RUNPATH, which the loader reads after this variable.
    searched = [os.fspath(libraries), *filter(None, [os.environ.get("LD_LIBRARY_PATH")])]
    package = os.fspath(Path(__file__).parents[2])
    run(
        [sys.executable, "-m", "edgeft.llamacpp.kernels", os.fspath(folder / "job.json")],
        env={
            "LD_LIBRARY_PATH": os.pathsep.join(searched),
            "PYTHONPATH": os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")])),
        },
    )
    return (folder / "kernels.txt").read_text(encoding="utf-8")


def _child(path: Path) -> None:
    """What runs in the process of its own."""
    job = json.loads(path.read_text(encoding="utf-8"))
    kernels = runtime.native().llama_print_system_info().decode().strip(" |")
    _assert_loaded(Path(job["libraries"]))
    path.with_name("kernels.txt").write_text(kernels, encoding="utf-8")
    _write(Path(job["gguf"]), job["windows"], path.with_name("portable.f32"), threads=job["threads"])


def _assert_loaded(libraries: Path) -> None:
    """Raises ToolError when this process took its kernels from elsewhere: a floor of 0 would look like good news."""
    maps = Path("/proc/self/maps").read_text(encoding="utf-8")
    loaded = {line.split(maxsplit=5)[-1] for line in maps.splitlines() if "libggml-cpu" in line}
    if {Path(name).parent for name in loaded} != {libraries.resolve()}:
        raise ToolError(f"the kernels were loaded from {sorted(loaded)}, not from {libraries}")


if __name__ == "__main__":
    _child(Path(sys.argv[1]))
