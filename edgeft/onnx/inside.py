"""What a GenAI folder holds: bytes, kinds of tensors, bits for each weight."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from edgeft.onnx import graph

_PACKED = {"MatMulNBits": 1, "GatherBlockQuantized": 0}
"""Where the codes stand among an operator's inputs."""


@dataclass(frozen=True, kw_only=True)
class Inside:
    """Read from the written files."""

    bytes: int
    """Of all files in the folder."""
    bits_per_weight: float
    """Codes, scales, zero points and what was left as it is, over the model's weights; shared ones count once."""
    types: Mapping[str, int]
    """Weights by kind, most frequent first: int4, int8, and ONNX's name for the others."""

    @property
    def said(self) -> str:
        """The kinds, for people."""
        return ", ".join(f"{kind} ×{n}" for kind, n in self.types.items())


def inside(folder: Path) -> Inside:
    """Count. Tables of sines and cosines are no weights."""
    import onnx

    model = graph.load(folder)
    weights = graph.Weights(folder, model.graph)
    views = {n.output[0]: n.input[0] for n in model.graph.node if n.op_type == "Reshape"}
    kinds: Counter[str] = Counter()
    stored, count, seen = 0, 0, set[str]()
    for node in model.graph.node:
        at = _PACKED.get(node.op_type)
        for place, given in enumerate(node.input):
            name = views.get(given, given)
            if name not in weights or name in seen or name.endswith("_cache"):
                continue
            kind = weights.by_name[name].data_type
            if at is None and kind not in _FLOATS:
                continue
            seen.add(name)
            stored += weights.stored_bytes(name)
            if place == at:
                bits = int(graph.attribute(node, "bits", 4))
                kinds[f"int{bits}"] += 1
                count += _elements(node, weights, name, bits)
            elif at is None:
                kinds[onnx.TensorProto.DataType.Name(kind)] += 1
                count += math.prod(weights.shape(name))
    return Inside(
        bytes=sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()),
        bits_per_weight=8 * stored / max(1, count), types=dict(kinds.most_common()),
    )  # fmt: skip


_FLOATS = (1, 10, 16)
"""FLOAT, FLOAT16 and BFLOAT16 of onnx.TensorProto."""


def _elements(node: object, weights: graph.Weights, name: str, bits: int) -> int:
    """Weights behind packed codes, without what fills up a row's last block."""
    rows, columns = graph.attribute(node, "N"), graph.attribute(node, "K")
    if rows is None:
        return math.prod(weights.shape(name)) * 8 // bits
    return int(rows) * int(columns)
