"""What is really inside a folder that another runtime serves: kinds of tensors, bits per weight, bytes."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from edgeft.parity.checks import packed
from edgeft.parity.checks.tensors import in_checkpoint


@dataclass(frozen=True, kw_only=True)
class Inside:
    """A folder's contents, named as `llamacpp.tensor_types.TypeReport` names a GGUF file's."""

    counts: Mapping[str, int]
    """Tensors by kind: "int4", "F16"."""
    bits_per_weight: float
    """Scales and zero points included; a weight that two nodes share counts once."""
    file_bytes: int
    """All files of the folder."""


def inside(kind: str, folder: Path) -> Inside:
    """Read it off the files of a folder of the format `kind` (`served.format_of`)."""
    counts, stored, weights = (_onnx if kind == "onnx" else _awq)(folder)
    total = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return Inside(counts=counts, bits_per_weight=8 * stored / weights, file_bytes=total)


def _awq(folder: Path) -> tuple[dict[str, int], int, int]:
    """Tensors by kind, bytes of all, and how many weights they hold."""
    found, parts = in_checkpoint(folder), set()
    counts, weights = Counter[str](), 0
    for layer in packed.awq(folder):
        counts["int4" if layer.bits == 4 else f"int{layer.bits}"] += 1
        weights += layer.weight.size
        parts.add(layer.name.removesuffix(".weight"))
    for name, one in found.items():
        if name.rpartition(".")[0] not in parts or name.endswith(".bias"):
            counts[one.dtype] += 1
            weights += math.prod(one.shape)
    return dict(counts), sum(one.size for one in found.values()), weights


def _onnx(folder: Path) -> tuple[dict[str, int], int, int]:
    from edgeft.parity.checks import packed_onnx

    return packed_onnx.inside(folder)
