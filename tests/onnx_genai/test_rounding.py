"""Codes of blocks: what they mean, and that looking for scales and weighing errors makes them smaller."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from edgeft.onnx import rounding

BLOCKS = torch.randn(256, 32, generator=torch.Generator().manual_seed(0)) * 0.1
USE = torch.rand(256, 32, generator=torch.Generator().manual_seed(1)) ** 4


def error(importance=USE, blocks=BLOCKS, weighed=USE, **given):
    usual = {"bits": 4, "symmetric": False, "half": False, "search": True}
    codes, scales, zeros = rounding.best(blocks, importance, **{**usual, **given})
    top = 15 if given.get("bits", 4) == 4 else 255
    assert codes.dtype == torch.uint8 and int(codes.max()) <= top and int(zeros.max()) <= top
    again = scales[:, None] * (codes.float() - zeros[:, None].float())
    return float((weighed * (again - blocks) ** 2).sum())


def test_weighing_and_searching_each_make_the_weighed_error_smaller():
    plain = error(search=False)
    searched = error(torch.ones_like(USE))
    weighed = error()
    assert weighed < 0.85 * searched and searched < plain


def test_zero_points_and_bits_each_make_the_error_smaller():
    lopsided = BLOCKS + 0.15
    assert error(blocks=lopsided) < 0.7 * error(blocks=lopsided, symmetric=True)
    assert error(bits=8) < 0.01 * error()


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("half", [False, True])
def test_blocks_without_any_spread_are_exact_and_finite(symmetric, half):
    constant = torch.tensor([0.0, 0.5, -0.25, 1e-9])[:, None].repeat(1, 16)
    codes, scales, zeros = rounding.best(
        constant, torch.zeros_like(constant), bits=4, symmetric=symmetric, half=half
    )
    again = scales[:, None] * (codes.float() - zeros[:, None].float())
    assert torch.isfinite(scales).all() and (scales != 0).all()
    assert torch.allclose(again, constant, rtol=1e-3, atol=1e-8 if not half else 1e-6)


def test_scales_for_a_16_bit_graph_are_16_bit_numbers():
    scales = rounding.best(BLOCKS, USE, bits=4, symmetric=False, half=True)[1]
    assert torch.equal(scales, scales.half().float())


def test_the_largest_weight_of_a_symmetric_block_is_reached_on_either_side():
    block = torch.linspace(-0.3, 1.0, 32)[None]
    for one in (block, -block):
        codes, scales, zeros = rounding.best(
            one, torch.ones_like(one), bits=4, symmetric=True, half=False, search=False
        )
        again = scales[:, None] * (codes.float() - zeros[:, None].float())
        assert (
            zeros.tolist() == [8] and float((again - one).abs().max()) <= float(scales.abs().max()) / 2 + 1e-6
        )
