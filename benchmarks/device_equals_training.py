"""How far what a device computes is from what was computed at training time, for one file, and what that distance is made of.

    python benchmarks/device_equals_training.py                       # SmolLM2-135M out of its package, four types
    python benchmarks/device_equals_training.py --checkpoint DIR --plain F16.gguf FILE.gguf ... [--adapter PEFT_DIR]
                             [--windows 8] [--tokens 512] [--text FILE] [--parts distances,products,emulated]

`--checkpoint` and `--plain` (its 16- or 32-bit GGUF) tell which tensor is which; every number of the torch model is that
of the FILE. A mode C file is a FILE like any other. For mode B, FILE is the base, adapter.gguf lies beside it, and
`--adapter` is the same adapter as PEFT keeps it. Prints tables; nothing is asserted:

distances   mean KLD(torch || llama.cpp), nats a token, from float32 logits of the second halves of the windows. The packed
            file against torch as it trained, and against torch rounding activations and cache as llama.cpp does; the
            weights written out as F32, against torch as it trained and with its cache rounded, and as F16; the file's
            noise floor (edgeft.llamacpp.kernels).
products    each product by itself, given the very input that llama.cpp had
emulated    the stock llama-perplexity here and on an emulated Cortex-A76, on 4 windows of 64 tokens; floor on the same
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import math
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from stock_tool import base as write
from stock_tool import file as quantized
from stock_tool import prepare, processor, stock_programs

from edgeft import llamacpp
from edgeft.grid import adapter as adapters
from edgeft.grid import model as grid
from edgeft.grid import placement
from edgeft.grid.activations import activation_type, install_layer, simulate
from edgeft.grid.linear import GridLinear, widen
from edgeft.llamacpp import header, kernels, score
from edgeft.llamacpp.decode import Decoder
from edgeft.llamacpp.imatrix import Collector
from edgeft.llamacpp.quantize import quantize
from edgeft.llamacpp.stock import run_stock
from edgeft.parity.speakers import Torch
from edgeft.parity.suite import GENERAL


def main() -> None:
    parser = argparse.ArgumentParser(description="what a device computes, beside what training computed")
    parser.add_argument("files", type=Path, nargs="*")
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--plain", type=Path)
    parser.add_argument("--adapter", type=Path)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--types", default="Q4_0,Q4_K_M,Q8_0,IQ4_XS")
    parser.add_argument("--text", type=Path, default=GENERAL)
    parser.add_argument("--parts", default="distances,products", help="of distances, products, emulated")
    asked = parser.parse_args()
    if asked.files and not (asked.checkpoint and asked.plain):
        parser.error("files need --checkpoint and --plain")
    llamacpp.activate()
    print(f"{processor()}; {datetime.date.today()}; llama.cpp {llamacpp.load().id}")
    with tempfile.TemporaryDirectory(prefix="edgeft-device-") as name:
        folder = Path(name)
        if not asked.files:
            prepare(folder, asked.text, asked.tokens, 1)
            asked.checkpoint, asked.plain = folder / "hf", folder / "F16.gguf"
            asked.files = [quantized(folder, kind) for kind in asked.types.split(",")]
        case = Case(folder, asked.checkpoint, asked.plain, asked.adapter)
        windows = case.windows(asked.text, asked.tokens, asked.windows)
        print(
            f"{len(windows)} windows of {asked.tokens} tokens of {asked.text.name}, second halves scored, one thread"
        )
        parts: dict[str, Callable[[], None]] = {
            "distances": lambda: distances(case, asked.files, windows),
            "products": lambda: alone(asked.files, windows[0][:128]),
            "emulated": lambda: emulated(case, asked.files, case.windows(asked.text, 64, 4)),
        }
        for part in asked.parts.split(","):
            parts[part]()


@dataclass(frozen=True)
class Case:
    """A model, and how its files are led back to it."""

    folder: Path
    checkpoint: Path
    plain: Path
    adapter: Path | None

    def windows(self, text: Path, n_ctx: int, count: int) -> list[list[int]]:
        ids = self.tokenizer()(text.read_text(encoding="utf-8"))["input_ids"]
        return score.windows(ids, n_ctx, at_most=count)

    def tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.checkpoint)

    def speaker(self, file: Path) -> Torch:
        """The model in torch, with the numbers of the file, and the adapter on it."""
        model = grid.load(
            self.checkpoint, file, self.plain, placement=placement.placement(self.checkpoint, self.plain)
        )
        if self.adapter:
            from peft import PeftModel

            model = PeftModel.from_pretrained(model, os.fspath(self.adapter)).eval()
        return Torch(model, self.tokenizer())

    def beside(self, file: Path) -> Path | None:
        """The adapter.gguf that lies beside the file; for a file of this benchmark, one written for it now."""
        if not self.adapter:
            return None
        if file.parent != self.folder:
            return file.with_name("adapter.gguf")
        path = file.with_suffix(".adapter")
        adapters.write(self.adapter, self.checkpoint, file, path)
        return path


class Kept:
    """Logits of windows on the disk, float32 [windows, scored, n_vocab]."""

    def __init__(self, path: Path, windows: Sequence[Sequence[int]], logits: Callable[..., Any]) -> None:
        with path.open("wb") as stream:
            for window in windows:
                logits(window).tofile(stream)
        scored = len(windows[0]) - 1 - score.first_scored(len(windows[0]))
        self.windows, self.path = windows, path
        self.rows = np.memmap(path, np.float32, mode="r").reshape(len(windows), scored, -1)

    def kld(self, other: Kept) -> float:
        """Mean KL(this || other), nats a token."""
        first = score.first_scored(len(self.windows[0])) + 1
        pairs = zip(self.rows, other.rows, self.windows, strict=True)
        return fmean(float(score.compare_logits(a, b, w[first:]).kld.mean()) for a, b, w in pairs)


def distances(case: Case, files: Sequence[Path], windows: list[list[int]]) -> None:
    few = windows[:2]
    print(
        "\nMean KLD(torch || llama.cpp), the packed file and its weights written out; then the file's noise floor. Last, of torch"
        f"\nagainst itself with every embedding changed in its last bit, {len(few)} windows: without and with rounded activations"
    )
    print(
        f"{'file':14} {'packed':>9} {'rounded':>9} {'F32':>9} {'F32+cache':>9} {'F16':>9} {'floor':>9} {'packed/floor':>13} "
        f"{'rounded/floor':>14} {'last bit':>9} {'rounded':>9}"
    )
    for file in files:
        speaker, folder = case.speaker(file), case.folder
        ours = Kept(folder / "ours", windows, speaker.logits)
        found = {"bit": Kept(folder / "few", few, speaker.logits).kld(nudged(speaker, folder, few))}
        with simulate(speaker.model):
            rounded = Kept(folder / "rounded", windows, speaker.logits)
            found["bit rounded"] = Kept(folder / "few", few, speaker.logits).kld(nudged(speaker, folder, few))
        with simulate(speaker.model, products=False):
            cache = Kept(folder / "cache", windows, speaker.logits)
        del speaker
        for kind, path in {"packed": file, **expanded(file, folder)}.items():
            with Decoder(path, n_ctx=len(windows[0]), threads=1, adapter=case.beside(path)) as decoder:
                theirs = Kept(folder / "theirs", windows, lambda w, d=decoder: score.scored_logits(d, w))
            found[kind] = ours.kld(theirs)
            found[f"{kind} rounded"] = (rounded if path == file else cache).kld(theirs)
        noise = kernels.floor(file, windows, threads=1, adapter=case.beside(file)).largest
        columns = ("packed", "packed rounded", "F32", "F32 rounded", "F16")
        print(
            f"{called(file):14} {' '.join(f'{found[c]:>9.2e}' for c in columns)} {noise:>9.2e} {found['packed'] / noise:>13.2f} "
            f"{found['packed rounded'] / noise:>14.2f} {found['bit']:>9.2e} {found['bit rounded']:>9.2e}",
            flush=True,
        )


def nudged(speaker: Torch, folder: Path, windows: list[list[int]]) -> Kept:
    """The logits when every number of the embeddings is the next float32."""

    def nudge(module: Any, given: Any, wide: torch.Tensor) -> torch.Tensor:
        return torch.nextafter(wide, torch.full_like(wide, math.inf))

    hook = speaker.model.get_input_embeddings().register_forward_hook(nudge)
    try:
        return Kept(folder / "nudged", windows, speaker.logits)
    finally:
        hook.remove()


def expanded(file: Path, folder: Path) -> dict[str, Path]:
    """The file's weights as F32, which is exact, and as F16, which rounds them; vectors stay as they are."""
    found, whole, tensors = header.read(file), file.read_bytes(), {}
    for tensor in found.tensors:
        raw = torch.from_numpy(np.array(placement.raw(file, found, tensor)))
        tensors[tensor.name] = (tensor.shape, widen(raw, tensor.type, torch.float32).numpy().tobytes())
    header.write(folder / "wide.gguf", {}, tensors, [whole[start:end] for start, end in found.spans.values()])
    quantize(folder / "wide.gguf", folder / "half.gguf", "F16", threads=1)
    return {"F32": folder / "wide.gguf", "F16": folder / "half.gguf"}


