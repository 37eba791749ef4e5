"""A weight to 4-bit codes: to the nearest level, with clipped ranges, or with each error made good by what comes after.

All errors are weighed by the inputs: for a layer y = W x the squared error over the calibration text is tr(D H D^T), with
D the change of the weight and H = sum of x x^T (GPTQ, arXiv 2210.17323; AWQ, arXiv 2306.00978, weighs the same error).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgeft.awq.layouts import BITS, Codes
from edgeft.errors import StageError

if TYPE_CHECKING:
    import torch

LEVELS = (1 << BITS) - 1
CLIPS = tuple(1 - step / 20 for step in range(11))
"""Shares of a group's range that are tried: 1, 0.95 ... 0.5."""
DAMPING = (0.01, 0.1, 1.0)
"""Shares of H's mean diagonal that are added to it until it can be inverted: fewer tokens than columns leave it singular."""


def nearest(weight: torch.Tensor, group: int, dtype: torch.dtype) -> Codes:
    """Each weight [out, in] to the nearest of its group's 16 levels, which reach from its smallest to its largest number."""
    import torch

    parts = weight.reshape(len(weight), -1, group)
    scales, zeros = _levels(parts.amin(-1), parts.amax(-1), dtype)
    codes = _codes(parts, scales.float()[..., None], zeros[..., None])
    return Codes(codes=codes.flatten(1).to(torch.uint8), zeros=zeros.to(torch.uint8), scales=scales)


def error(change: torch.Tensor, seen: torch.Tensor) -> float:
    """tr(D H D^T) of a change D [out, in] of the weight, H [in, in]."""
    return float(((change @ seen) * change).sum())


def _levels(low: torch.Tensor, high: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales in `dtype` and whole zero points (float) of ranges; zero itself is always a level."""
    import torch

    low, high = low.clamp(max=0), high.clamp(min=0)
    tiny = torch.finfo(dtype).smallest_normal / 64  # a group of zeros has some scale, too
    scales = ((high - low) / LEVELS).clamp(min=tiny).to(dtype)
    zeros = (-low / scales.float()).round().clamp(0, LEVELS)
    return scales, zeros


def _codes(values: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor) -> torch.Tensor:
    return (values / scales + zeros).round().clamp_(0, LEVELS)


def clipped(parts: torch.Tensor, seen: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales and zero points for groups [out, groups, group] whose range is cut where that lowers the error.

    `seen` [groups, group, group] are the diagonal blocks of H.
    """
    import torch

    low, high = parts.amin(-1), parts.amax(-1)
    best: torch.Tensor | None = None
    for clip in CLIPS:
        scales, zeros = _levels(low * clip, high * clip, dtype)
        real = scales.float()[..., None]
        change = (_codes(parts, real, zeros[..., None]) - zeros[..., None]) * real - parts
        found = (torch.einsum("ngi,gij->ngj", change, seen) * change).sum(-1)
        if best is None:
            best, kept, base = found, scales, zeros
            continue
        better = found < best
        best = torch.where(better, found, best)
        kept, base = torch.where(better, scales, kept), torch.where(better, zeros, base)
    return kept, base


def blocks(seen: torch.Tensor, group: int) -> torch.Tensor:
    """The diagonal blocks [groups, group, group] of H [in, in]."""
    import torch

    n = seen.shape[0] // group
    return torch.stack([seen[i * group : (i + 1) * group, i * group : (i + 1) * group] for i in range(n)])


def with_clipping(weight: torch.Tensor, seen: torch.Tensor, group: int, dtype: torch.dtype) -> Codes:
    """As `nearest`, with ranges as `clipped` finds them."""
    import torch

    parts = weight.reshape(len(weight), -1, group)
    scales, zeros = clipped(parts, blocks(seen, group), dtype)
    codes = _codes(parts, scales.float()[..., None], zeros[..., None])
    return Codes(codes=codes.flatten(1).to(torch.uint8), zeros=zeros.to(torch.uint8), scales=scales)


def compensated(weight: torch.Tensor, seen: torch.Tensor, group: int, dtype: torch.dtype) -> Codes:
    """As `with_clipping`, column by column, each column's error made good by the columns after it (GPTQ, algorithm 1).

    A group's range is chosen when its turn comes, from the weights as the columns before have changed them.
    """
    import torch

    work = weight.clone()
    rows, columns = work.shape
    inverse = _factor(seen)
    around = blocks(seen, group)
    codes = torch.empty(rows, columns, dtype=torch.uint8, device=work.device)
    scales = torch.empty(rows, columns // group, dtype=dtype, device=work.device)
    zeros = torch.empty(rows, columns // group, dtype=torch.uint8, device=work.device)
    for number in range(columns // group):
        first, last = number * group, (number + 1) * group
        part = work[:, first:last]
        scale, zero = (x[:, 0] for x in clipped(part[:, None], around[number : number + 1], dtype))
        scales[:, number], zeros[:, number] = scale, zero.to(torch.uint8)
        real = scale.float()
        lost = torch.empty_like(part)
        for i in range(group):
            column = part[:, i]
            code = _codes(column, real, zero)
            codes[:, first + i] = code.to(torch.uint8)
            step = inverse[first + i, first:last]
            lost[:, i] = (column - (code - zero) * real) / step[i]
            part[:, i + 1 :] -= lost[:, i, None] * step[None, i + 1 :]
        work[:, last:] -= lost @ inverse[first:last, last:]
    return Codes(codes=codes, zeros=zeros, scales=scales)


def _factor(seen: torch.Tensor) -> torch.Tensor:
    """The upper Cholesky factor of H's inverse. Raises StageError when H is not finite."""
    import torch

    for share in DAMPING:
        damped = seen.clone()
        damped.diagonal()[damped.diagonal() == 0] = 1
        damped.diagonal().add_(share * damped.diagonal().mean())
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed and lower.isfinite().all():
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed and upper.isfinite().all():
                found: torch.Tensor = upper
                return found
    raise StageError(
        "what a layer gets on the calibration text cannot be worked with: it overflows or is not a number",
        hint="does the merged model answer sensibly? see the certificate of a GGUF of it",
    )
