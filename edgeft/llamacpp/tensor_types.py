"""Which types the weights of a GGUF file really have, read back from the file, and which a label could not keep."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from edgeft.errors import StageError
from edgeft.llamacpp.header import GGML_TYPES, read

_LABELS: Mapping[str, str] = {
    "MXFP4_MOE": "MXFP4", "Q2_K_S": "Q2_K", "Q3_K_S": "Q3_K", "Q3_K_M": "Q3_K", "Q3_K_L": "Q3_K",
    "Q4_K_S": "Q4_K", "Q4_K_M": "Q4_K", "Q5_K_S": "Q5_K", "Q5_K_M": "Q5_K", "IQ3_XS": "IQ3_S", "IQ3_M": "IQ3_S",
    "IQ2_S": "IQ2_XS", "IQ2_M": "IQ2_S",
}  # fmt: skip
"""Labels that are not themselves a tensor type, and the type most of their weights get
(llama_ftype_get_default_type in llama-quant.cpp)."""

_SMALLER_BLOCKS: Mapping[str, str] = {
    "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0", "Q2_K": "Q4_0", "Q3_K": "Q4_0", "TQ1_0": "Q4_0", "TQ2_0": "Q4_0",
    "IQ1_S": "IQ4_NL", "IQ1_M": "IQ4_NL", "IQ2_XXS": "IQ4_NL", "IQ2_XS": "IQ4_NL", "IQ2_S": "IQ4_NL",
    "IQ3_XXS": "IQ4_NL", "IQ3_S": "IQ4_NL", "IQ4_XS": "IQ4_NL",
}  # fmt: skip
"""tensor_type_fallback in llama-quant.cpp."""


@dataclass(frozen=True, kw_only=True)
class TypeReport:
    """What is in a GGUF file, by ggml type; the types in falling order of bytes."""

    counts: Mapping[str, int]
    """Tensors."""
    weights: Mapping[str, int]
    bytes: Mapping[str, int]
    file_bytes: int

    @property
    def bits_per_weight(self) -> float:
        """Over all tensors, norms included; the header is not counted."""
        total = sum(self.weights.values())
        return 8 * sum(self.bytes.values()) / total if total else 0.0

    def facts(self) -> dict[str, object]:
        """JSON-ready."""
        types = {
            name: {"tensors": self.counts[name], "weights": self.weights[name], "bytes": self.bytes[name]}
            for name in self.counts
        }
        return {
            "types": types,
            "bits_per_weight": round(self.bits_per_weight, 3),
            "file_bytes": self.file_bytes,
        }


def types_in(path: Path) -> TypeReport:
    """Count the tensors of a GGUF file. Raises DataError when it is not one."""
    tensors: dict[str, int] = {}
    weights: dict[str, int] = {}
    sizes: dict[str, int] = {}
    for tensor in read(path).tensors:
        tensors[tensor.type] = tensors.get(tensor.type, 0) + 1
        weights[tensor.type] = weights.get(tensor.type, 0) + tensor.weights
        sizes[tensor.type] = sizes.get(tensor.type, 0) + tensor.bytes
    order = sorted(sizes, key=lambda name: (-sizes[name], name))
    return TypeReport(
        counts={name: tensors[name] for name in order},
        weights={name: weights[name] for name in order},
        bytes={name: sizes[name] for name in order},
        file_bytes=path.stat().st_size,
    )


def main_type(label: str) -> str:
    """The ggml type a label is about: Q4_K for "Q4_K_M". Raises StageError for an unknown label."""
    name = _LABELS.get(label, label)
    if name not in {known for known, _, _ in GGML_TYPES.values()}:
        raise StageError(f"{label!r} is no quantization type")
    return name


def fits(label: str, row: int) -> str:
    """The type a tensor with rows of `row` weights gets when `label` is asked for: its own, or a fallback."""
    wanted = main_type(label)
    if row % _block(wanted) == 0:
        return wanted
    smaller = _SMALLER_BLOCKS.get(wanted, wanted)
    return smaller if row % _block(smaller) == 0 else "F16"


def expected_fallbacks(shapes: Mapping[str, tuple[int, ...]], label: str) -> dict[str, str]:
    """The weights among `shapes` (tensor name: ggml's order, row length first) that cannot have the label's type.

    Before anything is quantized, and so without the label's finer mix: a tensor that the mix would give more bits
    (Q6_K in a Q4_K_M) falls back too, to the larger type's own replacement. What really happened is what
    `quantize` returns and `types_in` reads.
    """
    wanted = main_type(label)
    return {
        name: got
        for name, shape in shapes.items()
        if len(shape) > 1 and name.endswith("weight") and "_norm." not in name
        if (got := fits(label, shape[0])) != wanted
    }


def _block(name: str) -> int:
    return next(block for known, block, _ in GGML_TYPES.values() if known == name)
