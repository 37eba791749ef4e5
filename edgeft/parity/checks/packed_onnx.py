"""Reads the packed weights of an ONNX Runtime GenAI folder: what its MatMulNBits and GatherBlockQuantized nodes hold.

Both operators are ONNX Runtime's own (docs/ContribOperators.md, com.microsoft). The names of nodes are those of GenAI's
model builder; queries, keys and values may lie in one matrix, as may gate and up.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeft.errors import DataError
from edgeft.parity.checks.packed import Layer
from edgeft.parity.checks.tensors import Stored

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from edgeft.parity.checks.packed import Matrix

_NODE = re.compile(r"/model/layers\.(\d+)/(attn|mlp)/(\w+?)/")
_PARTS = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}
_EMBEDDINGS = "model.embed_tokens.weight"
_HEAD = "lm_head.weight"


def layers(folder: Path, merged: Mapping[str, Stored]) -> Iterator[Layer]:
    """The packed weights of the graph in `folder`, under the names of `merged`, a checkpoint's tensors.

    A head that the checkpoint does not have is its embedding. Raises DataError for a node that it cannot read.
    """
    import onnx

    graph = onnx.load(str(_graph(folder)), load_external_data=False).graph
    held = {i.name: i for i in graph.initializer}
    for node in graph.node:  # an embedding may be a tied head's codes, laid out otherwise
        if node.op_type == "Reshape" and node.input[0] in held:
            held[node.output[0]] = held[node.input[0]]
    for node in graph.node:
        if node.op_type not in _READERS:
            continue
        given = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        inputs = [_array(held[name], folder) if name in held else None for name in node.input]
        if len(inputs) < 3 or inputs[2 if "Gather" in node.op_type else 1] is None:
            raise DataError(f"{node.name} has no codes or no scales of its own")
        weight, scales = _READERS[node.op_type](node.name, given, inputs)
        yield from _named(node.name, weight, scales, given, merged)


def plain(folder: Path) -> Iterator[tuple[str, Matrix]]:
    """The embedding and the output matrix, where they are not packed, by the checkpoint's names."""
    import numpy as np
    import onnx

    graph = onnx.load(str(_graph(folder)), load_external_data=False).graph
    held = {i.name: i for i in graph.initializer}
    for node in graph.node:
        if node.op_type == "Gather" and node.name.startswith("/model/embed_tokens/"):
            yield _EMBEDDINGS, _array(held[node.input[0]], folder).astype(np.float32)
        elif node.op_type == "MatMul" and node.name.startswith("/lm_head/") and node.input[1] in held:
            yield _HEAD, _array(held[node.input[1]], folder).astype(np.float32).T


def inside(folder: Path) -> tuple[dict[str, int], int, int]:
    """Tensors by kind, bytes of all, and how many weights they hold. What the graph shares counts once; its tables of
    sines and cosines and its constants are no weights."""
    import math

    import onnx

    graph = onnx.load(str(_graph(folder)), load_external_data=False).graph
    held = {i.name: i for i in graph.initializer}
    for node in graph.node:
        if node.op_type == "Reshape" and node.input[0] in held:
            held[node.output[0]] = held[node.input[0]]
    counts, weights, stored, seen = Counter[str](), 0, 0, set[str]()
    for node in graph.node:
        packs = node.op_type in _READERS
        bits = next((a.i for a in node.attribute if a.name == "bits"), 4)
        for place, name in enumerate(node.input):
            one = held.get(name)
            if one is None or one.name in seen or "cache" in name or (not packs and len(one.dims) < 1):
                continue
            is_float = one.data_type in (1, 10, 16)  # FLOAT, FLOAT16, BFLOAT16 of onnx.TensorProto
            if not packs and not is_float:
                continue
            seen.add(one.name)
            stored += _bytes(one)
            if packs and place in (0, 1) and not is_float:
                counts[f"int{bits}"] += 1
                weights += _bytes(one) * 8 // bits
            elif not packs:
                counts[onnx.TensorProto.DataType.Name(one.data_type)] += 1
                weights += math.prod(one.dims)
    return dict(counts), stored, weights


def _bytes(tensor: Any) -> int:
    for entry in tensor.external_data:
        if entry.key == "length":
            return int(entry.value)
    return len(tensor.raw_data)


def _graph(folder: Path) -> Path:
    import json

    said = json.loads((folder / "genai_config.json").read_text(encoding="utf-8"))
    return folder / str(said["model"]["decoder"]["filename"])


def _array(tensor: Any, folder: Path) -> NDArray[Any]:
    """An initializer, out of the file beside the graph where it lies there. 4-bit types are two to a byte, unpacked."""
    from onnx import numpy_helper

    found: NDArray[Any] = numpy_helper.to_array(tensor, base_dir=str(folder))
    return found


