"""llama.cpp's rule for the type of each tensor under a quantization label.

A restatement of src/llama-quant.cpp (llama_tensor_get_type_impl, tensor_type_fallback) for dense models and
ordinary mixtures of experts, tested against files that llama.cpp wrote.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from edgeft.fit.families import Matrix

BLOCKS = {
    "F32": (1, 4), "F16": (1, 2), "BF16": (1, 2),
    "Q4_0": (32, 18), "Q4_1": (32, 20), "Q5_0": (32, 22), "Q5_1": (32, 24), "Q8_0": (32, 34), "IQ4_NL": (32, 18),
    "MXFP4": (32, 17), "Q2_K": (256, 84), "Q3_K": (256, 110), "Q4_K": (256, 144), "Q5_K": (256, 176),
    "Q6_K": (256, 210), "IQ4_XS": (256, 136), "IQ3_S": (256, 110), "IQ3_XXS": (256, 98), "IQ2_S": (256, 82),
    "IQ2_XS": (256, 74), "IQ2_XXS": (256, 66), "IQ1_M": (256, 56), "IQ1_S": (256, 50), "TQ2_0": (256, 66),
    "TQ1_0": (256, 54),
}  # fmt: skip
"""Weights in a block and its bytes (ggml/src/ggml-common.h)."""

LABELS = {
    "F32": "F32", "F16": "F16", "BF16": "BF16", "Q8_0": "Q8_0", "Q6_K": "Q6_K",
    "Q5_K_M": "Q5_K", "Q5_K_S": "Q5_K", "Q5_1": "Q5_1", "Q5_0": "Q5_0",
    "Q4_K_M": "Q4_K", "Q4_K_S": "Q4_K", "Q4_1": "Q4_1", "Q4_0": "Q4_0", "IQ4_NL": "IQ4_NL", "IQ4_XS": "IQ4_XS",
    "MXFP4_MOE": "MXFP4", "Q3_K_L": "Q3_K", "Q3_K_M": "Q3_K", "Q3_K_S": "Q3_K", "IQ3_M": "IQ3_S", "IQ3_S": "IQ3_S",
    "IQ3_XS": "IQ3_S", "IQ3_XXS": "IQ3_XXS", "Q2_K": "Q2_K", "Q2_K_S": "Q2_K", "IQ2_M": "IQ2_S", "IQ2_S": "IQ2_XS",
    "IQ2_XS": "IQ2_XS", "IQ2_XXS": "IQ2_XXS", "TQ2_0": "TQ2_0", "TQ1_0": "TQ1_0", "IQ1_M": "IQ1_M", "IQ1_S": "IQ1_S",
}  # fmt: skip
"""The type that each label starts from."""

VALUES = {"attn_v", "attn_qkv", "attn_kv_b"}
_KEPT_AT_32 = {"ffn_gate_inp", "position_embd"}
_FALLBACK = {
    "IQ4_XS": "IQ4_NL", "IQ3_S": "IQ4_NL", "IQ3_XXS": "IQ4_NL", "IQ2_S": "IQ4_NL", "IQ2_XS": "IQ4_NL",
    "IQ2_XXS": "IQ4_NL", "IQ1_M": "IQ4_NL", "IQ1_S": "IQ4_NL", "Q2_K": "Q4_0", "Q3_K": "Q4_0", "TQ1_0": "Q4_0",
    "TQ2_0": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0",
}  # fmt: skip
_LOWEST = {"IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M", "IQ1_S", "IQ1_M"}


@dataclass(kw_only=True)
class State:
    """What llama.cpp knows of the model, and counts, while it walks the tensors in the order of the blocks."""

    label: str
    imatrix: bool
    tied: bool
    layers: int
    n_experts: int
    group: int
    """Heads that share one key and value head."""
    values: int
    """How many tensors are attention values."""
    values_seen: int = 0


def type_of(matrix: Matrix, state: State) -> str:
    """The type of one tensor. Call it once a tensor, in order: it counts."""
    start = LABELS[state.label]
    if matrix.role in _KEPT_AT_32:
        return "F32"
    if BLOCKS[start][0] == 1:
        return start
    kind = _mixture(matrix, start, state)
    if matrix.columns % BLOCKS[kind][0]:
        kind = _FALLBACK.get(kind, kind)
    return "F16" if matrix.columns % BLOCKS[kind][0] else kind


def _mixture(matrix: Matrix, start: str, state: State) -> str:
    role, label = matrix.role, state.label
    if role == "output" or (state.tied and role == "token_embd"):
        return _output(matrix, start, label)
    if label == "MXFP4_MOE":
        return "MXFP4" if matrix.experts > 1 else "Q8_0"
    if role == "token_embd":
        return _embedding(start, label)
    if role in VALUES:
        seen, state.values_seen = state.values_seen, state.values_seen + 1
        return _attention_value(start, seen, state)
    if role in ("attn_k", "attn_q"):
        return _attention_key_or_query(role, start, state)
    if role.startswith("ffn_down"):
        return _ffn_down(start, matrix.layer, state)
    if role.startswith(("ffn_gate", "ffn_up")):
        middle = state.layers // 8 <= matrix.layer < 7 * state.layers // 8
        return "IQ3_XXS" if label == "IQ3_XS" and middle else start
    return _attention_output(start, state) if role == "attn_output" else start


def _output(matrix: Matrix, start: str, label: str) -> str:
    if start in ("Q8_0", "MXFP4") or matrix.columns % BLOCKS[start][0]:
        return "Q8_0"
    return "Q5_K" if label in _LOWEST or label == "IQ3_XXS" else "Q6_K"


def _embedding(start: str, label: str) -> str:
    if label in ("IQ2_S", "IQ2_M", "IQ3_XXS"):
        return "IQ3_S"
    if label in _LOWEST:
        return "Q2_K"
    return "Q4_K" if label.startswith("TQ") else start


def _attention_value(start: str, seen: int, state: State) -> str:
    label, shared = state.label, state.group >= 4
    if label in _LOWEST:
        low = "IQ3_S" if label in ("IQ2_S", "IQ2_M") else "Q2_K"
        return "Q4_K" if shared or state.n_experts >= 4 else low
    rule: dict[str, Callable[[], str]] = {
        "Q2_K": lambda: "Q4_K" if shared else "Q3_K",
        "Q2_K_S": lambda: "Q4_K" if shared else start,
        "IQ3_XXS": lambda: "Q4_K" if shared else "IQ3_XXS" if state.imatrix else "IQ3_S",
        "IQ3_XS": lambda: "Q4_K" if shared else start,
        "IQ3_S": lambda: "Q4_K" if shared else start,
        "IQ3_M": lambda: "Q4_K",
        "Q3_K_M": lambda: "Q5_K" if seen < 2 else "Q4_K",
        "Q3_K_L": lambda: "Q5_K",
        "IQ4_NL": lambda: "Q5_K" if shared else start,
        "IQ4_XS": lambda: "Q5_K" if shared else start,
        "Q4_K_M": lambda: "Q6_K" if _more_bits(seen, state.values) else start,
        "Q5_K_M": lambda: "Q6_K" if _more_bits(seen, state.values) else start,
        "Q4_K_S": lambda: "Q5_K" if seen < 4 else start,
    }
    kind = rule[label]() if label in rule else start
    if state.layers == 80 and state.group == 8 and kind in ("Q3_K", "Q4_K"):  # LLM_TYPE_70B
        kind = "Q5_K"
    return "Q8_0" if state.n_experts == 8 else kind


def _attention_key_or_query(role: str, start: str, state: State) -> str:
    if role == "attn_k" and state.n_experts == 8:
        return "Q4_K" if state.label in _LOWEST else "Q8_0"
    return {"IQ3_XS": "IQ3_XXS", "IQ3_XXS": "IQ2_S"}.get(state.label, start)


def _ffn_down(start: str, layer: int, state: State) -> str:
    label, layers = state.label, state.layers
    early = layer < layers // 8
    if label in _LOWEST:
        low = "IQ3_S" if label in ("IQ2_S", "IQ2_M") else "Q2_K"
        return low if early else start
    rule: dict[str, Callable[[], str]] = {
        "Q2_K": lambda: "Q3_K",
        "Q2_K_S": lambda: "Q4_K" if early else start,
        "IQ3_XXS": lambda: start if state.imatrix else "Q4_K" if early else "Q3_K",
        "Q3_K_M": lambda: "Q5_K" if layer < layers // 16 else "Q4_K",
        "IQ3_M": lambda: "Q4_K" if early or (state.n_experts == 8 and _more_bits(layer, layers)) else start,
        "Q3_K_L": lambda: "Q5_K",
        "Q4_K_M": lambda: "Q6_K" if _more_bits(layer, layers) else start,
        "Q5_K_M": lambda: "Q6_K" if _more_bits(layer, layers) else start,
        "Q4_K_S": lambda: "Q5_K" if early else start,
        "IQ4_NL": lambda: "Q5_K" if early and not state.imatrix else start,
        "IQ4_XS": lambda: "Q5_K" if early and not state.imatrix else start,
        "Q4_0": lambda: "Q4_1" if early and state.imatrix else start,
        "Q5_0": lambda: "Q5_1" if early and state.imatrix else start,
    }
    return rule[label]() if label in rule else start


def _attention_output(start: str, state: State) -> str:
    label = state.label
    if state.n_experts == 8:
        raised = {"Q2_K", "Q3_K_S", "Q3_K_M", "IQ4_NL", "Q4_K_S", "Q4_K_M", "IQ3_XS", "IQ3_XXS", "IQ3_S", "IQ3_M",
                  "IQ4_XS"}  # fmt: skip
        return "Q5_K" if label in raised | _LOWEST else start
    larger: Mapping[str, str] = {
        "Q2_K": "Q3_K", "Q3_K_M": "Q4_K", "Q3_K_L": "Q5_K", "IQ3_M": "Q4_K", "IQ3_XXS": "IQ3_S",
        "IQ1_S": "IQ2_XXS", "IQ1_M": "IQ2_XXS", "IQ2_S": "IQ3_S", "IQ2_M": "IQ3_S",
    }  # fmt: skip
    return larger.get(label, start)


def _more_bits(i: int, n: int) -> bool:
    """The layers llama.cpp gives more bits: the first and last eighth, and every third between."""
    return i < n // 8 or i >= 7 * n // 8 or (i - n // 8) % 3 == 2
