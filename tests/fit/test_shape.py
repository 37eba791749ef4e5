"""A shape says what transformers and the GGUF file say, and a damaged file is named."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from edgeft.errors import DataError
from edgeft.fit.base_shape import base_shape
from edgeft.fit.shape import from_config, from_gguf, shape_of
from edgeft.llamacpp import header as gguf_header
from tests.fit.models import (
    LLAMA_8B,
    SMOLLM2,
    SMOLLM2_BASE,
    config_file,
    gguf_start,
    smollm2,
    smollm2_file,
    tiny_gguf,
)

SMALL = {"vocab_size": 1000, "hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 6,
         "num_attention_heads": 8, "num_key_value_heads": 2, "max_position_embeddings": 128, "bos_token_id": 1,
         "eos_token_id": 2, "pad_token_id": 0}  # fmt: skip
GPT2 = {
    "vocab_size": 1000,
    "n_embd": 96,
    "n_layer": 6,
    "n_head": 8,
    "n_positions": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
NEOX = {k: v for k, v in SMALL.items() if k != "num_key_value_heads"}
FAMILIES = [
    ("llama", SMALL), ("llama", {**SMALL, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    ("mistral", SMALL), ("qwen2", SMALL), ("qwen3", {**SMALL, "head_dim": 32}), ("gemma", SMALL),
    ("gemma2", {**SMALL, "head_dim": 16}), ("gemma3_text", {**SMALL, "head_dim": 16}), ("gpt2", GPT2),
    ("gpt_neox", NEOX), ("bloom", {"vocab_size": 1000, "hidden_size": 96, "n_layer": 6, "n_head": 8}),
    ("phi3", SMALL), ("smollm3", SMALL), ("granite", SMALL), ("olmo2", SMALL),
    ("mixtral", {**SMALL, "num_local_experts": 4}),
    ("qwen3_moe", {**SMALL, "num_experts": 4, "moe_intermediate_size": 64, "head_dim": 32}),
]  # fmt: skip


@pytest.mark.parametrize(("family", "numbers"), FAMILIES, ids=[f"{f}-{len(n)}" for f, n in FAMILIES])
def test_parameters_are_those_of_the_model_that_transformers_makes(family, numbers):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.for_model(family, **numbers)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    counted = sum(p.numel() for p in model.parameters())
    for written in (config.to_dict(), json.loads(config.to_json_string(use_diff=True))):
        shape = from_config(written)
        assert (shape.parameters, shape.exact) == (counted, True)


def test_smollm2_has_134_5_million_parameters_by_its_config_and_by_its_file():
    assert smollm2().parameters == 134_515_008
    found = smollm2_file()
    assert found.parameters == 134_515_008
    assert (found.layers, found.kv_heads, found.head_dim, found.context_length, found.tied) == (
        30,
        3,
        64,
        8192,
        True,
    )


def test_config_and_gguf_of_one_model_give_the_same_matrices():
    assert sorted(map(str, smollm2().matrices)) == sorted(map(str, smollm2_file().matrices))


def test_published_sizes_of_large_models_are_met():
    assert from_config(LLAMA_8B).parameters == 8_030_261_248


def test_an_unknown_architecture_is_estimated_and_says_so():
    shape = from_config({**SMOLLM2, "model_type": "neverheard"})
    assert not shape.exact
    assert shape.parameters == smollm2().parameters


def test_a_multimodal_config_is_read_through_its_text_part():
    shape = from_config(
        {"model_type": "gemma3", "text_config": {"model_type": "gemma3_text", **SMALL, "head_dim": 16}}
    )
    assert shape.architecture == "gemma3_text"
    assert shape.tied


def test_a_config_without_layers_is_refused_by_name(tmp_path):
    config_file(
        tmp_path, {"model_type": "llama", "hidden_size": 8, "num_attention_heads": 2, "vocab_size": 9}
    )
    with pytest.raises(DataError, match=r"config.json.*'llama' lacks its layers"):
        shape_of(tmp_path)


def test_gemma_3_keeps_a_full_cache_in_every_sixth_layer_only():
    shape = from_config(
        {"model_type": "gemma3_text", **SMALL, "num_hidden_layers": 26, "sliding_window": 512}
    )
    assert (shape.window_layers, shape.sliding_window) == (22, 512)


def test_a_written_gguf_is_read_back(tmp_path):
    shape = from_gguf(tiny_gguf(tmp_path / "tiny.gguf", layers=3))
    assert (shape.layers, shape.hidden, shape.kv_heads, shape.head_dim, shape.vocab) == (3, 64, 2, 16, 64)
    header = gguf_header.read(tmp_path / "tiny.gguf", arrays=("tokenizer.ggml.tokens",))
    assert header.keys["tokenizer.ggml.tokens"][-1] == "<|im_end|>"
    assert header.lengths["tokenizer.ggml.tokens"] == 64
    assert gguf_header.read(tmp_path / "tiny.gguf").lengths["tokenizer.ggml.tokens"] == 64


def test_a_gguf_cut_within_its_header_is_named(tmp_path):
    whole = tiny_gguf(tmp_path / "tiny.gguf").read_bytes()
    for length in (12, 30, 200, 900):
        (tmp_path / "cut.gguf").write_bytes(whole[:length])
        with pytest.raises(DataError, match=r"cut\.gguf is not a complete GGUF file"):
            from_gguf(tmp_path / "cut.gguf")


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"PK\x03\x04not a model", "is not a GGUF file"),
        (gguf_start(1, 0, 0), "version 1"),
        (gguf_start(3, 2**60, 0), "is not a complete GGUF file"),
        (gguf_start(3, 0, 0), "no decoder-only language model"),
    ],
)
def test_what_is_no_model_is_refused(tmp_path, content, sentence):
    (tmp_path / "x.gguf").write_bytes(content)
    with pytest.raises(DataError, match=sentence):
        from_gguf(tmp_path / "x.gguf")


def test_the_base_is_found_in_an_artifact_a_path_and_the_hub_cache(tmp_path, monkeypatch):
    config_file(tmp_path / "artifact" / "model", SMOLLM2)
    config_file(tmp_path / "folder", SMOLLM2)
    config_file(tmp_path / "hub" / "models--org--name" / "snapshots" / ("a" * 40), SMOLLM2)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    hub = SimpleNamespace(repo="org/name", revision="a" * 40)
    for base, artifact in (
        (hub, None),
        (SimpleNamespace(path=tmp_path / "folder"), None),
        (SimpleNamespace(repo="org/unknown", revision="b" * 40), tmp_path / "artifact"),
    ):
        shape = base_shape(base, artifact)
        assert shape is not None
        assert shape.parameters == 134_515_008
    assert base_shape(SimpleNamespace(repo="org/name", revision="b" * 40)) is None


def test_another_version_of_the_package_is_not_taken_for_the_base(tmp_path, monkeypatch):
    smollm2_file()
    tiny_gguf(tmp_path / "x.gguf")
    monkeypatch.setenv("EDGEFT_CACHE", str(tmp_path))
    assert base_shape(SimpleNamespace(**{**vars(SMOLLM2_BASE), "version": "0.1.1"})) is None
    absent = SimpleNamespace(package="no-such-package-here", version="1", file="inside/x.gguf")
    assert base_shape(absent) is None
    kept = tmp_path / "packages" / "no-such-package-here-1" / "inside"
    kept.mkdir(parents=True)
    (tmp_path / "x.gguf").rename(kept / "x.gguf")
    shape = base_shape(absent)
    assert shape is not None
    assert shape.layers == 2