@dataclass(kw_only=True)
class Products(Collector):
    """Takes each product with a weight out of a running llama.cpp, and computes it again in torch from the same input."""

    file: Path
    found: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    """By the weight's type: the share of a product's norm by which torch differs, without and with rounded activations."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.header = header.read(self.file)
        self.tensors = {t.name: t for t in self.header.tensors}

    def _wanted(self, node: Any) -> bool:
        return node.op == self.dense and node.src[0].contents.name.decode() in self.tensors

    def _add(self, node: Any) -> None:
        tensor = self.tensors[node.src[0].contents.name.decode()]
        x, theirs = (
            torch.from_numpy(self._copy(p, np.dtype("<f4"))[0, 0].copy())
            for p in (node.src[1], ctypes.pointer(node))
        )
        weight = torch.from_numpy(np.array(placement.raw(self.file, self.header, tensor)))
        layer = GridLinear(weight, tensor.type)
        plain = layer(x)
        install_layer(layer)
        found = [float((y - theirs).norm() / theirs.norm()) for y in (plain, layer(x))]
        self.found.setdefault(tensor.type, []).append((found[0], found[1]))


def alone(files: Sequence[Path], window: list[int]) -> None:
    print(
        "\nEach product alone, from llama.cpp's own input: |torch - llama.cpp| / |llama.cpp|, median and largest"
    )
    print(
        f"{'file':14} {'weights':8} {'products':>8} {'activations':>12} {'not rounded':>19} {'rounded':>19}"
    )
    for file in files:
        for kind, pairs in sorted(products(file, window).items()):
            plain, rounded = (sorted(column) for column in zip(*pairs, strict=True))
            columns = "".join(f"{c[len(c) // 2]:>10.1e} {c[-1]:>8.1e}" for c in (plain, rounded))
            print(
                f"{called(file):14} {kind:8} {len(pairs):>8} {activation_type(kind):>12} {columns}",
                flush=True,
            )


def products(file: Path, window: list[int]) -> dict[str, list[tuple[float, float]]]:
    watch = Products(process_output=True, file=file)
    with Decoder(file, n_ctx=len(window), threads=1, cb_eval=watch.watch) as decoder:
        decoder.logits(window)
    if watch.error:
        raise watch.error
    return watch.found


def emulated(case: Case, files: Sequence[Path], windows: list[list[int]]) -> None:
    """The stock tool on base files of torch's logits and of this machine's, and the floor on the same windows."""
    programs, lacking = stock_programs()
    print(
        f"\n{len(windows)} windows of {len(windows[0])} tokens: stock llama-perplexity, mean KLD(... || there)"
    )
    print(
        f"{'file':14} {'scored by':32} {'of torch':>9} {'of llama.cpp here':>18} {'floor':>9} {'of torch/floor':>15}"
    )
    for file in files:
        speaker, beside = case.speaker(file), case.beside(file)
        write(case.folder / "torch.kld", windows, speaker.n_vocab, speaker.logits)
        with Decoder(file, n_ctx=len(windows[0]), threads=1, adapter=beside) as decoder:
            write(
                case.folder / "here.kld",
                windows,
                decoder.n_vocab,
                lambda w, d=decoder: score.scored_logits(d, w),
            )
        noise = kernels.floor(file, windows, threads=1, adapter=beside).largest
        for who, program in programs.items():
            torchs, heres = (
                run_stock(case.folder / base, file, program=program, threads=1).kld
                for base in ("torch.kld", "here.kld")
            )
            print(
                f"{called(file):14} {who:32} {torchs:>9.2e} {heres:>18.2e} {noise:>9.2e} {torchs / noise:>15.2f}",
                flush=True,
            )
    for sentence in lacking:
        print(f"\n{sentence}")


def called(file: Path) -> str:
    return file.stem if file.stem != "model" else f"{file.parent.name}/{file.stem}"[-14:]


if __name__ == "__main__":
    main()
