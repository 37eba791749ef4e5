"""Types that store eight (IQ3: four) weights as one entry of a table, with signs or a shift apart (ggml-common.h).

The tables are those of the pinned gguf-py. A weight of these types has no code of its own, so there is no rounding.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgeft import llamacpp
from edgeft.grid.formats.block import Format, Plane, as_float16, float16, weights, word

if TYPE_CHECKING:
    import torch
    from torch import Tensor

SHIFT = 0.125
"""IQ1S_DELTA: an entry of IQ1's table is moved up or down by it."""


def formats() -> tuple[Format, ...]:
    """IQ2_XXS, IQ2_XS, IQ2_S, IQ3_XXS, IQ3_S, IQ1_S and IQ1_M: block_iq2_xxs to block_iq1_m."""
    return (
        Format(name="IQ2_XXS", block=256, bytes=66, dequantize=_iq2_xxs),
        Format(name="IQ2_XS", block=256, bytes=74, dequantize=_iq2_xs),
        Format(name="IQ2_S", block=256, bytes=82, dequantize=_iq2_s),
        Format(name="IQ3_XXS", block=256, bytes=98, dequantize=_iq3_xxs),
        Format(name="IQ3_S", block=256, bytes=110, dequantize=_iq3_s),
        Format(name="IQ1_S", block=256, bytes=50, dequantize=_iq1_s),
        Format(name="IQ1_M", block=256, bytes=56, dequantize=_iq1_m),
    )


def _iq2_xxs(blocks: Tensor) -> Tensor:
    """Eight times: four bytes of indices, then 4 * 7 bits of signs and 4 of scale."""
    groups = blocks[:, 2:66].reshape(-1, 8, 8)
    scale, signs = _scale_and_signs(groups[:, :, 4:])
    levels = _entries("IQ2_XXS", groups[:, :, :4].reshape(-1, 32)) * signs
    return weights(levels, float16(blocks, [0]) * (0.5 + scale) * 0.25, None)


def _iq2_xs(blocks: Tensor) -> Tensor:
    """32 times 9 bits of index and 7 of signs, then 16 scales of four bits."""
    import torch

    words = torch.stack([word(blocks, 2 + 2 * i) for i in range(32)], 1)
    levels = _entries("IQ2_XS", words & 511) * _even_signs(words >> 9)
    scale = Plane(start=66, bits=4, run=1).read(blocks, 16).float()
    return weights(levels, float16(blocks, [0]) * (0.5 + scale) * 0.25, None)


def _iq2_s(blocks: Tensor) -> Tensor:
    """32 indices' low bytes, a sign for each weight, the indices' two high bits, 16 scales of four bits."""
    high = Plane(start=66, bits=2, run=1).read(blocks, 32).int()
    levels = _entries("IQ2_S", blocks[:, 2:34] | (high << 8)) * _signs(blocks, 34)
    scale = Plane(start=74, bits=4, run=1).read(blocks, 16).float()
    return weights(levels, float16(blocks, [0]) * (0.5 + scale) * 0.25, None)


def _iq3_xxs(blocks: Tensor) -> Tensor:
    """64 indices, then eight times 4 * 7 bits of signs and 4 of scale."""
    scale, signs = _scale_and_signs(blocks[:, 66:98].reshape(-1, 8, 4))
    levels = _entries("IQ3_XXS", blocks[:, 2:66]) * signs
    return weights(levels, float16(blocks, [0]) * (0.5 + scale) * 0.5, None)


def _iq3_s(blocks: Tensor) -> Tensor:
    """64 indices' low bytes, their high bits, a sign for each weight, eight scales of four bits."""
    high = Plane(start=66, bits=1, run=1).read(blocks, 64).int()
    levels = _entries("IQ3_S", blocks[:, 2:66] | (high << 8)) * _signs(blocks, 74)
    scale = Plane(start=106, bits=4, run=1).read(blocks, 8).float()
    return weights(levels, float16(blocks, [0]) * (1.0 + 2.0 * scale), None)