def _named(
    node: str, weight: Matrix, scales: Matrix, given: Mapping[str, Any], merged: Mapping[str, Stored]
) -> Iterator[Layer]:
    """A matrix under the name that it has in the checkpoint; one that holds several is cut into them."""
    if found := _NODE.match(node):
        number, block, part = found[1], {"attn": "self_attn", "mlp": "mlp"}[found[2]], found[3]
        own = f"model.layers.{number}.{block}.{part}.weight"
        names = [own] if own in merged else [own.replace(part, one) for one in _PARTS.get(part, (part,))]
    elif node.startswith("/lm_head/"):
        names = [_HEAD if _HEAD in merged else _EMBEDDINGS]
    elif node.startswith("/model/embed_tokens/"):
        names = [_EMBEDDINGS]
    else:
        names = [node]
    row = 0
    for name in names:
        height = merged[name].shape[0] if len(names) > 1 and name in merged else len(weight) - row
        part, first = _held_in(name, merged)
        # Rows that no block divides are filled up; what is beyond a row's end is cut off again by the graph.
        width = merged[part].shape[1] if part in merged else weight.shape[1]
        yield Layer(
            name=part, weight=weight[row : row + height, :width], scales=scales[row : row + height], first=first,
            bits=int(given.get("bits", 4)), group=int(given["block_size"]),
        )  # fmt: skip
        row += height


def _held_in(name: str, merged: Mapping[str, Stored]) -> tuple[str, int | None]:
    """The checkpoint's tensor that holds a matrix and, where that holds more, its first row: Phi-3 has gate and up in one."""
    for whole, parts in _PARTS.items():
        for place, part in enumerate(parts):
            one = name.replace(part, whole)
            if name not in merged and one != name and one in merged and len(parts) == 2:
                return one, merged[one].shape[0] // 2 * place
    return name, None


def _matmul(name: str, given: Mapping[str, Any], inputs: list[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """MatMulNBits: B [N, blocks, bytes], the first code in the lowest bits; scales by block; zero points packed alike."""
    import numpy as np

    bits, block, width = int(given.get("bits", 4)), int(given["block_size"]), int(given["K"])
    height, blocks = int(given["N"]), -(-width // block)
    if len(inputs) > 4 and inputs[4] is not None:
        raise DataError(f"{name} has reordered columns, which cannot be unpacked here")
    codes = _unpacked(inputs[1].reshape(height * blocks, -1), bits).reshape(height, blocks, block)
    scales = inputs[2].astype(np.float32).reshape(height, blocks)
    zeros = np.full((height, blocks), 2 ** (bits - 1), np.float32)
    if len(inputs) > 3 and (packed := inputs[3]) is not None:
        whole = packed if packed.dtype.kind == "f" else _unpacked(packed.reshape(height, -1), bits)
        zeros = whole.reshape(height, -1)[:, :blocks].astype(np.float32)
    weight = (codes.astype(np.float32) - zeros[..., None]) * scales[..., None]
    return weight.reshape(height, -1)[:, :width], scales


def _gather(name: str, given: Mapping[str, Any], inputs: list[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """GatherBlockQuantized: the rows of an embedding, quantized along their length.

    Inputs: data, indices, scales, zero points. uint8 data hold `bits` (4) packed, 4-bit types come one to a number; without
    zero points uint8 is around the middle, and signed types around 0.
    """
    import numpy as np

    data, scales = inputs[0], inputs[2].astype(np.float32)
    bits = int(given.get("bits", 4))
    raw = data.dtype == np.uint8
    rows, data = len(data), data.reshape(len(data), -1)
    codes = (_unpacked(data, bits) if raw else data).astype(np.float32).reshape(rows, -1)
    scales = scales.reshape(rows, -1)
    zeros = np.full(scales.shape, 2 ** (bits - 1) if raw else 0, np.float32)
    if len(inputs) > 3 and (packed := inputs[3]) is not None:
        whole = _unpacked(packed.reshape(rows, -1), bits) if packed.dtype == np.uint8 else packed
        zeros = whole.reshape(rows, -1)[:, : scales.shape[1]].astype(np.float32)
    where = np.arange(codes.shape[1]) // int(given["block_size"])
    return (codes - zeros[:, where]) * scales[:, where], scales


def _unpacked(data: NDArray[Any], bits: int) -> NDArray[np.uint8]:
    """Bytes [rows, n] -> [rows, n * 8/bits], the first code in the lowest bits."""
    import numpy as np

    if bits == 8:
        return data.astype(np.uint8)
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    codes = (data[..., None] >> shifts) & np.uint8(2**bits - 1)
    return codes.reshape(len(data), -1)


_READERS = {"MatMulNBits": _matmul, "GatherBlockQuantized": _gather}
