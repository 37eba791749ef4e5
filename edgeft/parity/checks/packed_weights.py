"""Are the packed weights of a folder those of the merged model, and is the training in them?

AWQ moves scale between neighbouring layers before it rounds: a column of one weight is multiplied by what a row of the
one before, or a norm, is divided by. So a packed weight is not the merged one number by number, but
W' = diag(r) W diag(c) + rounding for some positive r and c. These are fitted by least squares, and what is left of each
number is held against its group's step. Rounding to the nearest leaves half a step at most, and methods that trade one
number's error for another's leave more of a few: outliers that were clipped, columns that took over others' errors. Of
another layer's weight, or where a scale or a zero point is lost, most numbers are off by more than a step. Where nothing
was folded, r = c = 1 is tried first.

Whether the training is in it: the projection of W' − diag(r) W diag(c) on the change that training made, W − base, is 0
for the merged weight and −1 for the base's. Rounding errors cancel in it by the thousands.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeft import progress
from edgeft.errors import DataError
from edgeft.parity.checks import packed
from edgeft.parity.checks.check import Check
from edgeft.parity.checks.merged_weights import EMBEDDINGS, HEADS
from edgeft.parity.checks.packed import Layer, whole
from edgeft.parity.checks.tensors import Stored, in_checkpoint

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from edgeft.parity.checks.packed import Matrix

    Vector = NDArray[np.float64]

OFF, OFF_ROW = 0.4, 0.6
"""Shares of a weight's numbers, and of one row's, that may be off by more than a step. docs/certificate.md has what was
measured."""
WIDE = 256
"""Rows shorter than this are not told apart one by one: too few numbers for a share."""
PLAIN = 1.1
"""Root mean square of what is left, over step / sqrt(12), where weights were rounded to the nearest; fitting ends there."""
FITTED = 8
"""Rounds of fitting rows and columns by turns."""
SURE = 0.1
"""The training's share is told of weights whose rounding leaves it uncertain by less than this."""
MOST = 1 << 23
"""Numbers of a weight that are looked at; of larger ones every second row, every third …"""


@dataclass(frozen=True, kw_only=True)
class _Fit:
    """What came of one weight."""

    name: str
    broken: int
    """Scales that are not finite."""
    empty: bool
    """All zeros."""
    off: float
    """Share of the numbers that are off by more than a step."""
    row: int
    """The row where most are."""
    off_row: float
    """Share of that row."""
    flipped: int
    """Columns with another sign."""
    share: float | None
    """Of the training's change; None where there is none."""
    unsure: float
    """Standard deviation of it from rounding."""
    weight: float
    """How much it says about the whole: the change's energy over the rounding's."""


def checks(kind: str, folder: Path, merged: Path, base: Path | None = None) -> list[Check]:
    """Whether the packed weights of `folder` are `merged`'s and finite; with `base`, whether the training is in them.

    `kind` is the folder's format. A layer is in memory at a time, with the merged and the base's. A folder whose weights
    cannot be unpacked is answered with None.
    """
    before, untrained = in_checkpoint(merged), in_checkpoint(base) if base else {}
    found: list[_Fit] = []
    strange: list[str] = []
    try:
        for number, layer in enumerate(READERS[kind](folder, before)):
            progress.report("check the packed weights", number)
            if (own := before.get(layer.name)) is None or not _fits(layer, own):
                strange.append(layer.name)
                continue
            found.append(_fit(layer, own, untrained.get(layer.name)))
    except DataError as e:
        return [_check("packed weights", ("C-36",), None, str(e))]
    if strange or not found:
        said = f"{strange[0]} is no weight of the merged model" if strange else "no packed weight was found"
        return [_check("packed weights", ("C-34", "C-36"), False, said)]
    more = [_trained(found)] if untrained else []
    return [_finite(found), _same(found), *_plain(PLAIN_PARTS[kind](folder), before), *more]


def _check(name: str, codes: tuple[str, ...], ok: bool | None, said: str) -> Check:
    return Check(step="quantized", name=name, codes=codes, ok=ok, said=said)


