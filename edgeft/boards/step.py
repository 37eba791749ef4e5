"""The device step: a shipped file scored by the stock tool in some place, with its speed, memory and temperature there."""

from __future__ import annotations

import hashlib
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edgeft import progress
from edgeft.boards import machine as machines
from edgeft.boards.machine import Machine
from edgeft.boards.place import Place
from edgeft.boards.program import Program
from edgeft.errors import SetupError, ToolError
from edgeft.llamacpp import stock
from edgeft.llamacpp.adapter import adapter_beside, lora_arguments
from edgeft.llamacpp.base_file import Base, read_base

DECODED = 256
"""Tokens that are decoded one by one for the speed: the least context that llama.cpp makes."""
THROTTLED = {0: "under-voltage", 1: "frequency capped", 2: "throttled", 3: "soft temperature limit"}
"""Bits of `vcgencmd get_throttled` that hold now; 16 higher stands that it happened since the start."""
LEAST_SCORED = 100
"""The stock tool prints no statistics of fewer scored tokens."""

WATCH = r"""
heat() { cat /sys/class/thermal/thermal_zone*/temp 2>/dev/null | sort -n | tail -n 1; }
slow() { vcgencmd get_throttled 2>/dev/null | sed -n 's/^throttled=//p'; }
[ -x {program} ] || chmod 700 {program} || exit 1
guard=; setpriv --pdeathsig KILL true 2>/dev/null && guard='setpriv --pdeathsig KILL'
log=$(mktemp ./log.XXXXXX) || exit 1
echo "edgeft heat=$(heat)"
n=0
$guard {command} >"$log" 2>&1 &
p=$!
trap 'kill -9 $p 2>/dev/null; rm -f "$log"; exit 1' HUP INT TERM PIPE
while kill -0 $p 2>/dev/null; do
  echo "edgeft peak_kb=$(sed -n 's/^VmHWM:[^0-9]*\([0-9]*\).*/\1/p' /proc/$p/status 2>/dev/null)"
  echo "edgeft heat=$(heat)"
  echo "edgeft windows=$(grep -c '±' "$log")"
  n=$((n + 1))
  pause=0.05
  [ $n -lt 20 ] || pause=0.3
  [ $n -lt 30 ] || pause=1
  sleep $pause 2>/dev/null || sleep 1
done
wait $p
echo "edgeft status=$?"
echo "edgeft throttled=$(slow)"
echo "edgeft log follows"
cat "$log"
rm -f "$log"
"""
"""Runs a command, tells how it does and prints its output at the end. A short run is looked at more often, else its peak
would be missed; a long one less, since looking costs the board something too."""


@dataclass(frozen=True, kw_only=True)
class Shipped:
    """What is run, and against what."""

    model: Path
    """model.gguf; an adapter.gguf beside it belongs to it."""
    bases: Mapping[str, Path]
    """The reference's base files by text, already cut to the windows that shall be scored."""
    text: Path | None = None
    """Any plain text of 512 tokens or more, to measure how fast tokens are decoded; None: do not."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What a machine did with a file. Speeds are tokens per second; None where it was not measured."""

    where: str
    """"local", "qemu" or "ssh"."""
    emulated: bool
    """Speeds are the emulator's and memory holds the emulator too: neither says anything of a board."""
    machine: Machine
    program: str
    program_sha256: str
    threads: int
    logs: Mapping[str, str]
    """The tool's whole output, by text."""
    windows: Mapping[str, int]
    prompt: float | None
    """While scoring whole windows, half of whose tokens have their logits computed: a prompt needs fewer."""
    decode: float | None
    """One token after the other, each with logits, over a context that grows to DECODED."""
    peak_scoring: int | None
    """Largest resident memory of the process in bytes (VmHWM); the file's mapped pages count."""
    peak_decoding: int | None
    """The same with a context of DECODED and batches of one: what a model needs at the least."""
    hottest_c: float | None
    throttled: str
    """What a Raspberry Pi said after the work, in words; "" when it is no Pi."""

    def facts(self) -> dict[str, Any]:
        """Everything but the logs, ready for JSON."""
        found = asdict(self)
        return {k: v for k, v in found.items() if k != "logs"} | {
            "log_sha256": {
                name: hashlib.sha256(text.encode()).hexdigest() for name, text in self.logs.items()
            }
        }


def measure(place: Place, there: Machine, program: Program, shipped: Shipped, *, threads: int) -> Measured:
    """Run the step. `there` is what `place` said of itself.

    Raises SetupError when the machine cannot run it (processor, memory, disk), ToolError when the tool or the connection
    dies, DataError when the base files or the adapter are not right.
    """
    bases = {name: read_base(path) for name, path in shipped.bases.items()}
    adapter = adapter_beside(shipped.model)
    given = [program.path, shipped.model, *([adapter] if adapter else []), *shipped.bases.values(),
             *([shipped.text] if shipped.text else [])]  # fmt: skip
    names = {path: _sha256(path) for path in given}
    files = {name: path for path, name in names.items()}
    machines.refuse(
        there, program.isa or "", memory=_memory(shipped.model, adapter, bases),
        disk=missing(place, files) + 64_000_000,
    )  # fmt: skip
    place.put(files)
    known = {os.fspath(path): f"./{name}" for path, name in names.items()}
    logs, runs = {}, []
    for name, base in bases.items():
        argv = stock.command(
            [os.fspath(program.path)], base.path, shipped.model, n_ctx=base.n_ctx, threads=threads
        )
        ran = _run(place, argv, known, f"score the {name} text", len(base.windows))
        stock.parse(ran.log)  # complaints become errors here, before more is run
        logs[name] = ran.log
        runs.append(ran)
    decoding = None
    if shipped.text:
        argv = _decoding(program.path, shipped, threads)
        decoding = _run(place, argv, known, "decode one by one", 0)
    heat = [r.hottest for r in (*runs, *([decoding] if decoding else [])) if r.hottest is not None]
    peaks = [r.peak for r in runs if r.peak]
    return Measured(
        where=place.where, emulated=bool(place.before) or there.emulated, machine=there, program=program.name, program_sha256=names[program.path],
        threads=threads, logs=logs, windows={name: len(base.windows) for name, base in bases.items()},
        prompt=_speed(runs[0].log, "prompt eval"), decode=_speed(decoding.log, "eval") if decoding else None,
        peak_scoring=max(peaks, default=None), peak_decoding=decoding.peak if decoding else None,
        hottest_c=max(heat, default=None), throttled=(decoding or runs[-1]).throttled,
    )  # fmt: skip


