"""Plain floats as blocks of one weight."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgeft.grid.formats.block import Format, float16, word

if TYPE_CHECKING:
    from torch import Tensor


def formats() -> tuple[Format, ...]:
    """F32, F16 and BF16, which is the upper half of a float32."""
    return (
        Format(name="F32", block=1, bytes=4, dequantize=_f32),
        Format(name="F16", block=1, bytes=2, dequantize=_f16),
        Format(name="BF16", block=1, bytes=2, dequantize=_bf16),
    )


def _f32(blocks: Tensor) -> Tensor:
    import torch

    return (word(blocks, 0) | (word(blocks, 2) << 16)).view(torch.float32).unsqueeze(-1)


def _f16(blocks: Tensor) -> Tensor:
    return float16(blocks, [0])


def _bf16(blocks: Tensor) -> Tensor:
    import torch

    return (word(blocks, 0) << 16).view(torch.float32).unsqueeze(-1)
