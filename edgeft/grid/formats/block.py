"""What a block type is to training, and the three steps most of them share: bits to codes, codes to weights, and back.

A weight of such a type is `scale * level[code] + offset`. Scale and offset belong to a group of weights; they come out
of the block's float16 numbers ("fields"). Every product is exact in float32: 11 bits of a float16 with those of a
group's scale and of a level are never more than 24. So neither the order of the factors nor a compiler's fused
multiply-add can change a bit, as long as the fields are float16 numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    Scales = Callable[[Tensor, Tensor], tuple[Tensor, Tensor | None]]
    Recode = Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Rounding:
    """How the weights of a type lie on their grid: which codes there are, and how they are stored."""

    levels: tuple[float, ...]
    """Ascending. Only MXFP4 has a value twice: its codes keep zero and minus zero apart, its values do not."""
    group: int
    """Weights that share one scale and one offset; they lie side by side."""
    fields: Callable[[Tensor], Tensor]
    """blocks uint8 [n, bytes] -> float32 [n, k]: the block's float16 numbers (d; d, m; d, dmin)."""
    scales: Callable[[Tensor, Tensor], tuple[Tensor, Tensor | None]]
    """blocks, fields -> scale and offset, each float32 [n, block / group], differentiable in fields."""
    codes: Callable[[Tensor], Tensor]
    """blocks -> uint8 [n, block]: for each weight the index of its level."""
    pack: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    """blocks, codes, fields or None -> uint8 [n, bytes]: the same blocks with other codes and fields.

    Fields are rounded to the nearest float16; beyond 65504 that is infinity, and it is the caller's to prevent.
    """


@dataclass(frozen=True, kw_only=True)
class Format:
    """One type of ggml: how its blocks become weights."""

    name: str
    """As in gguf.GGMLQuantizationType."""
    block: int
    """Weights in a block."""
    bytes: int
    """Bytes of a block."""
    dequantize: Callable[[Tensor], Tensor]
    """blocks uint8 [n, bytes] -> float32 [n, block], the same bits as ggml's and gguf-py's."""
    rounding: Rounding | None = None
    """None for 16 and 32-bit floats, and for types whose codes are not free of each other."""