def missing(place: Place, files: Mapping[str, Path]) -> int:
    """Bytes that a place has yet to be sent; 0 where files are linked."""
    counted = getattr(place, "missing", None)
    return int(counted(files)) if counted else 0


@dataclass(frozen=True, kw_only=True)
class _Ran:
    log: str
    peak: int | None
    hottest: float | None
    throttled: str


def _run(place: Place, argv: Sequence[str], known: Mapping[str, str], doing: str, windows: int) -> _Ran:
    """Run a command there, with paths replaced by what the files are called there."""
    lines: list[str] = []
    heat: list[float] = []

    def listen(line: str) -> None:
        lines.append(line)
        _, _, value = line.strip().removeprefix("edgeft ").partition("=")
        if line.startswith("edgeft heat=") and re.fullmatch(r"-?\d+", value):
            heat.append(int(value) / 1000)  # millidegrees: the kernel's sysfs-api of thermal zones
        if line.startswith("edgeft windows=") and value.isdigit():
            unit = "windows" if windows else ""
            progress.report(doing, min(int(value), windows), windows, unit=unit)

    progress.report(doing)
    own = [known.get(word, word) for word in argv]
    command = shlex.join([*place.before, *own])
    script = WATCH.replace("{program}", shlex.quote(own[0])).replace("{command}", command)
    place.shell(script, listen)
    said, _, log = "".join(lines).partition("edgeft log follows\n")
    told = machines.told(
        re.sub(r"^edgeft peak_kb=\n", "", said, flags=re.MULTILINE)
    )  # it had ended just then
    if (status := told.get("status", "")) != "0":
        raise _died(status, log, doing)
    peak = told.get("peak_kb", "")
    return _Ran(
        log=log, peak=int(peak) * 1024 if peak.isdigit() and int(peak) else None, hottest=max(heat, default=None),
        throttled=_throttled(told.get("throttled", "")),
    )  # fmt: skip


def _died(status: str, log: str, doing: str) -> Exception:
    tail = "".join(log.splitlines(keepends=True)[-8:])
    if status == "132":  # 128 + SIGILL
        return SetupError(
            "llama-perplexity died of an illegal instruction: it was compiled for another processor than that one",
            hint="give the target that the board is: --target",
        )
    if status == "137":  # 128 + SIGKILL
        return SetupError(
            "llama-perplexity was killed there, most likely because memory ran out",
            hint="a smaller file, or swap",
        )
    return ToolError(f"{doing}: llama-perplexity exited with {status}:\n{tail}")


def _decoding(program: Path, shipped: Shipped, threads: int) -> list[str]:
    """The stock tool's strided perplexity in batches of one token, each of which has its logits computed: it decodes."""
    size = str(DECODED)
    return [
        os.fspath(program), "--ppl-stride", "1", "--chunks", "1", "-f", os.fspath(shipped.text or ""),
        "-m", os.fspath(shipped.model), *lora_arguments(shipped.model), "-c", size, "-b", "1", "-ub", "1",
        "-t", str(threads), "--no-warmup", "-lv", "4",
    ]  # fmt: skip


def _speed(log: str, what: str) -> float | None:
    """Tokens per second from the line of llama_perf_context_print; None when it has none or decoded nothing."""
    found = re.search(
        rf"llama_perf_context_print:\s+{what} time =\s+([\d.]+) ms /\s+(\d+) (?:runs|tokens)", log
    )
    if not found or not float(found[1]):
        return None
    return 1000 * int(found[2]) / float(found[1])


def _throttled(value: str) -> str:
    if not re.fullmatch(r"0x[0-9a-f]+", value):
        return ""
    bits = int(value, 16)
    now = [word for bit, word in THROTTLED.items() if bits >> bit & 1]
    before = [
        f"{word} since it was switched on"
        for bit, word in THROTTLED.items()
        if bits >> (bit + 16) & 1 and word not in now
    ]
    return ", ".join([*now, *before]) or "not throttled"


def _memory(model: Path, adapter: Path | None, bases: Mapping[str, Base]) -> int:
    """What scoring takes at the most: the file, a window's logits twice (llama.cpp's own and the tool's copy), 64 MB for
    the rest."""
    files = model.stat().st_size + (adapter.stat().st_size if adapter else 0)
    return files + max(2 * 4 * b.n_ctx * b.n_vocab for b in bases.values()) + 64_000_000


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
