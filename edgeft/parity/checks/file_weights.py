"""Is a quantized GGUF file its 16-bit source, no further off than its types must be? Tensor by tensor."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from edgeft.llamacpp import runtime
from edgeft.llamacpp.header import GGML_TYPES, Header, Tensor, read
from edgeft.llamacpp.tensor_types import main_type, types_in
from edgeft.parity.checks.check import Check, Step
from edgeft.parity.checks.tensors import numbers, raw_bytes, requantized

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

LIMITS: Mapping[str, float] = {
    "Q8_0": 0.025, "Q6_K": 0.07, "Q5_K": 0.12, "Q5_1": 0.12, "Q5_0": 0.18, "Q4_K": 0.25, "Q4_1": 0.25, "Q4_0": 0.35,
    "IQ4_NL": 0.25, "IQ4_XS": 0.25, "MXFP4": 0.35, "NVFP4": 0.35, "Q3_K": 0.5, "IQ3_S": 0.6, "IQ3_XXS": 0.75,
    "Q2_K": 0.8, "IQ2_S": 0.9, "IQ2_XS": 0.9, "IQ2_XXS": 0.9, "IQ1_M": 0.9, "IQ1_S": 0.9,
    "TQ1_0": 0.95, "TQ2_0": 0.95, "Q1_0": 0.95, "Q2_0": 0.95,
}  # fmt: skip
"""The largest ||dequantized - w|| / ||w|| of a whole tensor. What is not this tensor measures 1 (zeros, or values that
have nothing to do with it and are small) to 1.4 (another tensor's), so every limit is below 1.

Measured with `ggml_quantize_chunk` of the pinned build on normal, Student t(3), Laplace, uniform and lognormal weights,
normal ones with 1 in 32 outliers of 8 sigma, shifted by 10 sigma, and with lognormal column scales, each with and
without a lognormal importance matrix, and on 22 tensors of SmolLM2-135M. Normal, worst, worst of SmolLM2: Q8_0 .005
.010 .006; Q6_K .018 .029 .021; Q5_K .036 .052 .039; Q5_0 .043 .073 .052; Q4_K .072 .100 .078; Q4_1 .079 .113 .084; Q4_0
.087 .140 .104; IQ4_NL, IQ4_XS .077 .110 .085; MXFP4 .116 .158 .125; Q3_K .151 .218 .172; IQ3_S .167 .289 .189; IQ3_XXS
.213 .365 .249; Q2_K .298 .365 .339; IQ2_S .265 .554 .341; IQ2_XXS .344 .680 .411; IQ1_S .487 .647 .553; TQ1_0 .811 .829
.859. The limits are at least twice the worst, where that leaves them below 0.9."""
EXACT = ("F32", "F16", "BF16", "F64", "I8", "I16", "I32", "I64")
"""Types that hold the source's numbers, rounded once at most."""


@dataclass(frozen=True, kw_only=True)
class _Seen:
    """One tensor of the file, beside the source's of the same name."""

    tensor: Tensor
    error: float
    """||file - source|| / ||source||."""
    differing: int
    """Numbers that are not the source's, rounded; of EXACT types only."""
    broken: int
    """Numbers that are not finite."""
    norm: float
    """||file|| / ||source||."""

    @property
    def wrong(self) -> bool:
        if self.tensor.type in EXACT:
            return self.differing > 0
        return not self.error <= LIMITS.get(self.tensor.type, 0.9)


def quantized(source: Path, file: Path) -> list[Check]:
    """Check a quantized GGUF `file` against the F32, F16 or BF16 GGUF `source` it was made from.

    Reads both once, 2^20 weights at a time. The checks: source precision (C-41), tensor list (C-32, C-34), block count
    (C-34), header keys (C-20, C-21, C-25), tensor types (C-39), finite weights (C-35), weights (C-36, C-38). Raises
    DataError when either is no complete GGUF file.
    """
    before, after = read(source), read(file)
    theirs = {t.name: t for t in before.tensors}
    seen = [
        _see(source, before, theirs[t.name], file, after, t)
        for t in after.tensors
        if t.name in theirs and theirs[t.name].shape == t.shape
    ]
    return [
        _source(source, before, file, after),
        _same_tensors(before, after),
        block_count("quantized", after),
        _keys(source, before, file, after),
        _types(file, after),
        _finite(seen),
        _weights(seen, source, before, file, after),
    ]


def block_count(step: Step, header: Header) -> Check:
    """C-34: the file has the tensors of as many blocks as its header announces."""
    key = f"{header.keys.get('general.architecture')}.block_count"
    announced = header.keys.get(key)
    there = len({match[1] for t in header.tensors if (match := re.search(r"\bblk\.(\d+)\.", t.name))})
    said = f"{there} blocks of layers, as {key} says"
    if announced != there:
        said = f"{key} is {announced}, but the file has tensors of {there} blocks"
    return Check(step=step, name="block count", codes=("C-34",), ok=announced == there, said=said)


def _check(name: str, codes: tuple[str, ...], ok: bool | None, said: str) -> Check:
    return Check(step="quantized", name=name, codes=codes, ok=ok, said=said)


def _source(source: Path, before: Header, file: Path, after: Header) -> Check:
    """C-41. A source that is quantized itself may be all that is left to compare with; that the file was made from it
    is proven when requantizing its dequantized weights gives the file's very bytes."""
    import numpy as np

    name, codes = "source precision", ("C-41",)
    theirs = {t.name: t for t in before.tensors if t.type not in EXACT}
    if not theirs:
        return _check(name, codes, True, "the source holds floats of 16 bits or more")
    kinds = ", ".join(sorted({t.type for t in theirs.values()}))
    both = [
        t for t in after.tensors
        if t.name in theirs and t.type not in EXACT and t.type[:2] not in ("IQ", "TQ")
        if t.type != theirs[t.name].type and t.shape == theirs[t.name].shape
    ]  # fmt: skip
    if both:
        small = min(both, key=lambda t: t.weights)
        values = np.concatenate(list(numbers(source, before, theirs[small.name])))
        if requantized(values, small) == raw_bytes(file, after, small):
            said = f"quantized twice: {small.name} is {small.type} made of the source's {theirs[small.name].type}"
            return _check(name, codes, False, said)
    said = f"the source is quantized itself ({kinds}): what was lost before it cannot be seen here"
    return _check(name, codes, None, said)


def _same_tensors(before: Header, after: Header) -> Check:
    name, codes = "tensor list", ("C-32", "C-34")
    theirs, ours = ({t.name: t.shape for t in header.tensors} for header in (before, after))
    for missing in sorted(theirs.keys() - ours.keys()):
        return _check(name, codes, False, f"the file lacks {missing}, which its source has")
    for extra in sorted(ours.keys() - theirs.keys()):
        return _check(name, codes, False, f"the file has {extra}, which its source lacks")
    for tensor, shape in ours.items():
        if shape != theirs[tensor]:
            return _check(
                name, codes, False, f"{tensor} is {shape} in the file and {theirs[tensor]} in its source"
            )
    return _check(name, codes, True, f"the source's {len(ours)} tensors, each with its shape")


def _keys(source: Path, before: Header, file: Path, after: Header) -> Check:
    """C-20, C-21, C-25: quantizing changes no tokenizer, template, special id or hyperparameter."""
    kept = ("tokenizer.", f"{before.keys.get('general.architecture')}.")
    names = {n for n in (*before.spans, *after.spans) if n.startswith(kept) or n == "general.architecture"}
    with source.open("rb") as old, file.open("rb") as new:
        for name in sorted(names):
            places = ((old, before.spans.get(name)), (new, after.spans.get(name)))
            values = []
            for stream, span in places:
                stream.seek(span[0] if span else 0)
                values.append(stream.read(span[1] - span[0]) if span else b"")
            if values[0] != values[1]:
                said = f"{name} is {_shown(after, name)} in the file and {_shown(before, name)} in its source"
                return _check("header keys", ("C-20", "C-21", "C-25"), False, said)
    said = f"{len(names)} keys of tokenizer, template and model are the source's"
    return _check("header keys", ("C-20", "C-21", "C-25"), True, said)


def _shown(header: Header, name: str) -> str:
    if name not in header.spans:
        return "missing"
    value = header.keys[name]
    if value is None or isinstance(value, list):
        return f"a list of {header.lengths.get(name, 0)}"
    return repr(value) if len(repr(value)) < 40 else f"a text of {len(str(value))} characters"


def _types(file: Path, after: Header) -> Check:
    """C-39: a file may hold larger types than it is named after, where rows do not divide; not mostly smaller ones."""
    report = types_in(file)
    counts = ", ".join(f"{kind} ×{n}" for kind, n in report.counts.items())
    said = f"{report.bits_per_weight:.2f} bits per weight: {counts}"
    kinds = {
        kind.value: kind.name.removeprefix("MOSTLY_").removeprefix("ALL_")
        for kind in runtime.gguf().LlamaFileType
    }
    label = kinds.get(after.keys.get("general.file_type"), "")
    bits = {kind: 8 * size / block for kind, block, size in GGML_TYPES.values()}
    if label in ("", "GUESSED"):
        return _check(
            "tensor types", ("C-39",), None, f"the file does not say what it was quantized to; {said}"
        )
    matrices = [t for t in after.tensors if len(t.shape) > 1]
    less = sum(t.weights for t in matrices if bits[t.type] < bits[main_type(label)])
    if 2 * less > (whole := sum(t.weights for t in matrices)):
        said = f"the file calls itself {label}, but {less / whole:.0%} of its weights have fewer bits: {said}"
        return _check("tensor types", ("C-39",), False, said)
    return _check("tensor types", ("C-39",), True, f"{label}, {said}")


def _see(source: Path, before: Header, old: Tensor, file: Path, after: Header, new: Tensor) -> _Seen:
    import numpy as np

    off = norm = mine = 0.0
    differing = broken = 0
    for a, b in zip(numbers(source, before, old), numbers(file, after, new), strict=True):
        if new.type in EXACT:
            differing += int(np.count_nonzero(_rounded(a, new.type) != b))
        rest = b - a
        broken += len(b) - int(np.count_nonzero(np.isfinite(b)))
        off += float(np.dot(rest, rest))
        norm += float(np.dot(a, a))
        mine += float(np.dot(b, b))
    error, size = ((x / norm) ** 0.5 if norm else float(x > 0) for x in (off, mine))
    return _Seen(tensor=new, error=error, differing=differing, broken=broken, norm=size)


def _rounded(values: NDArray[np.float32], kind: str) -> NDArray[np.float32]:
    """To the nearest number of the type, ties to even, as ggml rounds."""
    import numpy as np

    if kind == "F16":
        with np.errstate(over="ignore"):
            return values.astype(np.float16).astype(np.float32)
    if kind == "BF16":
        bits = np.ascontiguousarray(values).view(np.uint32)
        return ((bits + (0x7FFF + (bits >> 16 & 1))) & 0xFFFF0000).astype(np.uint32).view(np.float32)
    return values


def _finite(seen: Sequence[_Seen]) -> Check:
    name, codes = "finite weights", ("C-35",)
    if broken := [s for s in seen if s.broken]:
        said = f"{_share(broken, seen)} not finite in {broken[0].broken} places ({broken[0].tensor.type})"
        return _check(name, codes, False, said)
    return _check(name, codes, True, f"all weights of {len(seen)} tensors are finite numbers")


def _weights(seen: Sequence[_Seen], source: Path, before: Header, file: Path, after: Header) -> Check:
    """C-36, C-38: each tensor is the source's, as near as its type allows."""
    name, codes = "weights", ("C-36", "C-38")
    wrong = sorted((s for s in seen if s.wrong and not s.broken), key=lambda s: -s.error)
    if 2 * len(wrong) > len(seen):
        said = f"the file was made from another model: {_share(wrong, seen)} not the source's"
        return _check(name, codes, False, f"{said} (relative error {wrong[0].error:.3g})")
    if wrong:
        said = f"{_share(wrong, seen)} not the source's: {_diagnosis(wrong[0], source, before, file, after)}"
        return _check(name, codes, False, said)
    packed = [s for s in seen if s.tensor.type not in EXACT and not s.broken]
    said = f"{len(seen) - len(packed)} tensors hold the source's numbers"
    if packed:
        worst = max(packed, key=lambda s: s.error / LIMITS.get(s.tensor.type, 0.9))
        limit = LIMITS.get(worst.tensor.type, 0.9)
        said += f"; {len(packed)} are off by their type's rounding, at most {worst.error:.3g} of {limit} ({worst.tensor.name})"
    return _check(name, codes, True, said)


def _diagnosis(wrong: _Seen, source: Path, before: Header, file: Path, after: Header) -> str:
    """Why a tensor is not its source's: zeros, another tensor's numbers, or neither."""
    import numpy as np

    tensor = wrong.tensor
    if not wrong.norm:
        return "it is all zeros"
    if wrong.error > 0.9:
        mine = next(numbers(file, after, tensor))
        for other in before.tensors:
            if other.shape == tensor.shape and other.name != tensor.name:
                theirs = next(numbers(source, before, other))
                if np.linalg.norm(mine - theirs) <= LIMITS.get(tensor.type, 1e-2) * np.linalg.norm(theirs):
                    return f"it holds the numbers of {other.name}"
    if tensor.type in EXACT:
        return f"{wrong.differing} of {tensor.weights} numbers differ, by {wrong.error:.3g} of its norm"
    limit = LIMITS.get(tensor.type, 0.9)
    return f"relative error {wrong.error:.3g}, where {tensor.type} stays below {limit}"


def _share(some: Sequence[_Seen], of: Sequence[_Seen]) -> str:
    if len(some) == 1:
        return f"{some[0].tensor.name} is"
    return f"{some[0].tensor.name} and {len(some) - 1} more of {len(of)} tensors are"
