from __future__ import annotations

import pytest
import torch

from edgeft.awq import rounding
from edgeft.errors import StageError


@pytest.fixture
def layer():
    """A weight with outliers, and inputs of which some matter more and which go together."""
    made = torch.Generator().manual_seed(3)
    weight = torch.randn(48, 128, generator=made) / 10
    weight[5, 7] = 2
    x = torch.randn(512, 128, generator=made) @ torch.randn(128, 128, generator=made)
    x[:, 9] *= 20
    return weight, x.T @ x


def lost(codes, layer):
    weight, seen = layer
    return rounding.error(codes.weight().float() - weight, seen)


def test_nearest_is_within_half_a_step(layer):
    codes = rounding.nearest(layer[0], 32, torch.float16)
    step = codes.scales.float().repeat_interleave(32, 1)
    assert (
        float(((codes.weight().float() - layer[0]).abs() / step).max()) < 0.55
    )  # the scale itself is rounded


def test_clipped_ranges_lose_less_and_compensation_less_again(layer):
    plain, cut, full = (
        lost(way, layer) for way in (
            rounding.nearest(layer[0], 32, torch.float16),
            rounding.with_clipping(layer[0], layer[1], 32, torch.float16),
            rounding.compensated(layer[0], layer[1], 32, torch.float16),
        )
    )  # fmt: skip
    assert full < 0.7 * cut < 0.7 * plain


@pytest.mark.parametrize("value", [0.0, 3.0, -3.0])
def test_a_group_of_one_value_has_a_level_for_it(value):
    weight = torch.full((8, 32), value)
    for way in (
        rounding.nearest(weight, 32, torch.float16),
        rounding.compensated(weight, torch.eye(32), 32, torch.float16),
    ):
        assert torch.allclose(way.weight().float(), weight, rtol=1e-3)


def test_a_column_that_was_never_used_is_no_trouble(layer):
    weight, seen = layer
    seen[4], seen[:, 4] = 0, 0
    assert torch.isfinite(rounding.compensated(weight, seen, 32, torch.float16).weight()).all()


def test_fewer_tokens_than_columns_are_enough(layer):
    x = torch.randn(5, 128, generator=torch.Generator().manual_seed(1)) * 1e3
    assert torch.isfinite(rounding.compensated(layer[0], x.T @ x, 32, torch.float16).weight()).all()


def test_inputs_that_are_not_numbers_are_refused(layer):
    with pytest.raises(StageError, match="calibration text"):
        rounding.compensated(layer[0], layer[1] * float("nan"), 32, torch.float16)
