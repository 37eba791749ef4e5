from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from edgeft.awq import folding, stream
from tests.awq import models

pytestmark = pytest.mark.slow

BY_NORMS = {
    "llama": 4, "biases": 4, "qwen2": 4, "qwen3": 4, "gemma": 4, "gemma2": 4, "gemma3": 4, "phi3": 4, "stablelm": 4,
    "olmo2": 2, "gpt_neox": 2,
}  # fmt: skip
"""Pairs in one block: two norms, values to attention's output, the linear half to the last layer. Olmo 2 has its norms behind
the layers, so only the two pairs of layers remain; GPT-NeoX only its norms, since what stands between its layers is not linear."""


@pytest.fixture(params=BY_NORMS)
def opened(request, tmp_path):
    models.model(request.param).save_pretrained(tmp_path)
    return request.param, stream.Checkpoint(tmp_path)


@torch.inference_mode()
def test_pairs_are_found_in_every_family_and_scaling_through_all_of_them_changes_no_logit(opened):
    family, found = opened
    hidden, beside = found.inputs(models.windows(2), "cpu")
    plain, scaled = hidden[0], hidden[0]
    for number in range(len(found.blocks)):
        _, block = found.block(number, "cpu")
        plain = stream.run(block, plain, beside[number])
        pairs = folding.pairs(block, hidden[0], beside[number])
        assert len(pairs) == BY_NORMS[family]
        assert all(p.plus_one == family.startswith("gemma") for p in pairs if p.rows is None)
        for pair in pairs:
            n = folding.width(block, pair)
            wanted = torch.exp(torch.randn(n, generator=torch.Generator().manual_seed(n)))
            folding.apply(block, pair, wanted, torch.float16)
        scaled = stream.run(block, scaled, beside[number])
    a, b = found.head(plain, "cpu"), found.head(scaled, "cpu")
    assert float((a - b).abs().max() / a.std()) < 1e-4
    whole = AutoModelForCausalLM.from_pretrained(found.folder, dtype=torch.float32)
    assert torch.allclose(a, whole(torch.tensor(models.windows(2)[:1])).logits, rtol=1e-3, atol=1e-4)


@torch.inference_mode()
def test_a_norm_that_something_else_reads_too_is_left_alone(tmp_path):
    models.model("llama").save_pretrained(tmp_path)
    found = stream.Checkpoint(tmp_path)
    hidden, beside = found.inputs(models.windows(2), "cpu")
    _, block = found.block(0, "cpu")
    whole = block.mlp.forward
    block.mlp.forward = lambda x: whole(x) + x  # a second way past the layers
    pairs = folding.pairs(block, hidden[0], beside[0])
    assert [p.maker for p in pairs] == ["input_layernorm", "self_attn.v_proj", "mlp.up_proj"]


@torch.inference_mode()
def test_rounding_a_scaled_norm_to_16_bits_changes_nothing(tmp_path):
    models.model("gemma").save_pretrained(tmp_path)
    found = stream.Checkpoint(tmp_path)
    hidden, beside = found.inputs(models.windows(2), "cpu")
    _, block = found.block(0, "cpu")
    before = stream.run(block, hidden[0], beside[0])
    pair = folding.pairs(block, hidden[0], beside[0])[0]
    folding.apply(block, pair, torch.full((64,), 1 / 3), torch.float16)
    norm = block.get_submodule(pair.maker).weight.data
    assert torch.equal(norm, norm.half().float())
    assert float((stream.run(block, hidden[0], beside[0]) - before).abs().max() / before.std()) < 1e-4
