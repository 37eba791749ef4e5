from __future__ import annotations

import pytest
import torch

from edgeft.awq import layouts
from edgeft.awq.layouts import Codes
from edgeft.errors import StageError


def some(rows: int = 24, columns: int = 128, group: int = 32, dtype: torch.dtype = torch.float16) -> Codes:
    made = torch.Generator().manual_seed(7)
    groups = columns // group
    return Codes(
        codes=torch.randint(0, 16, (rows, columns), generator=made, dtype=torch.uint8),
        zeros=torch.randint(0, 16, (rows, groups), generator=made, dtype=torch.uint8),
        scales=(torch.rand(rows, groups, generator=made) / 50 + 1e-3).to(dtype),
    )


@pytest.mark.parametrize("name", layouts.LAYOUTS)
def test_what_is_packed_comes_back_to_the_bit(name):
    layout, layer = layouts.of(name), some()
    packed = layout.pack(layer)
    back = layout.unpack(packed)
    assert set(packed) == set(layout.suffixes)
    assert torch.equal(back.codes, layer.codes) and torch.equal(back.zeros, layer.zeros)
    assert torch.equal(back.scales, layer.scales) and torch.equal(back.weight(), layer.weight())


def test_a_weight_is_the_distance_from_its_zero_point_in_steps_of_its_scale():
    layer = some(8, 64, 32)
    for row, column in ((0, 0), (3, 31), (3, 32), (7, 63)):
        group = column // 32
        whole = int(layer.codes[row, column]) - int(layer.zeros[row, group])
        assert layer.weight()[row, column] == whole * layer.scales[row, group]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("group", [32, 64, 128])
def test_compressed_tensors_itself_unpacks_its_layout_to_the_same_bits(dtype, group):
    library = pytest.importorskip(
        "compressed_tensors.compressors", reason="compressed-tensors is not installed"
    )
    from compressed_tensors.quantization import QuantizationConfig

    layer = some(40, 384, group, dtype)
    config = QuantizationConfig.model_validate(layouts.of("compressed-tensors").config(group, ["lm_head"]))
    (scheme,) = config.config_groups.values()
    packed = layouts.of("compressed-tensors").pack(layer)
    theirs = library.PackedQuantizationCompressor.decompress(packed, scheme)["weight"]
    assert theirs.dtype == dtype
    assert torch.equal(theirs.view(torch.int16), layer.weight().view(torch.int16))


def test_gemm_words_hold_eight_rows_of_one_column_in_the_order_of_the_first_kernel():
    layer = some(16, 64)
    packed = layouts.of("gemm").pack(layer)
    assert (
        packed["qweight"].shape == (64, 2)
        and packed["qzeros"].shape == (2, 2)
        and packed["scales"].shape == (2, 16)
    )
    for column, word in ((0, 0), (5, 1), (63, 1)):
        value = int(packed["qweight"][column, word]) & 0xFFFFFFFF
        nibbles = [value >> 4 * i & 15 for i in range(8)]
        rows = [word * 8 + row for row in (0, 2, 4, 6, 1, 3, 5, 7)]
        assert nibbles == [int(layer.codes[row, column]) for row in rows]


@pytest.mark.parametrize("name", layouts.LAYOUTS)
def test_a_folder_says_which_layout_it_has(name):
    assert layouts.of_config({"quantization_config": layouts.of(name).config(64, ["lm_head"])}).name == name


@pytest.mark.parametrize(
    "config",
    [
        {}, {"quant_method": "gptq", "bits": 4}, {"quant_method": "awq", "version": "gemv", "bits": 4},
        {"quant_method": "compressed-tensors", "format": "float-quantized"},
    ],
)  # fmt: skip
def test_any_other_quantization_is_refused(config):
    with pytest.raises(StageError, match="not as 4-bit groups"):
        layouts.of_config({"quantization_config": config})
