"""Packs the weights of a 16- or 32-bit GenAI graph into four and eight bits: MatMulNBits and GatherBlockQuantized.

The operators are those of onnxruntime/docs/ContribOperators.md. Codes lie low half first in a byte; a row's last block is
padded; a row's zero points are padded to a whole byte. Any width goes, whether a block divides it or not.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeft import progress
from edgeft.errors import StageError
from edgeft.onnx import graph, rounding

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Importance = Callable[[str, int], NDArray[np.float32] | None]
    """From a product's name and its number of inputs to how much each input counts."""

Given = tuple["NDArray[np.uint8]", "NDArray[np.floating[Any]]", "NDArray[np.uint8]"]
"""Codes [out, in], scales [out, blocks] and zero points [out, blocks] of a weight that is rounded already."""

DOMAIN = "com.microsoft"
HEAD = "/lm_head/MatMul"
_CHUNK = 1 << 24
"""Weights of a matrix in memory as float32 at once."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What each product's weights become."""

    block: int
    symmetric: bool
    accuracy: int
    """MatMulNBits' accuracy_level: 4 rounds the inputs to 8 bits, block by block, 0 leaves it to the provider."""
    search: bool
    """Whether scales are looked for, or taken from the outermost weights."""
    bits: Callable[[str], int]
    """By the name of the product, or of the embedding's Gather: 4, 8, or 0 to leave it as it is."""
    importance: Importance
    given: Callable[[str], Given | None] = lambda name: None
    """By the name of a product: its four-bit weights, where somebody else has rounded them."""


def pack(plain: Path, out: Path, plan: Plan) -> Counter[str]:
    """Write the graph of folder `plain` into folder `out` with its weights packed; how many tensors of each kind it has."""
    import onnx

    model = graph.load(plain)
    weights = graph.Weights(plain, model.graph)
    with graph.Writer(out) as writer:
        made = _Made(weights, writer, plan)
        nodes = list(model.graph.node)
        for number, node in enumerate(nodes):
            progress.report("pack the weights", number, len(nodes))
            made.node(node)
        needed = graph.used(made.nodes)
        for tensor in model.graph.initializer:
            if tensor.name in needed:
                made.initializers.append(writer.add(tensor.name, weights.read(tensor.name)))
    kinds = made.kinds
    del model.graph.node[:], model.graph.initializer[:]
    model.graph.node.extend(made.nodes)
    model.graph.initializer.extend(made.initializers)
    if DOMAIN not in {o.domain for o in model.opset_import}:
        model.opset_import.append(onnx.helper.make_opsetid(DOMAIN, 1))
    graph.save(model, out)
    return kinds


