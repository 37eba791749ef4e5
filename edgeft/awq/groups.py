"""Which group size fits a model's widths, and which servers can take the result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from edgeft.awq.layouts import PER_WORD
from edgeft.errors import StageError

GROUPS = (128, 64, 32)
"""The sizes that Marlin's kernels take, largest first (vLLM 0.32, quantization/utils/marlin_utils.py:
MARLIN_SUPPORTED_GROUP_SIZES; SGLang 0.5.23 has the same)."""

INSTEAD = 'take [[quantize]] kind = "gguf", whose types fall back tensor by tensor'
"""What to do with a model that cannot be done."""


def choose(shapes: Mapping[str, Sequence[int]], wanted: int | str = "auto") -> int:
    """The group size for weights of these shapes [out, in] by name: `wanted`, or the largest that divides every `in`.

    Raises StageError naming the tensor and the width that do not divide.
    """
    for name, (out, _) in shapes.items():
        if out % PER_WORD:
            raise StageError(
                f"{name} has {out} rows; both layouts of AWQ pack {PER_WORD} of them into one number, so their count must be "
                f"a multiple of {PER_WORD}",
                hint=INSTEAD,
            )
    sizes = GROUPS if wanted == "auto" else (int(wanted),)
    for size in sizes:
        if all(width % size == 0 for _, width in shapes.values()):
            return size
    smallest = sizes[-1]
    name, width = next((n, w) for n, (_, w) in shapes.items() if w % smallest)
    fitting = next((g for g in GROUPS if all(w % g == 0 for _, w in shapes.values())), None)
    raise StageError(
        f"rows of {name} have {width} numbers, which groups of {smallest} do not divide"
        + ("" if wanted != "auto" else f"; neither do {GROUPS[0]} or {GROUPS[1]}"),
        hint=f"set group = {fitting}, which divides every width of this model" if fitting
        else INSTEAD,
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Loader:
    """Whether one program loads a folder, by that program's own source (docs/awq.md names the files)."""

    name: str
    ok: bool
    said: str

    def facts(self) -> dict[str, Any]:
        """Ready for JSON."""
        return asdict(self)


def loaders(layout: str, shapes: Mapping[str, Sequence[int]]) -> list[Loader]:
    """Who loads weights of these shapes [out, in], in a layout and a group size that divides them.

    As of vLLM 0.32, SGLang 0.5.23 and transformers 5.23, on one GPU: tensor parallelism cuts the widths once more.
    """
    fused = _fused(shapes)
    tiles = next(((n, s) for n, s in fused.items() if not _tiled(*s)), None)
    odd = next(((n, s) for n, s in fused.items() if s[0] % 32 or s[1] % 32), None)
    gemm = layout == "gemm"
    return [
        Loader(
            name="vLLM, CUDA", ok=True,
            said="Marlin kernels" + (f", with {_named(*tiles)} padded to their tiles" if tiles else ""),
        ),
        Loader(
            name="vLLM, CPU", ok=odd is None,
            said=f"its kernel wants multiples of 32, {_named(*odd)} is none" if odd else "its own 4-bit kernel",
        ),
        Loader(
            name="SGLang, CUDA", ok=gemm or tiles is None,
            said="Marlin kernels" if tiles is None else
            f"{_named(*tiles)} and others do not fill Marlin's tiles: slower kernels there, in float16 only" if gemm else
            f"{_named(*tiles)} does not fill Marlin's tiles; take layout = \"gemm\", for which it has other kernels",
        ),
        Loader(
            name="transformers", ok=True,
            said="with the package gptqmodel" if gemm else "with the package compressed-tensors",
        ),
    ]  # fmt: skip


def _tiled(out: int, width: int) -> bool:
    """Whether Marlin computes a shape without padding: its tiles are 128 (in) x 64 (out) or 64 x 128."""
    return (out % 64 == 0 and width % 128 == 0) or (out % 128 == 0 and width % 64 == 0)


def _named(name: str, shape: Sequence[int]) -> str:
    return f"{name} ({shape[0]} x {shape[1]})"


def _fused(shapes: Mapping[str, Sequence[int]]) -> dict[str, tuple[int, int]]:
    """As servers load them: q, k and v as one matrix, gate and up as one."""
    found: dict[str, tuple[int, int]] = {}
    for name, (out, width) in shapes.items():
        where, _, last = name.removesuffix(".weight").rpartition(".")
        last = _FUSED.get(last, last)
        key = f"{where}.{last}" if where else last
        found[key] = found.get(key, (0, 0))[0] + out, width
    return found


_FUSED = {"q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj", "gate_proj": "gate_up_proj",
          "up_proj": "gate_up_proj"}  # fmt: skip
