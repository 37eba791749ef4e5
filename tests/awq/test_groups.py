from __future__ import annotations

import pytest

from edgeft.awq import groups
from edgeft.errors import StageError

SMOLLM2 = {
    "model.layers.0.self_attn.q_proj": (576, 576), "model.layers.0.self_attn.k_proj": (192, 576),
    "model.layers.0.self_attn.v_proj": (192, 576), "model.layers.0.self_attn.o_proj": (576, 576),
    "model.layers.0.mlp.gate_proj": (1536, 576), "model.layers.0.mlp.up_proj": (1536, 576),
    "model.layers.0.mlp.down_proj": (576, 1536),
}  # fmt: skip
QWEN = {"model.layers.0.self_attn.o_proj": (896, 896), "model.layers.0.mlp.down_proj": (896, 4864)}


@pytest.mark.parametrize(("shapes", "group"), [(SMOLLM2, 64), (QWEN, 128), ({"a": (8, 96)}, 32)])
def test_auto_is_the_largest_group_that_divides_every_width(shapes, group):
    assert groups.choose(shapes) == group


def test_a_width_that_the_wanted_group_does_not_divide_is_named_with_what_would():
    with pytest.raises(StageError, match=r"q_proj have 576 numbers, which groups of 128") as error:
        groups.choose(SMOLLM2, 128)
    assert "group = 64" in error.value.hint


def test_a_width_that_no_group_divides_is_refused_by_name():
    with pytest.raises(
        StageError, match=r"down_proj have 1000 numbers, which groups of 32 do not divide"
    ) as error:
        groups.choose({"mlp.up_proj": (1000, 64), "mlp.down_proj": (64, 1000)})
    assert "gguf" in error.value.hint


def test_rows_that_do_not_fill_a_word_are_refused_by_name():
    with pytest.raises(StageError, match="odd has 12 rows"):
        groups.choose({"odd": (12, 64)})


def test_who_loads_smollm2_depends_on_the_layout():
    ok = {
        layout: {x.name: x.ok for x in groups.loaders(layout, SMOLLM2)}
        for layout in ("compressed-tensors", "gemm")
    }
    assert not ok["compressed-tensors"]["SGLang, CUDA"] and ok["gemm"]["SGLang, CUDA"]
    assert all(ok[layout][name] for layout in ok for name in ("vLLM, CUDA", "vLLM, CPU", "transformers"))


def test_widths_that_fill_the_tiles_load_everywhere_in_both():
    shapes = {
        "self_attn.q_proj": (4096, 4096),
        "self_attn.k_proj": (1024, 4096),
        "self_attn.v_proj": (1024, 4096),
    }
    for layout in ("compressed-tensors", "gemm"):
        assert all(x.ok for x in groups.loaders(layout, shapes))