@dataclass(frozen=True, kw_only=True)
class Plane:
    """Where some bits of every code lie in a block.

    The bytes come in runs of `run`. The lowest `bits` of a run's bytes belong to its first `run` weights, the next
    `bits` to the `run` weights after those, and so on.
    """

    start: int
    bits: int
    run: int

    def read(self, blocks: Tensor, weights: int) -> Tensor:
        """blocks [n, bytes] -> uint8 [n, weights], values below 2 ** bits."""
        parts, size = 8 // self.bits, weights * self.bits // 8
        runs = blocks[:, self.start : self.start + size].reshape(-1, size // self.run, 1, self.run)
        values: Tensor = (runs >> _shifts(self.bits, blocks)) & (2**self.bits - 1)
        return values.reshape(-1, parts * size)

    def write(self, blocks: Tensor, values: Tensor) -> None:
        """Into these blocks: uint8 [n, weights], of which the lowest bits count."""
        parts, size = 8 // self.bits, values.shape[1] * self.bits // 8
        runs = (values & (2**self.bits - 1)).reshape(-1, size // self.run, parts, self.run)
        merged = (runs << _shifts(self.bits, blocks)).sum(2, dtype=blocks.dtype)
        blocks[:, self.start : self.start + size] = merged.reshape(-1, size)


def on_grid(
    name: str,
    *,
    block: int,
    bytes: int,
    levels: Sequence[float],
    group: int,
    planes: Sequence[Plane],
    halves: Sequence[int],
    scales: Scales,
    recode: tuple[Recode, Recode] | None = None,
) -> Format:
    """A format whose codes lie in `planes` (lowest bits first) and whose float16 fields start at the bytes `halves`.

    `recode`: from the bits of the planes to an index into the levels, and back, where they differ.
    """
    levels = tuple(float(level) for level in levels)

    def fields(blocks: Tensor) -> Tensor:
        return float16(blocks, halves)

    def codes(blocks: Tensor) -> Tensor:
        code, shift = planes[0].read(blocks, block), planes[0].bits
        for plane in planes[1:]:
            code, shift = code | (plane.read(blocks, block) << shift), shift + plane.bits
        return recode[0](code) if recode else code

    def dequantize(blocks: Tensor) -> Tensor:
        return weights(levels_at(codes(blocks), levels), *scales(blocks, fields(blocks)))

    def pack(blocks: Tensor, codes: Tensor, fields: Tensor | None) -> Tensor:
        packed, shift = blocks.clone(), 0
        codes = recode[1](codes) if recode else codes
        for plane in planes:
            plane.write(packed, codes >> shift)
            shift += plane.bits
        if fields is not None:
            write_float16(packed, halves, fields)
        return packed

    rounding = Rounding(levels=levels, group=group, fields=fields, scales=scales, codes=codes, pack=pack)
    return Format(name=name, block=block, bytes=bytes, dequantize=dequantize, rounding=rounding)


def weights(levels: Tensor, scale: Tensor, offset: Tensor | None) -> Tensor:
    """float32 [n, block] = scale * level + offset, from levels [n, block] and one scale and offset a group."""
    groups = scale.shape[1]
    grouped = levels.reshape(-1, groups, levels.shape[1] // groups) * scale.unsqueeze(-1)
    if offset is not None:
        grouped = grouped + offset.unsqueeze(-1)
    return grouped.reshape(levels.shape)


def levels_at(codes: Tensor, levels: tuple[float, ...]) -> Tensor:
    """float32 [n, block]: the levels of these codes."""
    if all(level == levels[0] + i for i, level in enumerate(levels)):
        return (
            codes.float() + levels[0]
        )  # no look-up where the levels are steps of one; 0 + 0 and 8 - 8 are +0
    return constant(levels, codes.device)[codes.long()]


def float16(blocks: Tensor, starts: Sequence[int]) -> Tensor:
    """float32 [n, k]: the little-endian float16 numbers that start at these bytes."""
    import torch

    if not starts:
        return blocks.new_empty((blocks.shape[0], 0), dtype=torch.float32)
    return as_float16(torch.stack([word(blocks, start) for start in starts], 1))


def as_float16(words: Tensor) -> Tensor:
    """float32: the float16 numbers whose bits are these int32."""
    import torch

    return words.to(torch.int16).view(torch.float16).float()


def write_float16(blocks: Tensor, starts: Sequence[int], values: Tensor) -> None:
    """Into these blocks: float [n, k], rounded to the nearest float16, ties to even."""
    import torch

    for i, start in enumerate(starts):
        half = values[:, i : i + 1].detach().to(torch.float16).view(torch.int16)
        blocks[:, start : start + 1] = half & 255
        blocks[:, start + 1 : start + 2] = (half >> 8) & 255


def word(blocks: Tensor, start: int) -> Tensor:
    """int32 [n]: the little-endian 16-bit number that starts at this byte.

    Not a view as int16: a view needs an even address, and a tensor's rows in a file need not have one.
    """
    return blocks[:, start].int() | (blocks[:, start + 1].int() << 8)


def constant(values: tuple[float, ...], device: torch.device) -> Tensor:
    """float32 [k] on the device, copied there once."""
    import torch

    if torch.compiler.is_compiling():  # becomes part of the graph
        return torch.tensor(values, device=device)
    if (table := _constants.get((values, device))) is None:
        table = _constants[values, device] = torch.tensor(values, device=device)
    return table


_constants: dict[tuple[tuple[float, ...], torch.device], Tensor] = {}


def _shifts(bits: int, blocks: Tensor) -> Tensor:
    import torch

    # not tensor([0, 4]): that one would be copied to the device on every call
    return torch.arange(0, 8, bits, dtype=torch.uint8, device=blocks.device).unsqueeze(-1)