def _iq1_s(blocks: Tensor) -> Tensor:
    """32 indices' low bytes, then eight times 4 * 3 high bits, 3 of scale, and one that turns the shift down."""
    import torch

    words = torch.stack([word(blocks, 34 + 2 * i) for i in range(8)], 1)
    high = torch.stack([words >> bit for bit in (0, 3, 6, 9)], 2).reshape(-1, 32) & 7
    shift = (SHIFT - 2 * SHIFT * (words >> 15).float()).repeat_interleave(32, 1)
    scale = (2 * ((words >> 12) & 7) + 1).float()
    levels = _entries("IQ1_S", blocks[:, 2:34] | (high << 8)) + shift
    return weights(levels, float16(blocks, [0]) * scale, None)


def _iq1_m(blocks: Tensor) -> Tensor:
    """32 indices' low bytes; for each 3 high bits and one that turns the shift down; 16 scales of three bits, four in
    a 16-bit number, whose four free bits make up the float16."""
    import torch

    high = Plane(start=32, bits=4, run=1).read(blocks, 32).int()
    shift = (SHIFT - 2 * SHIFT * (high >> 3).float()).repeat_interleave(8, 1)
    words = torch.stack([word(blocks, 48 + 2 * i) for i in range(4)], 1)
    scale = torch.stack([words >> bit for bit in (0, 3, 6, 9)], 2).reshape(-1, 16) & 7
    quarters = words >> 12
    half = as_float16(quarters[:, 0] | quarters[:, 1] << 4 | quarters[:, 2] << 8 | quarters[:, 3] << 12)
    levels = _entries("IQ1_M", blocks[:, :32] | ((high & 7) << 8)) + shift
    return weights(levels, half.unsqueeze(1) * (2 * scale + 1).float(), None)


def _scale_and_signs(quads: Tensor) -> tuple[Tensor, Tensor]:
    """uint8 [n, 8, 4] -> scale [n, 8] out of the highest four bits, signs [n, 256] out of the others, 7 by 7."""
    import torch

    numbers = quads[..., 0].int()
    for i in range(1, 4):
        numbers = numbers | (quads[..., i].int() << 8 * i)
    signs = torch.stack([numbers >> bit for bit in (0, 7, 14, 21)], 2).reshape(-1, 32) & 127
    return ((numbers >> 28) & 15).float(), _even_signs(signs)


def _even_signs(bits: Tensor) -> Tensor:
    """int [n, k] of seven bits -> float32 [n, 8 * k]: minus one where a bit is set.

    The eighth weight's sign is not stored: it makes the number of minuses even (ksigns_iq2xs).
    """
    import torch

    seven = (bits.unsqueeze(-1) >> torch.arange(7, dtype=bits.dtype, device=bits.device)) & 1
    eight = torch.cat([seven, seven.sum(-1, keepdim=True, dtype=bits.dtype) & 1], -1)
    return 1.0 - 2.0 * eight.reshape(-1, 8 * bits.shape[1]).float()


def _signs(blocks: Tensor, start: int) -> Tensor:
    """float32 [n, 256]: minus one where a bit is set."""
    return 1.0 - 2.0 * Plane(start=start, bits=1, run=1).read(blocks, 256).float()


def _entries(name: str, indices: Tensor) -> Tensor:
    """float32 [n, 256]: the table's entries, one after the other."""
    return _table(name, indices.device)[indices.long()].reshape(-1, 256)


def _table(name: str, device: torch.device) -> Tensor:
    """float32 [entries, 8 or 4] on the device, read out of gguf-py and copied there once."""
    import torch

    if (table := _tables.get((name, device))) is None:
        kind = getattr(llamacpp.gguf().quants, name)
        kind.init_grid()
        table = _tables[name, device] = torch.tensor(kind.grid.reshape(kind.grid_shape), device=device)
    return table


_tables: dict[tuple[str, torch.device], Tensor] = {}
_table._dynamo_marked_constant = True  # type: ignore[attr-defined]  # torch.compiler.assume_constant_result, which would import torch now
