"""llama.cpp's own llama-perplexity on a base file: how it is called, and what its printed statistics say.

It is the second opinion on our scoring, and the only one a board needs: copy the base file, the GGUF and the program
there, run `command`, and read the log with `parse`.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from edgeft.errors import DataError
from edgeft.llamacpp.adapter import lora_arguments
from edgeft.llamacpp.base_file import read_base
from edgeft.llamacpp.build import ensure
from edgeft.llamacpp.threads import default_threads
from edgeft.tool import run


@dataclass(frozen=True, kw_only=True)
class Running:
    """A line of the table that llama-perplexity prints while it works: means over all windows up to this one."""

    window: int
    """Counted from 1."""
    ppl: float
    """Printed with four decimals."""
    log_ratio: float
    """ln(PPL / PPL of the base file), nats a token, with five decimals."""
    kld: float
    """With five decimals."""
    same_top: float


@dataclass(frozen=True, kw_only=True)
class StockResult:
    """What llama-perplexity prints, with shares in 0..1 instead of per cent and KLD in nats a token."""

    ppl: float
    ppl_base: float
    """Of the base file's log-probabilities: their 16 bits move it in the third digit."""
    ppl_ratio: float
    kld: float
    """The mean."""
    kld_error: float
    """One standard error of the mean, for tokens that are independent (those of one window are not)."""
    kld_median: float
    kld_99: float
    kld_999: float
    kld_max: float
    rms_dp: float
    """Root mean square of the change in the true token's probability."""
    same_top: float
    kernels: str
    """The processor features the program was compiled for, in its words; "" when the log does not say."""
    log_ratio: float
    """ln of `ppl_ratio`, with six decimals."""
    windows: int | None = None
    """Of the base file, as the tool announces them before it starts; None when that line is not in the log."""
    n_ctx: int | None = None
    """The same, tokens in a window."""
    running: tuple[Running, ...] = ()
    """Its table. Whole when it has `windows` lines."""
    types: dict[str, int] = field(default_factory=dict)
    """Tensors of the file that was run by ggml type ("Q8_0"), where the log was asked for them (-lv 4)."""


def run_stock(base: Path, gguf: Path, *, program: Sequence[str] = (), threads: int = 0) -> StockResult:
    """Score a GGUF file against a base file with the stock tool.

    `program` is the llama-perplexity to run, with what must stand before it (qemu); without it, the one of the
    pinned source, compiled if it is not there yet. Raises DataError when the base file is none or the tool
    complains (it exits with 0 all the same), SetupError when the program cannot be had, ToolError when it dies.
    """
    n_ctx = read_base(base).n_ctx
    tool = list(program) or [os.fspath(ensure("perplexity") / "llama-perplexity")]
    return parse(run(command(tool, base, gguf, n_ctx=n_ctx, threads=threads or default_threads())))


def command(program: Sequence[str], base: Path, gguf: Path, *, n_ctx: int, threads: int) -> list[str]:
    """The command line that scores `gguf` against `base`.

    `n_ctx` is the base file's. The tool takes window length and tokens from the file's header, but the context and the
    cache from -c: less than the file's fails to decode, more changes nothing. One window a batch (-b, -ub), as our
    own scoring computes it; the tool's default packs several short ones into one batch. -lv 4 makes the log say which
    types the file has that was run. An adapter that lies beside the file belongs to it; raises DataError when it is another
    base's.
    """
    size = str(n_ctx)
    return [
        *program, "--kl-divergence", "--kl-divergence-base", os.fspath(base), "-m", os.fspath(gguf),
        *lora_arguments(gguf), "-c", size, "-b", size, "-ub", size, "-t", str(threads), "--no-warmup", "-lv", "4",
    ]  # fmt: skip


def parse(text: str) -> StockResult:
    """Read the log of `llama-perplexity --kl-divergence`, from this machine or pasted from another.

    Raises DataError when the tool complained, when it printed no statistics (it prints none of fewer than 100 scored
    tokens), or when a number in them is not finite: with another vocabulary it goes on and prints a KLD of inf.
    """
    if complaints := _COMPLAINT.findall(text):
        raise DataError(f"llama-perplexity: {complaints[-1].strip()}")
    if "=== KL divergence statistics ===" not in text:
        raise DataError(
            "this log of llama-perplexity holds no statistics of the KL divergence",
            hint="it prints them at its end, for 100 scored tokens or more: base files of 4 windows of 64 tokens, say",
        )
    percent = 0.01
    found = {
        "ppl": _number(text, "Mean PPL(Q)"),
        "ppl_base": _number(text, "Mean PPL(base)"),
        "ppl_ratio": _number(text, "Mean PPL(Q)/PPL(base)"),
        "kld": _number(text, "Mean KLD"),
        "kld_error": _number(text, "Mean KLD", error=True),
        "kld_median": _number(text, "Median KLD"),
        "kld_99": _number(text, "99.0% KLD"),
        "kld_999": _number(text, "99.9% KLD"),
        "kld_max": _number(text, "Maximum KLD"),
        "rms_dp": percent * _number(text, "RMS Δp"),
        "same_top": percent * _number(text, "Same top p"),
        "log_ratio": _number(text, "Mean ln(PPL(Q)/PPL(base))"),
    }
    kernels = re.search(r"system_info:.*?\|\s*(.*)", text)
    announced = re.search(r"computing over (\d+) chunks, n_ctx=(\d+)", text)
    types = {name.upper(): int(count) for name, count in re.findall(r"- type\s+(\w+):\s+(\d+) tensors", text)}
    return StockResult(
        kernels=kernels[1].strip(" |\r") if kernels else "", windows=int(announced[1]) if announced else None,
        n_ctx=int(announced[2]) if announced else None, running=_running(text), types=types, **found,
    )  # fmt: skip


def _running(text: str) -> tuple[Running, ...]:
    """The table's lines. The last five columns are pairs "value ± error", the last two of them in per cent."""
    pair = r"\s+(-?[\d.]+)\s+\S+\s+-?(?:[\d.]+|nan|inf)"
    line = re.compile(rf"^\s*(\d+){pair * 3}{pair}\s+%{pair}\s+%\s*$", re.MULTILINE)
    return tuple(
        Running(
            window=int(w), ppl=float(ppl), log_ratio=float(ratio), kld=float(kld), same_top=0.01 * float(top)
        )
        for w, ppl, ratio, kld, _, top in line.findall(text)
    )


_COMPLAINT = re.compile(r"\bkl_divergence ?: (?!computing over|calculated n_seq|[\d.]+ seconds per pass)(.*)")
"""Every line of the tool's own but the three it says when all is well."""


def _number(text: str, label: str, *, error: bool = False) -> float:
    """The number after a label, or the one after its ±. Raises DataError when it is not there or not finite."""
    words = r"\s+".join(re.escape(word) for word in label.split())
    number = r"(-?(?:[\d.]+|inf|nan))"
    found = re.search(rf"{words}\s*:\s+{number}(?:\s+\S+\s+{number})?", text)
    if not found or (error and found[2] is None):
        raise DataError(f"this log of llama-perplexity is cut off: {label!r} is not in it")
    if not math.isfinite(value := float(found[2 if error else 1])):
        hint = "is the base file made with this vocabulary, and the model intact?"
        raise DataError(f"llama-perplexity measured {found[0]!r}", hint=hint)
    return value
