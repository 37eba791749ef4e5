"""Blocks of 256 weights in groups of 16 or 32, whose scales are small integers times a float16 (ggml-common.h).

Weights of Q2_K, Q4_K and Q5_K are `d * scale * code - dmin * min`, those of Q3_K and Q6_K `d * scale * level`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgeft.grid.formats.block import Format, Plane, on_grid

if TYPE_CHECKING:
    from torch import Tensor


def formats() -> tuple[Format, ...]:
    """Q2_K, Q3_K, Q4_K, Q5_K and Q6_K: block_q2_K to block_q6_K."""
    q2 = on_grid(
        "Q2_K", block=256, bytes=84, levels=range(4), group=16, halves=[80, 82], scales=_q2_scales,
        planes=[Plane(start=16, bits=2, run=32)],
    )  # fmt: skip
    # "hmask" set means that nothing is subtracted, which makes it the third bit of level + 4
    q3 = on_grid(
        "Q3_K", block=256, bytes=110, levels=range(-4, 4), group=16, halves=[108], scales=_q3_scales,
        planes=[Plane(start=32, bits=2, run=32), Plane(start=0, bits=1, run=32)],
    )  # fmt: skip
    q4 = on_grid(
        "Q4_K", block=256, bytes=144, levels=range(16), group=32, halves=[0, 2], scales=_q4_scales,
        planes=[Plane(start=16, bits=4, run=32)],
    )  # fmt: skip
    q5 = on_grid(
        "Q5_K", block=256, bytes=176, levels=range(32), group=32, halves=[0, 2], scales=_q4_scales,
        planes=[Plane(start=48, bits=4, run=32), Plane(start=16, bits=1, run=32)],
    )  # fmt: skip
    q6 = on_grid(
        "Q6_K", block=256, bytes=210, levels=range(-32, 32), group=16, halves=[208], scales=_q6_scales,
        planes=[Plane(start=0, bits=4, run=64), Plane(start=128, bits=2, run=32)],
    )  # fmt: skip
    return q2, q3, q4, q5, q6


def _q2_scales(blocks: Tensor, fields: Tensor) -> tuple[Tensor, Tensor]:
    packed = blocks[:, :16]
    return _times(fields, packed & 15, packed >> 4)


def _q3_scales(blocks: Tensor, fields: Tensor) -> tuple[Tensor, None]:
    """Six bits each, minus 32: the low four of all 16 in 8 bytes, the high two in 4 (quantize_row_q3_K_ref)."""
    low = Plane(start=96, bits=4, run=8).read(blocks, 16)
    high = Plane(start=104, bits=2, run=4).read(blocks, 16)
    return fields[:, :1] * ((low | (high << 4)).float() - 32.0), None


def _q4_scales(blocks: Tensor, fields: Tensor) -> tuple[Tensor, Tensor]:
    """Six bits each. Four scales and four minima in the low bits of 8 bytes, whose two high bits complete the
    nibbles of the other four scales (low) and minima (high) in the last 4 bytes (get_scale_min_k4)."""
    import torch

    scale, least, rest = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scales = torch.cat([scale & 63, (rest & 15) | ((scale >> 2) & 48)], 1)
    minima = torch.cat([least & 63, (rest >> 4) | ((least >> 2) & 48)], 1)
    return _times(fields, scales, minima)


def _q6_scales(blocks: Tensor, fields: Tensor) -> tuple[Tensor, None]:
    """Signed bytes."""
    return fields[:, :1] * ((blocks[:, 192:208] ^ 128).float() - 128.0), None


def _times(fields: Tensor, scales: Tensor, minima: Tensor) -> tuple[Tensor, Tensor]:
    """d times the scales and minus dmin times the minima.

    A product and no minus sign: Triton's -x is 0 - x, which makes the minus zero that 0 needs a zero.
    """
    return fields[:, :1] * scales.float(), fields[:, 1:] * (minima.float() * -1.0)
