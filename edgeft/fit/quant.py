"""The bytes of a model under a quantization label, tensor by tensor.

A label is a mixture: Q4_K_M holds Q6_K too, and where a row is no multiple of 256, Q5_0 and Q8_0 instead.
"""

from __future__ import annotations

from dataclasses import dataclass

from edgeft.errors import RecipeError
from edgeft.fit.families import Matrix
from edgeft.fit.mixture import BLOCKS, LABELS, VALUES, State, type_of
from edgeft.fit.shape import ModelShape


@dataclass(frozen=True, kw_only=True)
class Placed:
    """A matrix with the type it gets."""

    matrix: Matrix
    type: str

    @property
    def bytes(self) -> int:
        return self.matrix.rows * self.matrix.experts * row_bytes(self.type, self.matrix.columns)


def place(shape: ModelShape, label: str, *, imatrix: bool = False) -> tuple[Placed, ...]:
    """The type of every matrix of a model quantized to `label`. Raises RecipeError for an unknown label."""
    if label not in LABELS:
        raise RecipeError(f"the quantization {label!r} is not known", hint=f"choose from {', '.join(LABELS)}")
    state = State(
        label=label, imatrix=imatrix, tied=shape.tied, layers=shape.layers, n_experts=shape.n_experts,
        group=shape.heads // max(1, shape.kv_heads), values=sum(m.role in VALUES for m in shape.matrices),
    )  # fmt: skip
    return tuple(Placed(matrix=m, type=type_of(m, state)) for m in shape.matrices)


def weight_bytes(shape: ModelShape, label: str, *, imatrix: bool = False) -> int:
    """Bytes of all tensors of the quantized file, the 32-bit vectors included."""
    return sum(p.bytes for p in place(shape, label, imatrix=imatrix)) + 4 * shape.vectors


def file_bytes(shape: ModelShape, label: str, *, imatrix: bool = False) -> int:
    """The size of the GGUF file: the tensors, their list, and the vocabulary.

    The vocabulary is the one part that a shape cannot know: text, type and merges of a token take about 36
    bytes (SmolLM2: 1.7 MB for 49,152). A line of the tensor list with its padding takes about 96.
    """
    tensors = len(shape.matrices) + shape.vector_tensors
    return weight_bytes(shape, label, imatrix=imatrix) + 96 * tensors + 36 * shape.vocab


def row_bytes(kind: str, columns: int) -> int:
    """Bytes of one row of `columns` weights."""
    block, size = BLOCKS[kind]
    return columns // block * size
