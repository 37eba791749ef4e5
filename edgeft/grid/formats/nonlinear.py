"""Four-bit codes into a table of sixteen uneven levels (ggml-common.h, block_iq4_nl, block_iq4_xs, kvalues_iq4nl)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgeft.grid.formats.block import Format, Plane, on_grid
from edgeft.grid.formats.legacy import fields_are_scales

if TYPE_CHECKING:
    from torch import Tensor

LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
"""None of them is zero."""


def formats() -> tuple[Format, ...]:
    """IQ4_NL (32 weights and one float16 scale) and IQ4_XS (256 weights, groups of 32 with a six-bit scale)."""
    iq4_nl = on_grid(
        "IQ4_NL", block=32, bytes=18, levels=LEVELS, group=32, halves=[0], scales=fields_are_scales,
        planes=[Plane(start=2, bits=4, run=16)],
    )  # fmt: skip
    iq4_xs = on_grid(
        "IQ4_XS", block=256, bytes=136, levels=LEVELS, group=32, halves=[0], scales=_iq4_xs_scales,
        planes=[Plane(start=8, bits=4, run=16)],
    )  # fmt: skip
    return iq4_nl, iq4_xs


def _iq4_xs_scales(blocks: Tensor, fields: Tensor) -> tuple[Tensor, None]:
    """Six bits each, minus 32: the low four in 4 bytes, the high two in the 16-bit number before them."""
    low = Plane(start=4, bits=4, run=1).read(blocks, 8)
    high = Plane(start=2, bits=2, run=1).read(blocks, 8)
    return fields[:, :1] * ((low | (high << 4)).float() - 32.0), None
