"""Blocks of 256 weights that are -1, 0 or 1 times a float16 (ggml-common.h, block_tq1_0, block_tq2_0)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgeft.grid.formats.block import (
    Format,
    Plane,
    Rounding,
    float16,
    levels_at,
    on_grid,
    weights,
    write_float16,
)
from edgeft.grid.formats.legacy import fields_are_scales

if TYPE_CHECKING:
    from torch import Tensor

LEVELS = (-1.0, 0.0, 1.0)
PARTS = ((0, 32, 5), (32, 16, 5), (48, 4, 4))
"""Of TQ1_0: first byte, bytes, weights in a byte. A part's first bytes' worth of weights are their first digits."""


def formats() -> tuple[Format, ...]:
    """TQ1_0 (five weights in a byte) and TQ2_0 (two bits each, which could say 2 as well)."""
    tq1 = Rounding(
        levels=LEVELS, group=256, fields=_tq1_fields, scales=fields_are_scales, codes=_tq1_codes, pack=_tq1_pack
    )  # fmt: skip
    tq2 = on_grid(
        "TQ2_0", block=256, bytes=66, levels=range(-1, 3), group=256, halves=[64], scales=fields_are_scales,
        planes=[Plane(start=0, bits=2, run=32)],
    )  # fmt: skip
    return Format(name="TQ1_0", block=256, bytes=54, dequantize=_tq1, rounding=tq1), tq2


def _tq1(blocks: Tensor) -> Tensor:
    return weights(levels_at(_tq1_codes(blocks), LEVELS), _tq1_fields(blocks), None)


def _tq1_fields(blocks: Tensor) -> Tensor:
    return float16(blocks, [52])


def _tq1_codes(blocks: Tensor) -> Tensor:
    """A byte is a fraction of 256 in base three: times 3 ** k, modulo 256, it starts with digit k."""
    import torch

    digits = []
    for start, size, count in PARTS:
        for k in range(count):
            shifted = blocks[:, start : start + size] * 3**k  # wraps, as the bytes of C do
            digits.append(((shifted.short() * 3) >> 8).to(torch.uint8))
    return torch.cat(digits, 1)


def _tq1_pack(blocks: Tensor, codes: Tensor, fields: Tensor | None) -> Tensor:
    """A byte whose digits stay stays itself: 256 bytes say 243 things, and the last four bytes' fifth digit nothing."""
    import torch

    packed, old, first = blocks.clone(), _tq1_codes(blocks), 0
    for start, size, count in PARTS:
        end = first + size * count
        digits = codes[:, first:end].reshape(-1, count, size)
        same = (digits == old[:, first:end].reshape(-1, count, size)).all(1)
        number = torch.zeros_like(digits[:, 0], dtype=torch.int32)
        for k in range(5):
            number = number * 3 + (digits[:, k].int() if k < count else 0)
        coded = ((number * 256 + 242) // 243).to(torch.uint8)  # rounded up, see quantize_row_tq1_0_ref
        packed[:, start : start + size] = torch.where(same, blocks[:, start : start + size], coded)
        first = end
    if fields is not None:
        write_float16(packed, [52], fields)
    return packed
