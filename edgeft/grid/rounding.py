"""Trains weights through the rounding of a GGUF file's own blocks: what a step computes with is what the file will hold.

A layer keeps its 16-bit weights ("latent") and the blocks that a quantizer made of them. Its effective weight is

    w = scale * level[nearest((latent + s B A - offset) / scale)] + offset

with the blocks' scales and offsets, so it lies on the grid of the file at every step. Rounding has no gradient of its own;
the straight-through estimator (Bengio, Leonard and Courville 2013, arXiv:1308.3432) hands it to B A as if there were no
rounding, and not at all where a weight lies beyond the last level. The gradient of scales and offsets is that of LSQ
(Esser et al. 2020, arXiv:1902.08153). The blocks' float16 numbers are rounded to float16 at every step, as the file
holds them.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

from edgeft.grid.formats.block import constant

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from edgeft.grid.formats import Rounding


def through(
    latent: Tensor, a: Tensor, b: Tensor, scaling: float, scale: Tensor, offset: Tensor | None, rounding: Rounding,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """The weight [out, in] that latent + scaling * b a is rounded to, in `dtype`, with gradients for a, b, scale, offset.

    latent [out, in] in any float type, a [rank, in] and b [out, rank] float32; scale and offset float32 [blocks, groups],
    blocks row by row. Nothing of the size of the weight is kept for the way back but the latent itself.
    """
    return _through().apply(latent, a, b, scaling, scale, offset, rounding, dtype)  # type: ignore[no-any-return]


def codes(
    latent: Tensor, a: Tensor, b: Tensor, scaling: float, scale: Tensor, offset: Tensor | None, rounding: Rounding
) -> Tensor:  # fmt: skip
    """The codes of that weight, uint8 [out, in]: what `Rounding.pack` takes. The very computation of `through`."""
    import torch

    with torch.no_grad():
        place = _place(latent, a, b, scaling, scale, offset, rounding)
        inside = place.clamp_(rounding.levels[0], rounding.levels[-1])
        return _index(inside, rounding).to(torch.uint8).reshape(latent.shape)


def half(fields: Tensor) -> Tensor:
    """A block's fields as the file holds them, rounded to float16; the gradient passes through."""
    return fields + (fields.half().float() - fields).detach()


@cache
def _through() -> Any:
    import torch

    class Through(torch.autograd.Function):
        @staticmethod
        def forward(
            ctx: Any, latent: Tensor, a: Tensor, b: Tensor, scaling: float, scale: Tensor, offset: Tensor | None,
            rounding: Rounding, dtype: torch.dtype,
        ) -> Tensor:  # fmt: skip
            ctx.save_for_backward(latent, a, b, scale, offset)
            ctx.scaling, ctx.rounding = scaling, rounding
            place = _place(latent, a, b, scaling, scale, offset, rounding)
            place.clamp_(rounding.levels[0], rounding.levels[-1])
            value = _level(place, rounding).mul_(scale.reshape(-1, 1))
            if offset is not None:
                value.add_(offset.reshape(-1, 1))
            return value.reshape(latent.shape).to(dtype)

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
            latent, a, b, scale, offset = ctx.saved_tensors
            rounding: Rounding = ctx.rounding
            place = _place(latent, a, b, ctx.scaling, scale, offset, rounding)
            inside = (place >= rounding.levels[0]) & (place <= rounding.levels[-1])
            inside &= scale.reshape(-1, 1) != 0  # there no code makes a difference
            grad = grads[0].float().reshape(place.shape)
            into_weight = (grad * inside).reshape(latent.shape)
            into_scale = into_offset = None
            if ctx.needs_input_grad[4]:
                # Within the grid w = place * scale + offset as far as gradients go, so the scale moves only the residue.
                level = _level(place.clamp(rounding.levels[0], rounding.levels[-1]), rounding)
                into_scale = (grad * (level - place * inside)).sum(1).reshape(scale.shape)
            if offset is not None and ctx.needs_input_grad[5]:
                into_offset = (grad * ~inside).sum(1).reshape(offset.shape)
            with torch.autocast(latent.device.type, enabled=False):
                into_a = (b.T @ into_weight).mul_(ctx.scaling)
                into_b = (into_weight @ a.T).mul_(ctx.scaling)
            return None, into_a, into_b, None, into_scale, into_offset, None, None

    return Through


def _place(
    latent: Tensor, a: Tensor, b: Tensor, scaling: float, scale: Tensor, offset: Tensor | None, rounding: Rounding
) -> Tensor:  # fmt: skip
    """Where the unrounded weights lie between the levels, float32 [groups, group].

    A scale of zero puts every level on one point; place 0 then means no more than that.
    """
    import torch

    with torch.autocast(latent.device.type, enabled=False):
        weight = torch.addmm(latent.float(), b, a, alpha=scaling).reshape(-1, rounding.group)
    if offset is not None:
        weight -= offset.reshape(-1, 1)
    scale = scale.reshape(-1, 1)
    return weight.mul_(torch.where(scale == 0, 0.0, 1.0 / scale))


def _level(inside: Tensor, rounding: Rounding) -> Tensor:
    """The level nearest to each place between the first and the last, as float32."""
    import torch

    if _uniform(rounding.levels):
        return torch.round(inside)
    return constant(rounding.levels, inside.device)[_index(inside, rounding)]


def _index(inside: Tensor, rounding: Rounding) -> Tensor:
    """The index of that level."""
    import torch

    if _uniform(rounding.levels):
        return torch.round(inside) - rounding.levels[0]
    levels = constant(rounding.levels, inside.device)
    return torch.bucketize(inside, (levels[1:] + levels[:-1]) / 2)


def _uniform(levels: tuple[float, ...]) -> bool:
    """Whether the levels are whole numbers one apart."""
    return all(level == levels[0] + i for i, level in enumerate(levels)) and levels[0] == int(levels[0])
