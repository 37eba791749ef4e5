"""Our scoring beside the stock llama-perplexity's, on x86-64 (or whatever this is) and on an emulated Cortex-A76.

    python benchmarks/stock_tool.py [--windows 4] [--tokens 64] [--types Q4_0,Q4_K_M,Q8_0] [--text FILE]

SmolLM2-135M-Instruct out of its package. First table: each file against the checkpoint as torch runs it, from one base
file. Second: each file against itself under this machine's kernels, beside the noise floor measured here. Prints
tables; nothing is asserted. Emulation is about 75 times slower than the machine: 4 windows of 64 tokens take a minute
or two a file, and tokens a second of an emulated board say nothing. F16 takes eleven minutes, for qemu computes half
precision in software; ask for it with --types.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import re
import shutil
import tempfile
import tomllib
from pathlib import Path

from edgeft import llamacpp
from edgeft.errors import DataError, EdgeftError
from edgeft.llamacpp import kernels, score
from edgeft.llamacpp.base_file import write_base
from edgeft.llamacpp.build import PERPLEXITY_A76, ensure
from edgeft.llamacpp.convert import to_gguf
from edgeft.llamacpp.decode import Decoder
from edgeft.llamacpp.quantize import quantize
from edgeft.llamacpp.stock import run_stock
from edgeft.parity.suite import GENERAL

RECIPE = Path(__file__).parent.parent / "recipes" / "minimal.toml"
QEMU = "qemu-aarch64-static"


def main() -> None:
    parser = argparse.ArgumentParser(description="ours beside the stock llama-perplexity")
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--types", default="Q4_0,Q4_K_M,Q8_0")
    parser.add_argument("--text", type=Path, default=GENERAL)
    asked = parser.parse_args()
    llamacpp.activate()
    programs, lacking = stock_programs()
    print(f"{processor()}, {os.cpu_count()} cores; {datetime.date.today()}; llama.cpp {llamacpp.load().id}")
    print(
        f"{asked.windows} windows of {asked.tokens} tokens of {asked.text.name}, second halves scored, 1 thread"
    )
    with tempfile.TemporaryDirectory(prefix="edgeft-stock-") as name:
        folder = Path(name)
        windows = prepare(folder, asked.text, asked.tokens, asked.windows)
        files = {kind: file(folder, kind) for kind in asked.types.split(",")}
        print("\nAgainst the checkpoint in torch, float32, through one base file")
        print(
            f"{'file':8} {'scored by':32} {'PPL':>9} {'PPL ratio':>10} {'mean KLD':>10} {'KLD 99%':>9} {'same top':>9}"
        )
        for kind, path in files.items():
            with Decoder(path, n_ctx=asked.tokens, threads=1) as decoder:
                s = score.compare(folder / "torch.kld", decoder).summary()
            row(kind, "edgeft", s["ppl"], s["ppl_ratio"], s["kld_mean"], s["kld_p99"], s["same_top"])
            for who, program in programs.items():
                found = run_stock(folder / "torch.kld", path, program=program, threads=1)
                row(kind, who, found.ppl, found.ppl_ratio, found.kld, found.kld_99, found.same_top)
        print(
            "\nAgainst itself under this machine's kernels; a base file's 16 bits are the least that can be seen"
        )
        print(f"{'file':8} {'other kernels':32} {'mean KLD':>10} {'same top':>9}")
        for kind, path in files.items():
            with Decoder(path, n_ctx=asked.tokens, threads=1) as decoder:
                base(
                    folder / "own.kld",
                    windows,
                    decoder.n_vocab,
                    lambda w, d=decoder: score.scored_logits(d, w),
                )
            for pair in kernels.floor(path, windows, threads=1).pairs:
                print(f"{kind:8} {pair.what:32} {pair.kld:>10.2e} {pair.same_top:>9.4f}", flush=True)
            for who, program in programs.items():
                found = run_stock(folder / "own.kld", path, program=program, threads=1)
                print(f"{kind:8} {who:32} {found.kld:>10.2e} {found.same_top:>9.4f}", flush=True)
    for sentence in lacking:
        print(f"\n{sentence}")


def row(kind: str, who: str, ppl: float, ratio: float, kld: float, kld_99: float, same: float) -> None:
    print(
        f"{kind:8} {who:32} {ppl:>9.4f} {ratio:>10.5f} {kld:>10.6f} {kld_99:>9.5f} {same:>9.4f}", flush=True
    )


def stock_programs() -> tuple[dict[str, list[str]], list[str]]:
    """The command lines of the stock tools this machine can run, and why others are not among them."""
    programs = {
        f"llama-perplexity {platform.machine()}": [os.fspath(ensure("perplexity") / "llama-perplexity")]
    }
    try:
        if not shutil.which(QEMU):
            return programs, [f"No aarch64: {QEMU} is not installed (sudo apt install qemu-user-static)."]
        PERPLEXITY_A76.find()
        tool = ensure("perplexity-a76") / "llama-perplexity"
    except EdgeftError as error:
        return programs, [f"No aarch64: {error} ({error.hint})."]
    programs["llama-perplexity A76, emulated"] = [QEMU, "-cpu", "cortex-a76", os.fspath(tool)]
    return programs, []


def prepare(folder: Path, text: Path, n_ctx: int, count: int) -> list[list[int]]:
    """Write the checkpoint, its F16 GGUF and its base file; the windows of the text."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from edgeft.checkpoint.dequantize import gguf_to_checkpoint
    from edgeft.checkpoint.package import package_file
    from edgeft.parity.speakers import Torch

    gguf_to_checkpoint(
        package_file(**tomllib.loads(RECIPE.read_text(encoding="utf-8"))["base"]), folder / "hf"
    )
    to_gguf(folder / "hf", folder / "F16.gguf", outtype="f16")
    tokenizer = AutoTokenizer.from_pretrained(folder / "hf")
    windows = score.windows(tokenizer(text.read_text(encoding="utf-8"))["input_ids"], n_ctx, at_most=count)
    if len(windows) < count:
        raise DataError(f"{text} has {len(windows)} windows of {n_ctx} tokens, not {count}")
    model = AutoModelForCausalLM.from_pretrained(folder / "hf", dtype=torch.float32)
    speaker = Torch(model, tokenizer)
    base(folder / "torch.kld", windows, speaker.n_vocab, speaker.logits)
    return windows


def base(path: Path, windows: list[list[int]], n_vocab: int, logits: score.Logits) -> None:
    write_base(
        path, n_ctx=len(windows[0]), n_vocab=n_vocab, chunks=windows, logits=(logits(window) for window in windows)
    )  # fmt: skip


def file(folder: Path, kind: str) -> Path:
    path = folder / f"{kind}.gguf"
    if not path.exists():
        quantize(folder / "F16.gguf", path, kind)
    return path


def processor() -> str:
    info = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.*)$", info.read_text(), re.MULTILINE) if info.is_file() else None
    return f"{found[1] if found else platform.processor() or 'processor'} ({platform.machine()})"


if __name__ == "__main__":
    main()
