"""What making a model takes: memory for the training, disk for what each stage leaves behind.

All in MB of 10^6 bytes, predicted from the shape alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from edgeft.fit.quant import file_bytes, place
from edgeft.fit.shape import ModelShape

NF4_BYTES = (4 + 0.127) / 8
"""A weight in NF4 with double quantization: 4 bits and 0.127 for the constants (QLoRA, section 3)."""
LOGIT_BYTES = {"cuda": 12, "cpu": 32}
"""A logit while training: on a GPU the 16-bit output, its float32 copy, the softmax and the gradients.

In float32 on a CPU 32 were measured, more than its four copies: freed memory does not all go back at once.
"""
RUNTIME_MB = {"cuda": 700, "cpu": 600}
"""The CUDA context; on a CPU Python with torch, transformers and peft (445 measured, before any data)."""


@dataclass(frozen=True, kw_only=True)
class TrainingNeed:
    """The predicted peak, by part, in MB: of VRAM on a GPU, else of RAM.

    Checked against an H200 (7B Qwen2 shape, NF4, 2048 tokens, checkpointing): 10.1 GB of tensors measured at
    batch 1 and 22.6 at batch 4; this gives 10.2 and 22.7 without `runtime`. And against LoRA in float32 on a CPU
    (SmolLM2-135M, rank 16): 1.97 GB at 2 x 128 tokens, 4.67 at 4 x 256, 2.77 there with checkpointing; this
    gives 2.1, 4.8 and 2.9.
    """

    weights: float
    adapter: float
    """Its weights, gradients and optimizer states."""
    kept: float
    """Activations held for the backward pass."""
    working: float
    """The larger of the logits and one layer computed again; they never live at once."""
    runtime: float
    """Python and torch; on a GPU the CUDA context."""

    @property
    def total(self) -> int:
        return round(self.weights + self.adapter + self.kept + self.working + self.runtime)


def training(
    shape: ModelShape,
    *,
    method: Literal["lora", "qlora"],
    rank: int,
    batch: int,
    tokens: int,
    device: Literal["cpu", "cuda"],
    weight_bytes: int = 2,
    checkpointing: bool = True,
    optimizer_bits: Literal[8, 32] = 8,
    logit_tokens: int | None = None,
    packed: float | None = None,
) -> TrainingNeed:
    """The peak of a LoRA or QLoRA step on `batch` rows of `tokens` tokens.

    `packed` is how many bytes a weight of the linear maps takes that is held in blocks: NF4's for `qlora` unless given,
    those of a GGUF file otherwise. `weight_bytes` is the width of what is not in blocks: 2 for bf16, 4 for float32. With `checkpointing` only
    the inputs of the layers are kept, and one layer at a time is computed again. `logit_tokens` is how many
    positions of a row the output layer computes; all of them unless given.
    """
    linear = shape.linear_parameters
    rest = shape.parameters - linear
    if packed is None and method == "qlora":
        packed = NF4_BYTES
    held = linear * (weight_bytes if packed is None else packed) + rest * weight_bytes
    if packed is not None:  # one matrix at a time is unpacked
        held += max((m.rows * m.columns for m in shape.linears), default=0) * weight_bytes
    positions = batch * tokens
    layer = positions * weight_bytes * (12 * shape.hidden + 6 * shape.ffn * max(1, shape.experts_used))
    inputs = positions * weight_bytes * shape.hidden * shape.layers
    logits = batch * (tokens if logit_tokens is None else logit_tokens) * shape.vocab * LOGIT_BYTES[device]
    return TrainingNeed(
        weights=held / 1e6,
        adapter=adapter_parameters(shape, rank) * (8 + 2 * optimizer_bits / 8) / 1e6,
        kept=(inputs if checkpointing else layer * shape.layers) / 1e6,
        working=max(logits, layer if checkpointing else 0) / 1e6,
        runtime=RUNTIME_MB[device],
    )


def adapter_parameters(shape: ModelShape, rank: int) -> int:
    """Numbers in a LoRA adapter on every linear map of the layers: rank · (rows + columns) each."""
    return sum(rank * (m.rows + m.columns) * m.experts for m in shape.linears)


def checkpoint_mb(shape: ModelShape, *, weight_bytes: int = 2) -> int:
    """A checkpoint folder, base and merged alike: the weights and a tokenizer, about 70 bytes a token as JSON."""
    return _mb(shape.parameters * weight_bytes + 70 * shape.vocab)


def packed_bytes(shape: ModelShape, label: str) -> float:
    """Bytes a weight, on average, of the linear maps in a file of this quantization. RecipeError for an unknown one."""
    inside = [p for p in place(shape, label) if p.matrix in shape.linears]
    return sum(p.bytes for p in inside) / max(1, shape.linear_parameters)


def adapter_mb(shape: ModelShape, rank: int) -> int:
    """An adapter in float32, with its tokenizer."""
    return _mb(4 * adapter_parameters(shape, rank) + 70 * shape.vocab)


def gguf_mb(shape: ModelShape, label: str) -> int:
    """A GGUF file of this quantization. Raises RecipeError for an unknown one."""
    return _mb(file_bytes(shape, label))


def training_mb(shape: ModelShape, rank: int, *, checkpoints: int = 2, optimizer_bits: int = 8) -> int:
    """What training leaves: the adapter, and its last checkpoints with the optimizer's states."""
    states = _mb(adapter_parameters(shape, rank) * 2 * optimizer_bits / 8)
    return adapter_mb(shape, rank) * (1 + checkpoints) + checkpoints * states + 1


def host_ram_mb(shape: ModelShape) -> int:
    """RAM of a training that runs on a GPU: torch with CUDA, and one shard of the checkpoint as it is loaded."""
    return 3000 + min(5000, checkpoint_mb(shape))


def reference_mb(shape: ModelShape, *, windows: int, context: int) -> int:
    """Reference log-probabilities in llama.cpp's 16-bit form; the second half of each window is scored.

    windows · (context / 2 - 1) rows of vocab + 4 numbers of two bytes (llama-perplexity --kl-divergence-base).
    """
    return _mb(windows * (context // 2 - 1) * (shape.vocab + 4) * 2)


def bundle_mb(shape: ModelShape, label: str) -> int:
    """A packed bundle: quantized weights hardly compress, so as large as the file in it."""
    return gguf_mb(shape, label) + 1


def _mb(size: float) -> int:
    return -int(-size // 1e6)
