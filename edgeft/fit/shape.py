"""The shape of a decoder-only language model: what it takes to compute sizes, memory and speed from.

Read from a Hugging Face config.json or from a GGUF header; never from weights.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeft.errors import DataError
from edgeft.fit.families import Dimensions, Matrix, dimensions, layout
from edgeft.llamacpp import header as gguf_header
from edgeft.llamacpp.header import Header


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """A model without its weights. Matrices carry llama.cpp's names for their roles."""

    architecture: str
    """`model_type` of the config, or `general.architecture` of the GGUF."""
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    context_length: int
    """The longest context it was trained for; 0 when the file does not say."""
    tied: bool
    """The output matrix is the token embedding."""
    matrices: tuple[Matrix, ...]
    """Every 2-D weight (3-D for experts), one entry a tensor."""
    vectors: int
    """Numbers in all 1-D tensors (norms, biases). They stay 32-bit in a GGUF."""
    vector_tensors: int
    n_experts: int = 0
    experts_used: int = 0
    """How many experts one token visits."""
    sliding_window: int = 0
    """Tokens that a windowed layer looks back on; 0 without such layers."""
    window_layers: int = 0
    """How many layers are windowed: their part of the KV cache does not grow with the context."""
    exact: bool = True
    """False when the architecture is not known and a Llama-like layout was assumed."""

    @property
    def parameters(self) -> int:
        """As transformers counts them: a tied matrix once."""
        return sum(m.elements for m in self.matrices) + self.vectors

    @property
    def linear_parameters(self) -> int:
        """The weights of the layers' linear maps: what LoRA adapts and NF4 holds in four bits."""
        return sum(m.elements for m in self.linears)

    @property
    def linears(self) -> tuple[Matrix, ...]:
        return tuple(m for m in self.matrices if m.layer >= 0 and m.role != "ffn_gate_inp")


def from_config(config: Mapping[str, Any]) -> ModelShape:
    """The shape that a config.json describes. Sizes transformers leaves out of a saved config are filled in.

    Raises DataError when a number that every decoder has (layers, width, heads, vocabulary) is missing.
    """
    inner = config.get("text_config")
    if isinstance(inner, Mapping):
        config = {"tie_word_embeddings": config.get("tie_word_embeddings", True), **inner}
    size = dimensions(config)
    plan = layout(size, config)
    return _shape(size, plan.matrices, plan.vectors, plan.vector_tensors, exact=plan.exact)


def from_gguf(path: Path) -> ModelShape:
    """The shape that a GGUF header describes. Raises DataError for a file that is none, or holds no decoder."""
    header = gguf_header.read(path)
    size = _gguf_dimensions(header, path)
    matrices, vectors, n_vectors = [], 0, 0
    for tensor in header.tensors:
        if tensor.name.startswith("rope_"):
            continue
        elements = _product(tensor.shape)
        if len([d for d in tensor.shape if d > 1]) < 2:
            vectors, n_vectors = vectors + elements, n_vectors + 1
            continue
        found = re.match(r"blk\.(\d+)\.", tensor.name)
        matrices.append(
            Matrix(
                role=tensor.name[found.end() if found else 0 :].removesuffix(".weight"),
                layer=int(found[1]) if found else -1,
                columns=tensor.shape[0],
                rows=tensor.shape[1],
                experts=_product(tensor.shape[2:]),
            )
        )
    matrices.sort(key=lambda m: m.layer)  # llama.cpp walks the blocks in order, however the file lists them
    return _shape(size, tuple(matrices), vectors, n_vectors, exact=True)


def shape_of(path: Path) -> ModelShape | None:
    """The shape of a checkpoint folder or a GGUF file; None when there is neither.

    Raises DataError for a file that is there and cannot be read.
    """
    if path.is_dir():
        config = path / "config.json"
        if config.is_file():
            return read_config(config)
        found = sorted(path.glob("*.gguf"))
        return from_gguf(found[0]) if found else None
    return from_gguf(path) if path.is_file() else None


def read_config(path: Path) -> ModelShape:
    """The shape of one config.json. Raises DataError when it is not a JSON object or lacks a size."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as e:
        raise DataError(f"{path} is not a JSON file: {e}") from None
    if not isinstance(config, dict):
        raise DataError(f"{path} holds {type(config).__name__}, not a model's configuration")
    try:
        return from_config(config)
    except DataError as e:
        raise DataError(f"{path}: {e}") from None


def _shape(
    size: Dimensions, matrices: tuple[Matrix, ...], vectors: int, vector_tensors: int, *, exact: bool
) -> ModelShape:
    return ModelShape(
        architecture=size.architecture, layers=size.layers, hidden=size.hidden, heads=size.heads,
        kv_heads=size.kv_heads, head_dim=size.head_dim, ffn=size.ffn, vocab=size.vocab,
        context_length=size.context_length, tied=not any(m.role == "output" for m in matrices),
        matrices=matrices, vectors=vectors, vector_tensors=vector_tensors, n_experts=size.n_experts,
        experts_used=size.experts_used, sliding_window=size.sliding_window,
        window_layers=size.window_layers, exact=exact,
    )  # fmt: skip


def _gguf_dimensions(header: Header, path: Path) -> Dimensions:
    data: Mapping[str, Any] = header.keys
    arch = str(data.get("general.architecture", ""))

    def number(key: str, otherwise: int = 0) -> int:
        value = data.get(f"{arch}.{key}", otherwise)
        return max(value) if isinstance(value, list) and value else int(value)

    hidden, heads, layers = number("embedding_length"), number("attention.head_count"), number("block_count")
    embedding = next((t for t in header.tensors if t.name == "token_embd.weight"), None)
    if not (hidden and heads and layers and embedding):
        raise DataError(f"{path} holds no decoder-only language model (architecture {arch or 'unknown'!r})")
    window = number("attention.sliding_window")
    period = {"gemma2": 2, "gemma3": 6}.get(arch, 0)
    return Dimensions(
        architecture=arch, layers=layers, hidden=hidden, heads=heads,
        kv_heads=number("attention.head_count_kv", heads), head_dim=number("attention.key_length", hidden // heads),
        ffn=number("feed_forward_length", 4 * hidden), vocab=embedding.shape[1],
        context_length=number("context_length"), n_experts=number("expert_count"),
        experts_used=number("expert_used_count"), sliding_window=window if period else 0,
        window_layers=layers - layers // period if window and period else 0,
    )  # fmt: skip


def _product(numbers: tuple[int, ...]) -> int:
    result = 1
    for number in numbers:
        result *= number
    return result
