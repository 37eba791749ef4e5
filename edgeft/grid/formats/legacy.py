"""Blocks with one float16 scale, and a float16 minimum in Q4_1 and Q5_1 (ggml-common.h)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgeft.grid.formats.block import Format, Plane, on_grid

if TYPE_CHECKING:
    from torch import Tensor


def formats() -> tuple[Format, ...]:
    """Q1_0, Q2_0, Q4_0, Q4_1, Q5_0, Q5_1 and Q8_0: block_q1_0 to block_q8_0."""
    q1_0 = on_grid(
        "Q1_0", block=128, bytes=18, levels=(-1, 1), group=128, halves=[0], scales=fields_are_scales,
        planes=[Plane(start=2, bits=1, run=1)],
    )  # fmt: skip
    q2_0 = on_grid(
        "Q2_0", block=64, bytes=18, levels=range(-1, 3), group=64, halves=[0], scales=fields_are_scales,
        planes=[Plane(start=2, bits=2, run=1)],
    )  # fmt: skip
    # The fifth bits are one 32-bit number whose bit i is weight i's: bytes of eight weights each.
    q4_0 = on_grid(
        "Q4_0", block=32, bytes=18, levels=range(-8, 8), group=32, halves=[0], scales=fields_are_scales,
        planes=[Plane(start=2, bits=4, run=16)],
    )  # fmt: skip
    q4_1 = on_grid(
        "Q4_1", block=32, bytes=20, levels=range(16), group=32, halves=[0, 2], scales=fields_are_scales,
        planes=[Plane(start=4, bits=4, run=16)],
    )  # fmt: skip
    q5_0 = on_grid(
        "Q5_0", block=32, bytes=22, levels=range(-16, 16), group=32, halves=[0], scales=fields_are_scales,
        planes=[Plane(start=6, bits=4, run=16), Plane(start=2, bits=1, run=1)],
    )  # fmt: skip
    q5_1 = on_grid(
        "Q5_1", block=32, bytes=24, levels=range(32), group=32, halves=[0, 2], scales=fields_are_scales,
        planes=[Plane(start=8, bits=4, run=16), Plane(start=4, bits=1, run=1)],
    )  # fmt: skip
    q8_0 = on_grid(
        "Q8_0", block=32, bytes=34, levels=range(-128, 128), group=32, halves=[0], scales=fields_are_scales,
        planes=[Plane(start=2, bits=8, run=32)], recode=(_flip_sign, _flip_sign),
    )  # fmt: skip
    return q1_0, q2_0, q4_0, q4_1, q5_0, q5_1, q8_0


def fields_are_scales(blocks: Tensor, fields: Tensor) -> tuple[Tensor, Tensor | None]:
    """d, or d and m: one scale a block, [n, 1]."""
    return fields[:, :1], (fields[:, 1:] if fields.shape[1] == 2 else None)


def _flip_sign(codes: Tensor) -> Tensor:
    """Signed bytes (as their bits) to indices and back: -128 is index 0."""
    return codes ^ 128