class _Made:
    """The new graph as it grows."""

    def __init__(self, weights: graph.Weights, writer: graph.Writer, plan: Plan) -> None:
        self.weights, self.writer, self.plan = weights, writer, plan
        self.nodes: list[Any] = []
        self.initializers: list[Any] = []
        self.kinds: Counter[str] = Counter()
        self._transposed: dict[str, str] = {}
        """Outputs of a Transpose of a weight, by the weight: the tied head, read as an embedding."""
        self._packed: dict[str, tuple[list[str], int]] = {}
        """Inputs for a packed weight and its bits, by the weight."""

    def node(self, node: Any) -> None:
        """Take over a node, or put packed ones in its place."""
        if node.op_type == "Transpose" and node.input[0] in self.weights:
            self._transposed[node.output[0]] = node.input[0]
            if not self.plan.bits(HEAD):
                self.nodes.append(node)
        elif node.op_type == "MatMul" and node.input[1] in self.weights and self.plan.bits(node.name):
            self._product(node)
        elif node.op_type == "Gather" and self._embedding(node):
            self._lookup(node)
        else:
            self.nodes.append(node)

    def _embedding(self, node: Any) -> bool:
        """Whether a Gather looks up rows of a matrix that is to be packed."""
        name = self._transposed.get(node.input[0])
        if name:
            return bool(self.plan.bits(HEAD))
        return (
            node.input[0] in self.weights
            and len(self.weights.shape(node.input[0])) == 2
            and bool(self.plan.bits(node.name))
        )

    def _product(self, node: Any) -> None:
        import onnx

        columns, rows = self.weights.shape(node.input[1])
        inputs, bits = self._pack(node.name, node.input[1], transposed=True)
        extra = {"accuracy_level": self.plan.accuracy} if self.plan.accuracy else {}
        self.nodes.append(onnx.helper.make_node(
            "MatMulNBits", [node.input[0], *inputs], list(node.output), node.name, domain=DOMAIN,
            K=columns, N=rows, bits=bits, block_size=self.plan.block, **extra,
        ))  # fmt: skip

    def _lookup(self, node: Any) -> None:
        """Rows of a packed matrix: of the tied head, which is packed once, or of an embedding of its own."""
        import numpy as np
        import onnx

        shared = self._transposed.get(node.input[0])
        if shared:
            width, rows = self.weights.shape(shared)
            (codes, *rest), bits = self._pack(HEAD, shared, transposed=True)
        else:
            rows, width = self.weights.shape(node.input[0])
            (codes, *rest), bits = self._pack(node.name, node.input[0], transposed=False)
        block = self.plan.block
        padded = -(-width // block) * block
        stem = node.name.rpartition("/")[0]
        flat = f"{stem}/rows"
        self._constant(f"{flat}/shape", np.array([rows, padded * bits // 8], np.int64))
        self.nodes.append(
            onnx.helper.make_node("Reshape", [codes, f"{flat}/shape"], [flat], f"{stem}/Reshape")
        )
        found = node.output[0] if padded == width else f"{stem}/padded"
        self.nodes.append(onnx.helper.make_node(
            "GatherBlockQuantized", [flat, node.input[1], *rest], [found], node.name, domain=DOMAIN,
            bits=bits, block_size=block, gather_axis=0, quantize_axis=1,
        ))  # fmt: skip
        if padded != width:
            ends = [f"{stem}/slice/{part}" for part in ("start", "end", "axis")]
            for name, value in zip(ends, (0, width, 2), strict=True):
                self._constant(name, np.array([value], np.int64))
            self.nodes.append(
                onnx.helper.make_node("Slice", [found, *ends], list(node.output), f"{stem}/Slice")
            )

    def _constant(self, name: str, value: NDArray[Any]) -> None:
        """A shape or a bound: inside the graph, where the runtime looks for it when it infers shapes."""
        import onnx

        self.initializers.append(onnx.numpy_helper.from_array(value, name))

    def _pack(self, product: str, name: str, *, transposed: bool) -> tuple[list[str], int]:
        """The names of codes, scales and zero points of a weight, written at its first use, and its bits."""
        if name in self._packed:
            return self._packed[name]
        bits, matrix = self.plan.bits(product), self.weights.read(name)
        dense = matrix.T if transposed else matrix
        ready = self.plan.given(product) if bits == 4 else None
        codes, scales, zeros = (
            as_given(ready, self.plan, dense)
            if ready
            else packed_matrix(dense, self.plan, bits, self.plan.importance(product, dense.shape[1]))
        )
        stem = re.sub(r"\.weight$", "", name)
        parts = {f"{stem}.weight_q{bits}": codes, f"{stem}.weight_scales": scales}
        if zeros is not None:
            parts[f"{stem}.weight_zero_points"] = zeros
        self.initializers += [self.writer.add(part, numbers) for part, numbers in parts.items()]
        self.kinds[f"int{bits}"] += 1
        self._packed[name] = [*parts], bits
        return self._packed[name]


def packed_matrix(
    matrix: NDArray[Any], plan: Plan, bits: int, importance: NDArray[np.float32] | None
) -> tuple[NDArray[np.uint8], NDArray[Any], NDArray[np.uint8] | None]:
    """MatMulNBits' three inputs of a matrix [out, in]: codes [out, blocks, bytes], scales [out, blocks] in the matrix's own
    precision, and zero points [out, bytes], or None where they all are the middle code."""
    import numpy as np
    import torch

    rows, width = matrix.shape
    count = -(-width // plan.block)
    half = matrix.dtype == np.float16
    weight = np.ones(width, np.float32) if importance is None else importance
    parts = []
    for at in range(0, rows, step := max(1, _CHUNK // width)):
        dense = np.zeros((len(matrix[at : at + step]), count * plan.block), np.float32)
        dense[:, :width] = matrix[at : at + step]
        cost = np.zeros_like(dense)
        # llama.cpp weighs a weight by its own size too (ggml-quants.c, quantize_row_q4_1_impl).
        cost[:, :width] = weight * np.sqrt(
            (dense[:, :width] ** 2).mean(1, keepdims=True) + dense[:, :width] ** 2
        )
        dense_blocks, costs = (torch.from_numpy(m.reshape(-1, plan.block)) for m in (dense, cost))
        found = rounding.best(
            dense_blocks, costs, bits=bits, symmetric=plan.symmetric, half=half, search=plan.search
        )
        parts.append([part.numpy() for part in found])
    codes, scales, zeros = (np.concatenate(found) for found in zip(*parts, strict=True))
    return (
        _in_bytes(codes.reshape(rows, count, plan.block), bits),
        scales.reshape(rows, count).astype(matrix.dtype),
        None if plan.symmetric else _in_bytes(zeros.reshape(rows, count), bits),
    )


def as_given(
    ready: Given, plan: Plan, matrix: NDArray[Any]
) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """MatMulNBits' inputs from codes that are there. Raises StageError when they are not those of `matrix` [out, in]."""
    import numpy as np

    codes, scales, zeros = ready
    count = -(-matrix.shape[1] // plan.block)
    if codes.shape != matrix.shape or scales.shape != (len(matrix), count) or zeros.shape != scales.shape:
        raise StageError(
            f"codes {codes.shape} with scales {scales.shape} are not those of a weight {matrix.shape} in blocks of {plan.block}"
        )
    padded = np.zeros((len(codes), count * plan.block), np.uint8)
    padded[:, : codes.shape[1]] = codes
    blocks = padded.reshape(len(codes), count, plan.block)
    far = 0.0
    for at in range(0, len(codes), 1024):
        rows = slice(at, at + 1024)
        here = (blocks[rows].astype(np.float32) - zeros[rows, :, None]) * scales[rows, :, None].astype(
            np.float32
        )
        here = here.reshape(len(here), -1)[:, : codes.shape[1]]
        far = max(far, float(np.abs(here - matrix[rows]).max() / max(1e-30, float(np.abs(here).max()))))
    if far > 2e-3:  # 16-bit numbers
        raise StageError(f"the codes are not the graph's weights: they differ by {far:.2g} of the largest")
    return _in_bytes(blocks, 4), scales.astype(matrix.dtype), _in_bytes(zeros, 4)


def _in_bytes(codes: NDArray[Any], bits: int) -> NDArray[Any]:
    """Codes side by side in the last axis, two in a byte where they have four bits, the first in the lower half."""
    import numpy as np

    if bits == 8:
        return codes
    if codes.shape[-1] % 2:
        codes = np.concatenate([codes, np.zeros((*codes.shape[:-1], 1), np.uint8)], -1)
    pairs: NDArray[Any] = codes[..., ::2] | codes[..., 1::2] << 4
    return pairs
