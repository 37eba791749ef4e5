"""A checkpoint as a GenAI folder: computed as its packed weights say, the same twice, offline, and refused with reasons."""

from __future__ import annotations

import socket
from pathlib import Path

import numpy as np
import pytest

from edgeft.errors import RecipeError, StageError
from edgeft.onnx import build as building
from edgeft.onnx.session import Session
from edgeft.stage import digest
from tests.onnx_genai.conftest import checkpoint, settings

pytest.importorskip(
    "onnxruntime_genai", reason="ONNX Runtime GenAI is not installed: pip install 'edgeft[onnx]'"
)


IDS = [1, *np.random.default_rng(0).integers(3, 300, 60).tolist(), 2]
FAMILIES = {
    "tied": ("Llama", {"tie_word_embeddings": True}),
    "untied": ("Llama", {"tie_word_embeddings": False}),
    "biases": ("Llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False}),
    "biases of qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "norms of qwen3": ("Qwen3", {"tie_word_embeddings": True}),
    "norms of gemma": ("Gemma", {}),
    "fused, phi3": ("Phi3", {"original_max_position_embeddings": 512}),
    "SmolLM2's widths": ("Llama", {"hidden_size": 576, "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64}),
    "Gemma 3's width": ("Llama", {"hidden_size": 640, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 64}),
    "no block divides": ("Llama", {"hidden_size": 72, "intermediate_size": 131, "tie_word_embeddings": True}),
    "no block divides, untied": ("Llama", {"hidden_size": 68, "intermediate_size": 136, "tie_word_embeddings": False}),
}  # fmt: skip


def dequantized(folder: Path, checkpoint_folder: Path):
    """The checkpoint's model in float32, with the weights that stand in the folder."""
    import torch
    from transformers import AutoModelForCausalLM

    from edgeft.parity.checks import packed_onnx, tensors

    model = AutoModelForCausalLM.from_pretrained(checkpoint_folder, dtype=torch.float32)
    held = dict(model.named_parameters())
    found = 0
    with torch.no_grad():
        for layer in packed_onnx.layers(folder, tensors.in_checkpoint(checkpoint_folder)):
            weight = torch.from_numpy(np.array(layer.weight))
            place = held[layer.name][layer.first or 0 :][: len(weight)]
            place.copy_(weight)
            found += 1
    return model, found


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("block", [32, 64])
def test_the_folder_computes_what_its_packed_weights_say(family, block, tmp_path):
    import torch

    name, sizes = FAMILIES[family]
    made = checkpoint(tmp_path / "hf", name, **sizes)
    building.build(made, tmp_path / "onnx", settings(block=block))
    model, found = dequantized(tmp_path / "onnx", made)
    assert found >= 2 * 4 + 1
    with torch.no_grad():
        wanted = model(torch.tensor([IDS])).logits[0].numpy()
    with Session(tmp_path / "onnx") as session:
        got = session.logits(IDS)
    assert np.abs(got - wanted).max() < 2e-3 * np.abs(wanted).max()


@pytest.mark.slow
def test_the_same_checkpoint_gives_the_same_bytes_without_asking_the_network(
    tiny, built, tmp_path, monkeypatch
):
    asked = []

    def refuse(self, address):
        asked.append(address)
        raise OSError("no network here")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    building.build(tiny, tmp_path / "model", settings())
    assert asked == []
    assert digest(tmp_path / "model") == digest(built)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model"]


@pytest.mark.slow
@pytest.mark.parametrize("provider", ["cuda", "dml"])
def test_a_folder_for_a_gpu_is_computed_here_by_the_cpu_from_the_same_weights(provider, tiny, tmp_path):
    import torch

    building.build(tiny, tmp_path / "model", settings(provider=provider, accuracy=0))
    model, _ = dequantized(tmp_path / "model", tiny)
    with torch.no_grad():
        wanted = model(torch.tensor([IDS])).logits[0].numpy()
    with Session(tmp_path / "model", device="cpu") as session:
        assert session.said.endswith(f"CPU (the folder is made for {provider})")
        got = session.logits(IDS)
    assert got.dtype == np.float32
    assert np.abs(got - wanted).max() < 2e-2 * np.abs(wanted).max()  # the graph's numbers have 16 bits


def test_generation_settings_are_the_checkpoints_own(tiny, tmp_path):
    found = building.settled(tiny)
    assert found["model"] == {"eos_token_id": [2, 0], "pad_token_id": 2, "bos_token_id": 1}
    assert found["search"] == {"repetition_penalty": 1.2, "temperature": 0.7, "top_k": 20, "do_sample": True}


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "model builder does not know GPT2LMHeadModel"),
        ({"model_type": "mamba"}, "does not know mamba"),
        ({"architectures": ["Qwen3ForCausalLM"], "num_experts": 8}, "has 8 experts"),
        ({"hidden_size": 96}, "heads are 24 wide, and ONNX Runtime's attention takes multiples of 16"),
        (
            {"architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text"},
            "kinds of layers rotate differently",
        ),
    ],
)
def test_a_model_that_cannot_be_built_is_refused_with_a_reason(config, reason):
    usual = {"architectures": ["LlamaForCausalLM"], "num_attention_heads": 4, "hidden_size": 64}
    with pytest.raises(RecipeError, match=reason):
        building.refuse(
            {**usual, **config} if "architectures" in config or "hidden_size" in config else config
        )


@pytest.mark.slow
def test_what_the_builder_stumbles_over_is_said_and_nothing_is_left(tiny, tmp_path):
    import shutil

    broken = tmp_path / "hf"
    shutil.copytree(tiny, broken)
    (broken / "model.safetensors").unlink()
    with pytest.raises(StageError, match="model builder cannot make llama: OSError"):
        building.build(broken, tmp_path / "model", settings())
    assert not (tmp_path / "model.aside").exists()


def test_a_checkpoint_without_tokenizer_json_is_refused(tmp_path):
    from edgeft.onnx import tokenizer

    with pytest.raises(StageError, match=r"no tokenizer\.json"):
        tokenizer.write(tmp_path, tmp_path, context=512)


def test_a_recipe_says_what_is_built_in_its_name():
    from edgeft.stages.quantize_onnx import STAGE, QuantizeOnnx

    assert QuantizeOnnx().label() == "onnx-int4-cpu"
    assert QuantizeOnnx(provider="cuda", block_size=64, head="int4").label() == "onnx-int4-cuda-g64-head-int4"
    assert (QuantizeOnnx().accuracy, QuantizeOnnx(provider="cuda").accuracy) == (4, 0)
    assert STAGE.replaces == ("quantize/served",) and STAGE.tools[0].pin.startswith("0.18")