def _fit(layer: Layer, own: Stored, base: Stored | None) -> _Fit:
    import numpy as np

    broken = int((~np.isfinite(layer.scales)).sum() + (~np.isfinite(layer.weight)).sum())
    every = -(-layer.weight.size // MOST)
    q, w, steps = layer.weight[::every], _rows(own, layer, every), layer.scales[::every].astype(np.float64)
    if broken or not q.any():
        return _Fit(
            name=layer.name,
            broken=broken,
            empty=not broken,
            off=0,
            row=0,
            off_row=0,
            flipped=0,
            share=None,
            unsure=0,
            weight=0,
        )
    product, square, energy_q = q * w, w * w, float((q.astype(np.float64) ** 2).sum())
    noise = float((steps**2).mean() / 12)
    r, c = np.ones(len(q)), np.ones(q.shape[1])
    for _ in range(FITTED):
        left = energy_q - float(2 * r @ product @ c - r**2 @ square @ c**2)
        if left <= PLAIN**2 * noise * q.size:
            break
        c = _over(r @ product, r**2 @ square)
        r = _over(product @ c, square @ c**2)
    off = _off(q, w, r, c, np.abs(layer.scales[::every]), layer.group).mean(axis=1)
    spread = np.sqrt(noise / np.maximum(r**2 @ square, 1e-30))
    share, unsure, weight = None, 0.0, 0.0
    if base is not None:
        change = w - _rows(base, layer, every)
        energy = float(r**2 @ (change * change) @ c**2)
        if energy > 0 and noise > 0:
            share = 1 + float(r @ (q * change) @ c - r**2 @ (w * change) @ c**2) / energy
            unsure, weight = (noise / energy) ** 0.5, energy / noise
    return _Fit(
        name=layer.name, broken=0, empty=False, off=float(off.mean()), row=int(off.argmax()) * every,
        off_row=float(off.max()) if q.shape[1] >= WIDE else 0.0, flipped=int((c < -6 * spread).sum()), share=share, unsure=unsure, weight=weight,
    )  # fmt: skip


def _fits(layer: Layer, own: Stored) -> bool:
    height, width = layer.weight.shape
    if layer.first is None:
        return own.shape == (height, width)
    return own.shape[1:] == (width,) and layer.first + height <= own.shape[0]


def _rows(stored: Stored, layer: Layer, every: int) -> Matrix:
    """The rows of a checkpoint's weight that a packed one holds, or every so many of them."""
    first = layer.first or 0
    found: Matrix = whole(stored)[first : first + len(layer.weight)][::every]
    return found


def _off(q: Matrix, w: Matrix, r: Vector, c: Vector, steps: Matrix, group: int) -> NDArray[np.bool_]:
    """Which numbers differ from the merged ones, scaled, by more than their group's step; a tenth more for the fit."""
    import numpy as np

    where = np.arange(q.shape[1]) // group
    scaled = w * r[:, None].astype(np.float32) * c.astype(np.float32)
    found: NDArray[np.bool_] = np.abs(q - scaled) > 1.1 * steps[:, where]
    return found


def _over(a: Vector, b: Vector) -> Vector:
    import numpy as np

    found: Vector = np.divide(a, b, out=np.ones(len(a), np.float64), where=b > 0)
    return found


def _finite(found: Sequence[_Fit]) -> Check:
    name, codes = "finite weights", ("C-35", "C-36")
    if broken := [f for f in found if f.broken]:
        said = f"{broken[0].name} has {broken[0].broken} scales or weights that are not finite{_more(broken)}"
        return _check(name, codes, False, said)
    if empty := [f for f in found if f.empty]:
        return _check(name, codes, False, f"{empty[0].name} holds nothing but zeros{_more(empty)}")
    return _check(name, codes, True, f"every step and weight of {len(found)} packed layers is finite")


def _same(found: Sequence[_Fit]) -> Check:
    name, codes = "packed weights", ("C-10", "C-36", "C-41")
    wrong = sorted((f for f in found if f.off > OFF or f.off_row > OFF_ROW), key=lambda f: -f.off)
    if wrong:
        said = (
            f"{wrong[0].name} is not the merged weight: {wrong[0].off:.0%} of its numbers, and {wrong[0].off_row:.0%} of row "
            f"{wrong[0].row}, are off by more than a step{_more(wrong)}"
        )
        return _check(name, codes, False, said)
    if flipped := [f for f in found if f.flipped]:
        said = f"{flipped[0].name} has {flipped[0].flipped} columns with another sign{_more(flipped)}"
        return _check(name, codes, False, said)
    mean, row = max(f.off for f in found), max(f.off_row for f in found)
    said = f"{len(found)} are the merged ones, rounded: at most {mean:.2%} of a weight, and {row:.1%} of a row, is off by more than a step"
    return _check(name, codes, True, said)


def _plain(parts: Iterable[tuple[str, Matrix]], before: Mapping[str, Stored]) -> list[Check]:
    """Embedding and output matrix where they are not packed: the merged ones, to the rounding of 16 bits."""
    import numpy as np

    name, codes, alike = "embedding and head", ("C-12", "C-34"), []
    embedding = next((n for n in before if n.endswith(EMBEDDINGS)), "")
    for part, values in parts:
        own = before.get(part) or (before.get(embedding) if part.endswith(HEADS) else None)
        if own is None or own.shape != values.shape:
            return [_check(name, codes, False, f"{part} of {values.shape} is not the merged model's")]
        wanted = whole(own)
        off = np.abs(values - wanted) > np.abs(wanted) / 256 + 1e-6
        if n := int(off.sum()) + int((~np.isfinite(values)).sum()):
            return [_check(name, codes, False, f"{part} differs from the merged one in {n:,} numbers")]
        alike.append(part)
    return (
        [_check(name, codes, True, f"{' and '.join(alike)}: the merged ones, in 16 bits or more")]
        if alike
        else []
    )


def _trained(found: Sequence[_Fit]) -> Check:
    name, codes = "training in the weights", ("C-01", "C-10")
    told = [f for f in found if f.share is not None]
    if not told:
        return _check(name, codes, None, "training changed none of the packed weights")
    total = sum(f.weight for f in told)
    share, unsure = sum(f.weight * (f.share or 0) for f in told) / total, total**-0.5
    sure = [f for f in told if f.unsure < SURE]
    if not sure and unsure > SURE:
        said = f"the change of training is too small beside the rounding to be told ({share:.2f} ± {unsure:.2f} of it)"
        return _check(name, codes, None, said)
    if lost := [f for f in sure if (f.share or 0) < 0.5] or ([told[0]] if share < 0.5 else []):
        said = f"{lost[0].name} is the base's: {lost[0].share or 0:.2f} of what training changed is in it{_more(lost)}"
        return _check(name, codes, False, said)
    said = f"{share:.3f} ± {unsure:.3f} of what training changed is in the packed weights; told of each of {len(sure)}"
    return _check(name, codes, True, said)


def _more(some: Sequence[_Fit]) -> str:
    return f", and so {len(some) - 1} more" if len(some) > 1 else ""


def _awq(folder: Path, _: Any) -> Iterable[Layer]:
    return packed.awq(folder)


def _onnx(folder: Path, merged: dict[str, Stored]) -> Iterable[Layer]:
    from edgeft.parity.checks import packed_onnx

    return packed_onnx.layers(folder, merged)


def _plain_onnx(folder: Path) -> Iterable[tuple[str, Matrix]]:
    from edgeft.parity.checks import packed_onnx

    return packed_onnx.plain(folder)


PLAIN_PARTS: dict[str, Callable[[Path], Iterable[tuple[str, Matrix]]]] = {
    "awq": packed.plain,
    "onnx": _plain_onnx,
}
READERS: dict[str, Callable[[Path, dict[str, Stored]], Iterable[Layer]]] = {"awq": _awq, "onnx": _onnx}
