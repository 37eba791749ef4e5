"""How fast llama.cpp generates from one plain file, and from the same file with LoRA adapters of several sizes.

The pinned llama-bench has no option for adapters, so this times the decoding of single tokens through the library itself,
the same loop for every row, in short rounds of all rows in turn, of which each row's fastest counts: what else runs on
the machine only ever adds time. The adapters' numbers are random: speed does not depend on them. Prints a table; nothing
is asserted.

python benchmarks/adapter_speed.py MODEL.gguf [THREADS [ROUNDS [TOKENS]]]
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
import time
from pathlib import Path

from edgeft import llamacpp
from edgeft.llamacpp import header
from edgeft.llamacpp.adapter import BASE_KEY, base_hash, tensor_bytes
from edgeft.llamacpp.decode import Decoder
from edgeft.llamacpp.threads import default_threads

LINEAR = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
CASES = {
    "rank 8, all linear": (8, LINEAR),
    "rank 16, all linear": (16, LINEAR),
    "rank 32, all linear": (32, LINEAR),
    "rank 16, q and v": (16, ("attn_q", "attn_v")),
}
PROMPT = list(range(100, 164))


def main() -> None:
    """Time every case, then print the table."""
    llamacpp.activate()
    model = Path(sys.argv[1])
    given = [int(argument) for argument in sys.argv[2:5]]
    threads, rounds, tokens = [*given, *(default_threads(), 20, 16)[len(given) :]]
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as opened:
        adapters = {case: Path(name) / f"{number}.gguf" for number, case in enumerate(CASES)}
        for case, path in adapters.items():
            write_adapter(path, model, *CASES[case])
        context = len(PROMPT) + tokens + 1
        decoders = {
            case: opened.enter_context(Decoder(model, n_ctx=context, threads=threads, adapter=path))
            for case, path in {"plain": None, **adapters}.items()
        }
        sizes = {"plain": 0, **{case: tensor_bytes(path) for case, path in adapters.items()}}
        reading: dict[str, list[float]] = {case: [] for case in decoders}
        saying: dict[str, list[float]] = {case: [] for case in decoders}
        for _ in range(rounds):
            for case, decoder in decoders.items():
                started = time.perf_counter()
                decoder.generate(PROMPT, 1)
                reading[case].append(time.perf_counter() - started)
                saying[case].append(seconds(decoder, tokens))
    weights = sum(t.bytes for t in header.read(model).tensors)
    print(f"{processor()}, threads: {threads}, {model.name} ({weights / 1e6:.1f} MB of weights)")
    print(f"{tokens} tokens after {len(PROMPT)}; fastest of {rounds} rounds")
    print(f"{'':<20} {'MB':>6} {'tokens/s':>9} {'of plain':>9} {'prompt/s':>9} {'of plain':>9}")
    for case in decoders:
        said, read = min(saying[case]), min(reading[case])
        print(
            f"{case:<20} {sizes[case] / 1e6:>6.1f} {tokens / said:>9.1f} {min(saying['plain']) / said:>8.2f}x "
            f"{len(PROMPT) / read:>9.0f} {min(reading['plain']) / read:>8.2f}x"
        )


def seconds(decoder: Decoder, tokens: int) -> float:
    """Seconds for `tokens` single tokens after the prompt, whatever they are: an end of turn must not end the timing."""
    decoder.logits(PROMPT, first=len(PROMPT) - 1)
    started = time.perf_counter()
    for number in range(tokens):
        decoder._decode([1000 + number], start=len(PROMPT) + number, first=0)
    return time.perf_counter() - started


def write_adapter(path: Path, model: Path, rank: int, names: tuple[str, ...]) -> None:
    """An F16 adapter of small random numbers for all layers' matrices of these names."""
    import numpy as np

    gguf = llamacpp.gguf()
    found, random = header.read(model), np.random.default_rng(rank)
    writer = gguf.GGUFWriter(path, str(found.keys["general.architecture"]))
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(rank))
    writer.add_string(BASE_KEY, base_hash(model))
    for tensor in found.tensors:
        if tensor.name.startswith("blk.") and tensor.name.split(".")[2] in names:
            width, height = tensor.shape[:2]
            for side, shape in (("a", (rank, width)), ("b", (height, rank))):
                numbers = 1e-3 * random.standard_normal(shape)
                writer.add_tensor(f"{tensor.name}.lora_{side}", numbers.astype(np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def processor() -> str:
    """What /proc/cpuinfo calls this machine's processor."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith(("model name", "Model"))]
    return names[0] if names else "unknown processor"


if __name__ == "__main__":
    main()
