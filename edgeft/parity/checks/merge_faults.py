"""What is wrong with one merged tensor, measured so that it can be named.

A weight is right when each number is base + scale · B A rounded, with what one more 16-bit rounding on the way may add,
since other tools round twice. If it is not: the scale that fits best, and what is left over after it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from edgeft.parity.checks.lora import Change
from edgeft.parity.checks.tensors import BLOCK, Stored, rows

if TYPE_CHECKING:
    import torch

UNIT = {"F16": 2.0**-11, "BF16": 2.0**-8, "F32": 2.0**-24, "F64": 2.0**-24}
"""Largest relative error of one rounding: half a step. float64 is computed with in float32."""
_TINY = {"F16": 2.0**-25, "BF16": 2.0**-134, "F32": 2.0**-150, "F64": 0.0}
"""The same among the subnormal numbers, absolute."""

Fault = Literal["", "lost", "nothing", "scale", "other", "broken", "zero"]
"""lost: still the base's. nothing: so it should be, the adapter's change is below the rounding. scale: base + another
multiple of B A. other: neither. broken: not finite. zero: nothing left."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """What one tensor of the merged checkpoint is, measured against what it should be."""

    name: str
    fault: Fault
    adapted: bool
    off: float
    """What is left over, relative to the base's norm: 0 when right, about 1.4 for another tensor's values."""
    largest: float
    scale: float = 0.0
    """Of B A, as found; meaningful when the fault is "scale"."""
    broken: int = 0
    """Numbers that are not finite."""
    four_bit: bool = False


def measure(name: str, before: Stored, after: Stored, change: Change | None) -> Found:
    """Compare the merged tensor `after` with the base's `before` plus `change`; None for a tensor without an adapter.

    Both have the same shape. Reads each once, a block at a time.
    """
    if change is None:
        return _untouched(name, before, after)
    sums = _Sums()
    for block in _blocks(before, after, change):
        sums.add(*block)
    return sums.judge(name, change, four_bit=_four_bit(after))


def same_bytes(before: Stored, after: Stored) -> bool:
    """Whether two tensors hold the same numbers to the bit, `before` rounded to the type of `after`."""
    if before.shape != after.shape:
        return False
    pairs = zip(rows(before), rows(after), strict=True)
    return all(_differing(old.to(new.dtype), new) == 0 for (_, old), (_, new) in pairs)


def _differing(a: torch.Tensor, b: torch.Tensor) -> int:
    """How many numbers have other bits; so a NaN equals itself."""
    import torch

    whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return int((a.view(whole) != b.view(whole)).sum())


def _untouched(name: str, before: Stored, after: Stored) -> Found:
    """A tensor without an adapter must be the base's, rounded to the merge's type, to the bit."""
    import torch

    differing, broken, largest, apart, norm, filled = 0, 0, 0.0, 0.0, 0.0, 0
    for (_, old), (_, new) in zip(rows(before), rows(after), strict=True):
        wanted, wide = old.to(new.dtype), new.float()
        broken += int((~torch.isfinite(wide)).sum())
        largest = max(largest, float(wide.abs().max()))
        filled += int(new.count_nonzero())
        norm += float(wanted.float().square().sum(dtype=torch.float64))
        if changed := _differing(wanted, new):
            differing += changed
            apart += float((wide - wanted.float()).square().sum(dtype=torch.float64))
    fault: Fault = "broken" if broken else "zero" if norm and not filled else "other" if differing else ""
    return Found(
        name=name, fault=fault, adapted=False, off=(apart / norm) ** 0.5 if norm else float(differing > 0),
        largest=largest, broken=broken,
    )  # fmt: skip


def _blocks(
    before: Stored, after: Stored, change: Change
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.dtype]]:
    """Base, merge, the adapter's share and what its own rounding may add, each float32, and the merge's type."""
    # Conv1D keeps W as (in, out): there the share is (B A)^T = A^T B^T.
    left, right = (change.a.T, change.b.T) if change.transposed else (change.b, change.a)
    step = max(1, BLOCK // max(1, before.columns))
    unit = max(UNIT[after.dtype], 2.0**-20)
    across = right.norm(dim=0)
    for (row, old), (_, new) in zip(rows(before, step), rows(after, step), strict=True):
        some = left[row : row + len(old)]
        share = change.scale * (some @ right)
        # A tool may hold A and B in 16 bits; by Cauchy and Schwarz this bounds what that changes.
        slack = (2 * unit * abs(change.scale)) * some.norm(dim=1)[:, None] * across
        yield old.float(), new.float(), share, slack, new.dtype


class _Sums:
    """Running sums over a weight's blocks, in float64: all that the verdict needs."""

    def __init__(self) -> None:
        self.outside = self.broken = self.filled = 0
        self.largest = 0.0
        self.base = self.left = self.budget = self.moved = self.share = self.along = 0.0
        self.expected = self.expected_along = 0.0

    def add(
        self,
        old: torch.Tensor,
        new: torch.Tensor,
        share: torch.Tensor,
        slack: torch.Tensor,
        dtype: torch.dtype,
    ) -> None:
        import torch

        def dot(x: torch.Tensor, y: torch.Tensor) -> float:
            return float((x * y).sum(dtype=torch.float64))

        short = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32"}.get(dtype, "F64")
        total, rounded = old + share, old.to(dtype).float()
        tolerance = UNIT[short] * (old.abs() + share.abs() + new.abs()) + slack + 2 * _TINY[short]
        rest, moved = new - total, new - old
        self.broken += int((~torch.isfinite(new)).sum())
        self.filled += int(new.count_nonzero())
        self.largest = max(self.largest, float(new.abs().max()))
        self.outside += int((rest.abs() > tolerance).sum())
        self.base += dot(old, old)
        self.left += dot(rest, rest)
        self.budget += dot(tolerance, tolerance)
        self.moved += dot(moved, moved)
        self.share += dot(share, share)
        self.along += dot(moved, share)
        wanted = total.to(dtype).float() - rounded
        self.expected += dot(wanted, wanted)
        self.expected_along += dot(new - rounded, wanted)

    def judge(self, name: str, change: Change, *, four_bit: bool) -> Found:
        """`expected` is what rounding lets through of the adapter: where it is small, only this shows it is there."""
        through = self.expected_along / self.expected if self.expected else 0.0
        fit = self.along / self.share if self.share else 0.0
        unexplained = self.moved - fit * self.along
        fault: Fault = ""
        if self.broken:
            fault = "broken"
        elif self.base and not self.filled:
            fault = "zero"
        elif self.outside or abs(through - 1) > 0.1:
            small = unexplained <= self.budget
            if small and abs(through) < 0.1:
                fault = "lost" if self.expected else "nothing"
            else:
                fault = "scale" if small and abs(fit - 1) > 0.05 else "other"
        return Found(
            name=name, fault=fault, adapted=True, off=(self.left / self.base) ** 0.5 if self.base else 1.0,
            largest=self.largest, scale=fit * change.scale, broken=self.broken,
            four_bit=fault == "other" and four_bit,
        )  # fmt: skip


def _four_bit(stored: Stored) -> bool:
    """Whether the first numbers are what 4-bit blocks of 64, bitsandbytes' own size, leave: 16 different ones a block."""
    _, first = next(rows(stored, max(1, 4096 // max(1, stored.columns))))
    blocks = first.flatten()[:4096]
    groups = blocks[: len(blocks) // 64 * 64].reshape(-1, 64).tolist()
    return bool(groups) and max(len(set(group)) for group in groups) <= 16
