"""Four-bit floats (e2m1) with a small float as scale: MXFP4 and NVFP4 (ggml-common.h, kvalues_mxfp4, ggml-impl.h).

The levels are twice the e2m1 values, to be integers; the scales are halved for it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgeft.grid.formats.block import Format, Plane, levels_at, on_grid, weights

if TYPE_CHECKING:
    from torch import Tensor

LEVELS = (-12.0, -8.0, -6.0, -4.0, -3.0, -2.0, -1.0, 0.0, 0.0, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0)
"""Codes 8 and 0 are minus zero and zero; both decode to zero without a sign."""


def formats() -> tuple[Format, ...]:
    """MXFP4 (32 weights, a scale that is a power of two) and NVFP4 (64 weights, groups of 16 with a ue4m3 scale)."""
    mxfp4 = on_grid(
        "MXFP4", block=32, bytes=17, levels=LEVELS, group=32, halves=[], scales=_power_of_two,
        planes=[Plane(start=1, bits=4, run=16)], recode=(_ascending, _sign_first),
    )  # fmt: skip
    return mxfp4, Format(name="NVFP4", block=64, bytes=36, dequantize=_nvfp4)


def _nvfp4(blocks: Tensor) -> Tensor:
    codes = _ascending(Plane(start=4, bits=4, run=8).read(blocks, 64))
    return weights(levels_at(codes, LEVELS), _ue4m3(blocks[:, :4]), None)


def _power_of_two(blocks: Tensor, fields: Tensor) -> tuple[Tensor, None]:
    """Half of 2 ** (e - 127), which is below float32's normal numbers for e = 0 and 1 (ggml_e8m0_to_fp32_half)."""
    import torch

    exponent = blocks[:, :1].int()
    bits = torch.where(exponent < 2, 0x200000 << exponent.clamp(max=1), (exponent - 1) << 23)
    return bits.view(torch.float32), None


def _ue4m3(scales: Tensor) -> Tensor:
    """Half of an unsigned float of 4 exponent and 3 mantissa bits, bias 7; the code of NaN is zero (ggml_ue4m3_to_fp32)."""
    import torch

    exponent, mantissa = (scales >> 3) & 15, (scales & 7).int()
    normal = (((exponent.int() + 119) << 23) | (mantissa << 20)).view(torch.float32)
    return torch.where(scales == 127, 0.0, torch.where(exponent == 0, mantissa.float() * 2.0**-10, normal))


def _ascending(bits: Tensor) -> Tensor:
    """Sign and magnitude -> index into LEVELS: 15 to 8 become 0 to 7, 0 to 7 become 8 to 15."""
    return bits ^ 8 ^ ((bits >> 3) * 7)


def _sign_first(codes: Tensor) -> Tensor:
    return codes ^ 15 ^ ((codes >> 3) * 7)
