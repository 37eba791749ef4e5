"""Which tensors a Hugging Face configuration stands for, family by family, under llama.cpp's names.

The layouts follow the modeling files of transformers 5 and are tested against models it instantiates.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from edgeft.errors import DataError


@dataclass(frozen=True, kw_only=True)
class Matrix:
    """One weight: `rows` outputs of `columns` inputs, times `experts`."""

    role: str
    """llama.cpp's name without block number and ending: attn_q, ffn_down, token_embd …"""
    layer: int
    """-1 outside the layers."""
    rows: int
    columns: int
    experts: int = 1

    @property
    def elements(self) -> int:
        return self.rows * self.columns * self.experts


@dataclass(frozen=True, kw_only=True)
class Dimensions:
    """The numbers a configuration states, under one name each."""

    architecture: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    context_length: int
    n_experts: int = 0
    experts_used: int = 0
    sliding_window: int = 0
    window_layers: int = 0


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Every tensor of a model."""

    matrices: tuple[Matrix, ...]
    vectors: int
    vector_tensors: int
    exact: bool


_TIED = {"gpt2", "bloom", "gemma", "gemma2", "gemma3_text", "smollm3"}
"""Families whose default is a tied output; the others say so in the config."""
_FUSED = {"gpt2", "gpt_neox", "bloom"}
_NORMS = {  # in units of the hidden width: norms of one layer
    "llama": 2, "mistral": 2, "qwen2": 2, "qwen3": 2, "smollm3": 2, "phi3": 2, "granite": 2, "olmo2": 2,
    "mixtral": 2, "qwen3_moe": 2, "gemma": 2, "gemma2": 4, "gemma3_text": 4,
}  # fmt: skip
_HEAD_NORMS = {"qwen3", "qwen3_moe", "gemma3_text"}
_QKV_BIAS = {"qwen2"}


def dimensions(config: Mapping[str, Any]) -> Dimensions:
    """Collect the sizes from a configuration, whatever each family calls them.

    Raises DataError naming what is missing.
    """
    arch = str(config.get("model_type", ""))
    layers = _first(config, "num_hidden_layers", "n_layer", "num_layers")
    hidden = _first(config, "hidden_size", "n_embd", "d_model")
    heads = _first(config, "num_attention_heads", "n_head", "num_heads")
    vocab = _first(config, "vocab_size", "padded_vocab_size")
    lacking = [
        n
        for n, v in (("layers", layers), ("width", hidden), ("heads", heads), ("vocabulary", vocab))
        if not v
    ]
    if lacking:
        raise DataError(
            f"the configuration of {arch or 'an unnamed architecture'!r} lacks its {', '.join(lacking)}"
        )
    # transformers leaves a value out when it is the class's default
    head_dim = _first(config, "head_dim") or {"gemma": 256, "gemma2": 256, "gemma3_text": 256}.get(
        arch, hidden // heads
    )
    window, window_layers = _windows(arch, config, layers)
    multi_query = 1 if config.get("multi_query") else 0
    return Dimensions(
        architecture=arch, layers=layers, hidden=hidden, heads=heads,
        kv_heads=_first(config, "num_key_value_heads", "num_kv_heads") or multi_query or heads, head_dim=head_dim,
        ffn=_first(config, "intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size") or 4 * hidden,
        vocab=vocab,
        context_length=_first(config, "max_position_embeddings", "n_positions", "n_ctx", "seq_length"),
        n_experts=_first(config, "num_local_experts", "num_experts"),
        experts_used=_first(config, "num_experts_per_tok"),
        sliding_window=window, window_layers=window_layers,
    )  # fmt: skip


def layout(size: Dimensions, config: Mapping[str, Any]) -> Layout:
    """Every tensor of the model; for an unknown architecture those of a Llama of this size (`exact` False)."""
    arch, hidden = size.architecture, size.hidden
    matrices = [Matrix(role="token_embd", layer=-1, rows=size.vocab, columns=hidden)]
    if not config.get("tie_word_embeddings", arch in _TIED):
        matrices.append(Matrix(role="output", layer=-1, rows=size.vocab, columns=hidden))
    if arch == "gpt2":
        matrices.append(
            Matrix(role="position_embd", layer=-1, rows=size.context_length or 1024, columns=hidden)
        )
    per_layer = _fused(size) if arch in _FUSED else _separate(size, config)
    for layer in range(size.layers):
        matrices += [
            Matrix(role=r, layer=layer, rows=rows, columns=c, experts=e) for r, rows, c, e in per_layer
        ]
    in_layer, tensors = _vectors(size, config)
    outside = {"gpt2": (2 * hidden, 2), "gpt_neox": (2 * hidden, 2), "bloom": (4 * hidden, 4)}.get(
        arch, (hidden, 1)
    )
    return Layout(
        matrices=tuple(matrices),
        vectors=size.layers * in_layer + outside[0],
        vector_tensors=size.layers * tensors + outside[1],
        exact=arch in _NORMS or arch in _FUSED,
    )


_Row = tuple[str, int, int, int]


def _fused(size: Dimensions) -> list[_Row]:
    """GPT-2, GPT-NeoX, Bloom: one matrix for queries, keys and values, and an ungated feed-forward."""
    hidden = size.hidden
    return [
        ("attn_qkv", 3 * hidden, hidden, 1), ("attn_output", hidden, hidden, 1),
        ("ffn_up", size.ffn, hidden, 1), ("ffn_down", hidden, size.ffn, 1),
    ]  # fmt: skip


def _separate(size: Dimensions, config: Mapping[str, Any]) -> list[_Row]:
    hidden, queries, keys = size.hidden, size.heads * size.head_dim, size.kv_heads * size.head_dim
    attention: list[_Row] = [
        ("attn_q", queries, hidden, 1),
        ("attn_k", keys, hidden, 1),
        ("attn_v", keys, hidden, 1),
    ]
    feed: list[_Row] = [("ffn_gate", size.ffn, hidden, 1), ("ffn_up", size.ffn, hidden, 1)]
    down: list[_Row] = [("ffn_down", hidden, size.ffn, 1)]
    if size.architecture == "phi3":
        attention = [("attn_qkv", queries + 2 * keys, hidden, 1)]
        feed = [("ffn_up", 2 * size.ffn, hidden, 1)]
    if size.n_experts:
        width, n = _first(config, "moe_intermediate_size") or size.ffn, size.n_experts
        feed = [
            ("ffn_gate_inp", n, hidden, 1),
            ("ffn_gate_exps", width, hidden, n),
            ("ffn_up_exps", width, hidden, n),
        ]
        down = [("ffn_down_exps", hidden, width, n)]
    return [*attention, ("attn_output", hidden, queries, 1), *feed, *down]


def _vectors(size: Dimensions, config: Mapping[str, Any]) -> tuple[int, int]:
    """Numbers and tensors of one layer's norms and biases."""
    arch, hidden, queries, keys = (
        size.architecture,
        size.hidden,
        size.heads * size.head_dim,
        size.kv_heads * size.head_dim,
    )
    if arch in _FUSED:  # two layer norms with bias; a bias on each of the four matrices
        return 4 * hidden + 3 * hidden + hidden + size.ffn + hidden, 8
    norms = _NORMS.get(arch, 2)
    numbers, tensors = norms * hidden, norms
    if arch in _HEAD_NORMS:
        numbers, tensors = numbers + 2 * size.head_dim, tensors + 2
    if arch == "olmo2":
        numbers, tensors = numbers + queries + keys, tensors + 2
    if arch in _QKV_BIAS or config.get("attention_bias"):
        numbers, tensors = numbers + queries + 2 * keys, tensors + 3
    if config.get("attention_bias") and arch not in _QKV_BIAS:
        numbers, tensors = numbers + hidden, tensors + 1
    if config.get("mlp_bias"):
        numbers, tensors = numbers + 2 * size.ffn + hidden, tensors + 3
    return numbers, tensors


def _windows(arch: str, config: Mapping[str, Any], layers: int) -> tuple[int, int]:
    """The window and the number of windowed layers, where llama.cpp keeps a shorter KV cache for them.

    It does so for Gemma 2 and 3 (src/models/gemma2.cpp, gemma3.cpp); elsewhere it caches every token.
    """
    if arch not in ("gemma2", "gemma3_text"):
        return 0, 0
    kinds = config.get("layer_types")
    if isinstance(kinds, list):
        windowed = sum(k == "sliding_attention" for k in kinds)
    else:
        windowed = layers - layers // {"gemma2": 2}.get(arch, int(config.get("sliding_window_pattern") or 6))
    return _first(config, "sliding_window") or 4096, windowed


def _first(config: Mapping[str, Any], *names: str) -> int:
    for name in names:
        value = config.get(name)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return 0
