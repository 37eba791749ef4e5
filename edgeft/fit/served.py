"""How much memory a model folder takes while vLLM, SGLang or ONNX Runtime GenAI serves it, part by part."""

from __future__ import annotations

from dataclasses import dataclass

from edgeft.fit.board import Board
from edgeft.fit.shape import ModelShape

KV_BYTES = {"awq": 2, "onnx": 4}
"""Bytes of a number in the cache: 16 bits in a server, float32 where GenAI computes on a CPU."""
PROCESS_MB = {"awq": 1900, "onnx": 180}
"""A server's own memory on a CPU, measured (docs/servers.md): vLLM 0.32 is three processes, each with Python and torch."""
GPU_MB = 1500
"""What vLLM keeps on a GPU beside weights and cache: the kernels of torch and its libraries, captured graphs. Not measured."""


_AWQ_BITS = 4 + (16 + 4) / 64
"""Bits of a weight in groups of 64 with a 16-bit scale and a 4-bit zero point each; the rest of the model stays in 16 bits."""
_ONNX_BITS = 6.7
"""Bits of a parameter under the defaults of quantize/onnx, embedding included (SmolLM2-135M: 6.62)."""


@dataclass(frozen=True, kw_only=True)
class ServedNeed:
    """Predicted memory in MB, by part."""

    weights: float
    kv_cache: float
    compute: float
    runtime: float

    @property
    def total(self) -> float:
        return self.weights + self.kv_cache + self.compute + self.runtime


def kv_bytes_per_token(shape: ModelShape, kind: str) -> int:
    """2 · layers · kv_heads · head_dim · bytes. A windowed layer counts whole, as if it saw all of the context."""
    return 2 * shape.layers * shape.kv_heads * shape.head_dim * KV_BYTES[kind]


def folder_mb(shape: ModelShape, kind: str) -> float:
    """Size of a folder that is not made yet, under the defaults of its format, with a tokenizer of 70 bytes a token."""
    if kind == "awq":
        linear = shape.linear_parameters
        size = linear * _AWQ_BITS / 8 + 2 * (shape.parameters - linear)
    else:
        size = shape.parameters * _ONNX_BITS / 8
    return (size + 70 * shape.vocab) / 1e6


def predict(
    shape: ModelShape, board: Board, *, kind: str, on_gpu: bool, weights_mb: float, tokens: int, batch: int, rows: int
) -> ServedNeed:  # fmt: skip
    """Memory while a folder is served. kind: `awq` or `onnx`; on_gpu: whether the target's graphics card computes; tokens: that
    the cache holds, of all conversations together; batch: tokens of prompts computed at once; rows: of logits at once.

    The buffers are one layer's for a batch (12 rows of the width and 6 of the feed-forward part's, 16 bits each) and the logits
    in float32: in a server three times (as computed, sorted, and as probabilities), in GenAI once, but of every token of a prompt.
    """
    layer = 2 * batch * (12 * shape.hidden + 6 * shape.ffn * max(1, shape.experts_used))
    return ServedNeed(
        weights=weights_mb,
        kv_cache=kv_bytes_per_token(shape, kind) * tokens / 1e6,
        compute=(layer + (3 if kind == "awq" else 1) * 4 * rows * shape.vocab) / 1e6,
        runtime=GPU_MB if on_gpu and board.vram_mb else PROCESS_MB[kind],
    )


def available_mb(board: Board, on_gpu: bool) -> tuple[int, str]:
    """What the board leaves, and of which memory: a folder that the CPU computes lies in RAM, whatever card there is."""
    if on_gpu:
        return board.available_mb, board.memory
    return board.ram_mb - board.os_reserve_mb, "RAM"


def refusal(
    need: ServedNeed, board: Board, *, on_gpu: bool, label: str, context: int, parallel: int, longest: int
) -> tuple[str, str]:  # fmt: skip
    """The sentence that refuses a model, and the hint. longest: the longest context that would fit; 0: none."""
    room, memory = available_mb(board, on_gpu)
    slots = f" for each of {parallel} conversations" if parallel > 1 else ""
    parts = ", ".join(f"{name} {_size(mb)}" for name, mb in (
        ("weights", need.weights), ("KV cache", need.kv_cache), ("buffers", need.compute), ("server", need.runtime),
    ) if mb >= 0.5)  # fmt: skip
    message = (
        f"{label} with a context of {context}{slots} needs {_size(need.total)} of {memory} ({parts}); "
        f"{board.name} leaves {_size(room)} for a model"
    )
    if longest:
        return message, f"what would fit: {label} with a context of {longest}"
    return (
        message,
        "a GGUF file under llama-server takes less beside the weights; or take a smaller base or a larger target",
    )


def _size(mb: float) -> str:
    return f"{mb / 1000:.1f} GB" if mb >= 1000 else f"{mb:.0f} MB"
