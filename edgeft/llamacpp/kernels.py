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
from edgeft.llamacpp.base_file import first_scored, in_blocks
from edgeft.llamacpp.decode import Decoder
from edgeft.llamacpp.score import compare_logits, scored_logits
from edgeft.llamacpp.threads import default_threads
from edgeft.tool import run

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from edgeft.llamacpp.score import Logits


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


def floor(
    gguf: Path, windows: Sequence[Sequence[int]], *, threads: int = 0, native: Path | None = None,
    adapter: Path | None = None,
) -> Floor:  # fmt: skip
    """Run a file under this machine's kernels, the same without weight repacking, and the portable ones.

    With `adapter`, the file is its base, and the two are run together.

    `windows` are of equal length, as score.windows cuts them; their second halves are scored, at full precision and
    not through a base file, whose 16 bits cost as much as F16 kernels differ by. One model and two windows' logits are
    in memory at a time; the others wait in a temporary folder, 3 * 4 bytes * scored tokens * vocabulary.
    `native`, if it is known already, is a file of what `remembered` wrote: this machine's own logits of these windows.
    Compiles the portable kernels when they are not there (50 CPU seconds). Raises DataError for windows of several
    lengths or a file that is no model, SetupError when this machine cannot compile, ToolError when the portable
    kernels did not run. A processor that lacks what they need is compared with itself only, without repacking.
    """
    if len({len(window) for window in windows}) != 1:
        raise DataError("the windows of a noise floor must be of one length, and there must be one")
    threads = threads or default_threads()
    own = runtime.native().llama_print_system_info().decode().strip(" |")
    n_scored = len(windows[0]) - 1 - first_scored(len(windows[0]))
    with tempfile.TemporaryDirectory(prefix="edgeft-floor-") as name:
        folder = Path(name)
        _write(gguf, windows, folder / "plain.f32", threads=threads, repack=False, adapter=adapter)
        others = {"repack on / off": (folder / "plain.f32", own)}
        if runs_portable(platform.machine(), _cpuinfo()):
            portable = _portable(gguf, windows, threads, folder, adapter)
            others[f"native / portable {platform.machine()}"] = (folder / "portable.f32", portable)
        if native is None:
            native = folder / "native.f32"
            _write(gguf, windows, native, threads=threads, adapter=adapter)
        found: dict[str, list[tuple[float, float]]] = {what: [] for what in others}
        for number, window in enumerate(windows):
            targets = window[first_scored(len(window)) + 1 :]
            for what, (path, _) in others.items():
                ours, theirs = (_logits(p, number, len(windows), n_scored) for p in (native, path))
                found[what].append(_difference(ours, theirs, targets))
    pairs = [
        Pair(what=what, kernels=kernels, kld=fmean(k for k, _ in found[what]), same_top=fmean(t for _, t in found[what]))
        for what, (_, kernels) in others.items()
    ]  # fmt: skip
    return Floor(pairs=tuple(pairs), kernels=own, tokens=len(windows) * n_scored)


def remembered(logits: Logits, most: int, to: Path) -> Logits:
    """`logits`, with those of the first `most` windows written to the file `to` on the way, for `floor`."""
    to.write_bytes(b"")
    written = 0

    def asked(window: Sequence[int]) -> NDArray[np.float32]:
        nonlocal written
        rows = logits(window)
        if written < most:
            with to.open("ab") as stream:
                rows.tofile(stream)
            written += 1
        return rows

    return asked


def between(native: Path, logits: Logits, windows: Sequence[Sequence[int]]) -> tuple[float, float]:
    """Mean KLD and share of equal top tokens between what `remembered` wrote of these windows and what `logits` says."""
    scored = len(windows[0]) - 1 - first_scored(len(windows[0]))
    found = [
        _difference(
            _logits(native, number, len(windows), scored),
            logits(window),
            window[first_scored(len(window)) + 1 :],
        )
        for number, window in enumerate(windows)
    ]
    return fmean(k for k, _ in found), fmean(t for _, t in found)


