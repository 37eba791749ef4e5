"""Four- and eight-bit codes for blocks of weights, chosen by what each rounding error costs.

ONNX Runtime's own quantizers (onnxruntime/quantization/neural_compressor/weight_only.py) look for a scale and a real
offset and round the offset to a whole zero point afterwards. Here scale and whole zero point are looked for together,
and an error counts as much as the input that it is multiplied with (the importance matrix).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_SHRINK = (1.04, 1.0, 0.96, 0.92, 0.88, 0.84, 0.8, 0.76, 0.72, 0.68)
"""Scales that are tried, in units of the one that reaches the outermost weights of the block."""
_AROUND = (-1, 0, 1)
"""Zero points that are tried with each, beside the one that cuts as much off below as above."""
_HELD = 1 << 17
"""Numbers looked at together: they stay in the processor's cache, which is fourteen times as fast as not."""


def best(
    blocks: torch.Tensor,
    importance: torch.Tensor,
    *,
    bits: int,
    symmetric: bool,
    half: bool,
    search: bool = True,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The codes uint8 [n, block], the scales float32 [n] and the zero points uint8 [n] of `blocks` float32 [n, block].

    weight = scale * (code - zero point), MatMulNBits (onnxruntime/docs/ContribOperators.md). `importance`, [n, block] and
    not negative, weighs the squared errors; a block without any importance is rounded with all weights alike.
    `symmetric`: the zero point is the middle code. `half`: scales are numbers that float16 holds. Without `search`, the
    scale is the one that reaches the outermost weights: rounding to nearest, and nothing else.
    """
    import torch

    step = max(1, _HELD // blocks.shape[1])
    parts = [
        _best(
            blocks[i : i + step],
            importance[i : i + step],
            bits=bits,
            symmetric=symmetric,
            half=half,
            search=search,
        )
        for i in range(0, len(blocks), step)
    ]
    codes, scales, zeros = (torch.cat(found) for found in zip(*parts, strict=True))
    return codes, scales, zeros


def _best(
    x: torch.Tensor, weight: torch.Tensor, *, bits: int, symmetric: bool, half: bool, search: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    import torch

    top, middle = (1 << bits) - 1, 1 << (bits - 1)
    total = weight.sum(1, keepdim=True)
    weight = torch.where(total > 0, weight / total.clamp_min(1e-30), torch.full_like(weight, 1 / x.shape[1]))
    low, high = x.amin(1, keepdim=True).clamp_max(0), x.amax(1, keepdim=True).clamp_min(0)
    # Symmetric codes reach one step further below than above: the sign of the scale puts that step on the larger side.
    reach = torch.where(-low >= high, -low, -high)
    full = reach / middle if symmetric else (high - low) / top
    full = torch.where(full == 0, torch.ones_like(full), full)
    error = torch.full_like(full, torch.inf)
    scale = _in_half(full) if half else full.clone()
    zero = torch.full_like(full, float(middle)) if symmetric else (-low / scale).round().clamp(0, top)
    for shrink in _SHRINK if search else ():
        tried = full * shrink
        if symmetric:
            wanted = [torch.full_like(full, float(middle))]
        else:
            centre = (top / 2 - (low + high) / (2 * tried)).round()
            wanted = [(centre + around).clamp(0, top) for around in _AROUND]
        for z in wanted:
            s, cost = _refined(x, weight, tried, z, top, half=half)
            nearer = cost < error
            error, scale, zero = (
                torch.where(nearer, cost, error), torch.where(nearer, s, scale), torch.where(nearer, z, zero),
            )  # fmt: skip
    codes = (x / scale + zero).round().clamp(0, top)
    return codes.to(torch.uint8), scale[:, 0], zero[:, 0].to(torch.uint8)


def _refined(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, top: int, *, half: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The scale that fits the codes of `scale` best, and what the codes of that one cost."""
    import torch

    level = (x / scale + zero).round().clamp(0, top) - zero
    fitted = (weight * x * level).sum(1, keepdim=True) / (weight * level * level).sum(1, keepdim=True)
    fitted = torch.where(torch.isfinite(fitted) & (fitted != 0), fitted, scale)
    if half:
        fitted = _in_half(fitted)
    level = (x / fitted + zero).round().clamp(0, top) - zero
    return fitted, (weight * (fitted * level - x) ** 2).sum(1, keepdim=True)


def _in_half(scale: torch.Tensor) -> torch.Tensor:
    """The nearest number that float16 holds and that is not zero."""
    import torch

    least = 2.0**-24
    near = scale.to(torch.float16).to(torch.float32)
    return torch.where(near == 0, torch.copysign(torch.full_like(near, least), scale), near)
