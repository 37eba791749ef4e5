"""Training through the rounding of blocks: the nearest points, their codes, and the gradients."""

from __future__ import annotations

import pytest
import torch

from edgeft.grid import formats
from edgeft.grid.rounding import codes, half, through

ROUNDING = [name for name, format in formats.FORMATS.items() if format.rounding is not None]


def blocks_of(name: str, count: int, seed: int = 0) -> torch.Tensor:
    """Random blocks whose float16 fields are of the size that weights have."""
    format = formats.of(name)
    blocks = torch.randint(
        0, 256, (count, format.bytes), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8
    )
    fields = format.rounding.fields(blocks)
    if name == "MXFP4":
        blocks[:, 0] = 120
    tame = torch.rand(fields.shape, generator=torch.Generator().manual_seed(seed)) * 0.01 + 0.001
    return format.rounding.pack(blocks, format.rounding.codes(blocks), tame)


@pytest.fixture(params=ROUNDING)
def case(request):
    """A layer [8, block]: latent weights near its blocks, an adapter of rank 2, scales and offsets."""
    format = formats.of(request.param)
    blocks = blocks_of(request.param, 8)
    rng = torch.Generator().manual_seed(1)
    values = format.dequantize(blocks)
    latent = values + values.std() * 0.3 * torch.randn(values.shape, generator=rng)
    a, b = torch.randn(2, format.block, generator=rng), torch.randn(8, 2, generator=rng) * values.std() * 0.1
    return format, blocks, latent, a, b


def rounded(format, blocks, latent, a, b, fields=None):
    scale, offset = format.rounding.scales(
        blocks, format.rounding.fields(blocks) if fields is None else fields
    )
    return through(latent, a, b, 0.5, scale, offset, format.rounding, torch.float32)


def test_a_rounded_weight_is_the_point_of_its_grid_that_lies_nearest(case):
    format, blocks, latent, a, b = case
    scale, offset = format.rounding.scales(blocks, format.rounding.fields(blocks))
    points = torch.tensor(format.rounding.levels) * scale.repeat_interleave(
        format.rounding.group, 1
    ).unsqueeze(-1)
    if offset is not None:
        points = points + offset.repeat_interleave(format.rounding.group, 1).unsqueeze(-1)
    wanted = latent + 0.5 * b @ a
    nearest = (points - wanted.unsqueeze(-1)).abs().min(-1).values
    got = (rounded(format, blocks, latent, a, b) - wanted).abs()
    torch.testing.assert_close(got, nearest, rtol=1e-4, atol=1e-6)


def test_packed_codes_stand_for_the_rounded_weights_bit_for_bit(case):
    format, blocks, latent, a, b = case
    fields = half(format.rounding.fields(blocks) * 1.1)
    scale, offset = format.rounding.scales(blocks, fields)
    found = codes(latent, a, b, 0.5, scale, offset, format.rounding)
    packed = format.rounding.pack(blocks, found, fields if fields.numel() else None)
    assert torch.equal(format.dequantize(packed), rounded(format, blocks, latent, a, b, fields))


def test_weights_that_lie_on_the_grid_stay_where_they_are(case):
    format, blocks, _, a, b = case
    values = format.dequantize(blocks)
    got = rounded(format, blocks, values, torch.zeros_like(a), torch.zeros_like(b))
    torch.testing.assert_close(got, values, rtol=1e-6, atol=0)


def test_gradients_are_those_of_a_straight_through_estimator(case):
    format, blocks, latent, a, b = case
    latent[:, 0] += 100 * latent.std()  # beyond the last level: no gradient there
    fields = format.rounding.fields(blocks)
    upstream = torch.randn(latent.shape, generator=torch.Generator().manual_seed(2))

    def gradients(compute):
        leaves = [x.clone().requires_grad_() for x in (a, b, fields)]
        given = torch.autograd.grad(compute(*leaves), leaves, upstream, allow_unused=True)
        return [g if g is not None else torch.zeros(0) for g in given]

    def composed(a, b, fields):
        scale, offset = format.rounding.scales(blocks, fields)
        scale = scale.repeat_interleave(format.rounding.group, 1)
        offset = 0 if offset is None else offset.repeat_interleave(format.rounding.group, 1)
        safe = torch.where(scale == 0, 1.0, scale)
        place = torch.where(scale == 0, 0.0, (latent + 0.5 * b @ a - offset) / safe)
        inside = place.clamp(format.rounding.levels[0], format.rounding.levels[-1])
        levels = torch.tensor(format.rounding.levels)
        nearest = levels[torch.bucketize(inside.detach(), (levels[1:] + levels[:-1]) / 2)]
        return (inside + (nearest - inside).detach()) * scale + offset

    got = gradients(lambda a, b, fields: rounded(format, blocks, latent, a, b, fields))
    for one, other in zip(got, gradients(composed), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)