def runs_portable(machine: str, cpuinfo: str) -> bool:
    """Whether a processor has what the portable kernels need: on x86-64 AVX and F16C, which is since 2012.

    `cpuinfo` is the text of /proc/cpuinfo.
    """
    flags = next((x.partition(":")[2].split() for x in cpuinfo.splitlines() if x.startswith("flags")), [])
    return machine != "x86_64" or {"avx", "f16c"} <= set(flags)


def _cpuinfo() -> str:
    path = Path("/proc/cpuinfo")
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _logits(path: Path, window: int, windows: int, scored: int) -> NDArray[np.float32]:
    """One window's logits [scored, n_vocab] of a file that holds those of `windows`. Raises DataError for other sizes."""
    import numpy as np

    n_vocab, rest = divmod(path.stat().st_size, 4 * windows * scored)
    if rest or not n_vocab:
        raise DataError(f"{path} does not hold the logits of {windows} windows of {scored} scored tokens")
    held = np.memmap(path, np.float32, mode="r", shape=(windows, scored, n_vocab))
    found: NDArray[np.float32] = held[window]
    return found


def _difference(
    ours: NDArray[np.float32], theirs: NDArray[np.float32], targets: Sequence[int]
) -> tuple[float, float]:
    """Mean KLD and share of equal top tokens over one window's rows [scored, n_vocab]."""
    if ours.shape != theirs.shape:
        raise DataError(f"logits of {ours.shape} numbers cannot be compared with {theirs.shape}")

    def of(block: slice) -> tuple[float, float]:
        found = compare_logits(ours[block], theirs[block], targets[block])
        return float(found.kld.sum()), float(found.same_top.sum())

    kld, same = (sum(parts) for parts in zip(*in_blocks(of, *ours.shape), strict=True))
    return kld / len(ours), same / len(ours)


def _write(
    gguf: Path, windows: Sequence[Sequence[int]], path: Path, *, threads: int, repack: bool = True,
    adapter: Path | None = None,
) -> None:  # fmt: skip
    """Write the scored logits [windows, scored, n_vocab] as plain float32."""
    with (
        Decoder(gguf, n_ctx=len(windows[0]), threads=threads, repack=repack, adapter=adapter) as decoder,
        path.open("wb") as to,
    ):
        for number, window in enumerate(windows):
            progress.report("kernel noise", number, len(windows), unit="windows")
            scored_logits(decoder, window).tofile(to)


def _portable(
    gguf: Path, windows: Sequence[Sequence[int]], threads: int, folder: Path, adapter: Path | None
) -> str:
    """Let a process with the portable kernels write portable.f32 into the folder; what its kernels are."""
    libraries = build.ensure("portable")
    job = {
        "gguf": os.fspath(gguf.resolve()), "windows": [[int(i) for i in window] for window in windows],
        "threads": threads,
        "libraries": os.fspath(libraries),
        "adapter": os.fspath(adapter.resolve()) if adapter else "",
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
    adapter = Path(job["adapter"]) if job["adapter"] else None
    out = path.with_name("portable.f32")
    _write(Path(job["gguf"]), job["windows"], out, threads=job["threads"], adapter=adapter)


def _assert_loaded(libraries: Path) -> None:
    """Raises ToolError when this process took its kernels from elsewhere: a floor of 0 would look like good news."""
    maps = Path("/proc/self/maps").read_text(encoding="utf-8")
    loaded = {line.split(maxsplit=5)[-1] for line in maps.splitlines() if "libggml-cpu" in line}
    if {Path(name).parent for name in loaded} != {libraries.resolve()}:
        raise ToolError(f"the kernels were loaded from {sorted(loaded)}, not from {libraries}")


if __name__ == "__main__":
    _child(Path(sys.argv[1]))
