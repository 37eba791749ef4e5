"""What the builder calls a product, and what llama.cpp calls the weight in it: where the importance of its inputs is."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from edgeft.onnx.pack import Importance

_PRODUCT = re.compile(r"/model/layers\.(\d+)/(?:attn|mlp)/(\w+)/MatMul$")
_ROLES = {  # the first that there is; fused products share their inputs
    "qkv_proj": ("attn_q", "attn_qkv"), "q_proj": ("attn_q",), "k_proj": ("attn_k",), "v_proj": ("attn_v",),
    "o_proj": ("attn_output",), "gate_proj": ("ffn_gate", "ffn_up"), "up_proj": ("ffn_up",),
    "gate_up_proj": ("ffn_gate", "ffn_up"), "down_proj": ("ffn_down",),
}  # fmt: skip

_STACKED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


def product(name: str) -> tuple[int, str] | None:
    """Layer and role of a layer's product, such as (3, "down_proj"); None for any other node."""
    found = _PRODUCT.match(name)
    return (int(found[1]), found[2]) if found else None


def importance(means: Mapping[str, NDArray[np.float32]], without: list[str]) -> Importance:
    """From a product's name to the mean squares of its inputs; None where the matrix has none of that length, and then the
    name of a layer's product is put into `without`."""

    def of(name: str, columns: int) -> NDArray[np.float32] | None:
        place = product(name)
        if place is None:
            return None
        layer, role = place
        found = (means.get(f"blk.{layer}.{tensor}.weight") for tensor in _ROLES.get(role, ()))
        fits = next((vector for vector in found if vector is not None and len(vector) == columns), None)
        if fits is None:
            without.append(name)
        return fits

    return of


def parameters(name: str) -> tuple[list[list[str]], tuple[int, int]]:
    """Which parameters of the checkpoint may lie in a layer's product, stacked: sets of names to try in turn; and, where the
    last is a fused matrix, which of how many equal parts of it. No names for any other node."""
    place = product(name)
    if place is None:
        return [], (0, 1)
    layer, role = place
    block = "mlp" if role in ("gate_proj", "up_proj", "down_proj", "gate_up_proj") else "self_attn"
    stem = f"model.layers.{layer}.{block}"
    tried = [[f"{stem}.{role}.weight"]]
    if role in _STACKED:
        tried.append([f"{stem}.{part}.weight" for part in _STACKED[role]])
    if role in ("gate_proj", "up_proj"):  # the builder takes Phi-3's matrix apart
        tried.append([f"{stem}.gate_up_proj.weight"])
        return tried, (("gate_proj", "up_proj").index(role), 2)
    return tried, (0, 1)


def upgraded(layers: int) -> frozenset[int]:
    """The layers whose values and down projections llama.cpp's mixtures give more bits (llama-quant.cpp, use_more_bits):
    the first and the last eighth, and every third between them."""
    eighth = layers // 8
    return frozenset(i for i in range(layers) if i < eighth or i >= 7 * layers // 8 or (i - eighth) % 3 == 2)
