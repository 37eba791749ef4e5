from __future__ import annotations

import json
import re
import shutil

import numpy as np
import pytest

from edgeft.errors import StageError, ToolError
from edgeft.llamacpp import convert, decode, header, tensor_types


def test_a_quantized_checkpoint_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"quantization_config": {"load_in_4bit": true}}')
    with pytest.raises(StageError, match="is quantized already"):
        convert.to_gguf(tmp_path, tmp_path / "out.gguf", outtype="f16")
    with pytest.raises(StageError, match=r"it has no config\.json"):
        convert.to_gguf(tmp_path / "absent", tmp_path / "out.gguf", outtype="f16")


@pytest.mark.parametrize(
    ("said", "sentence"),
    [
        ("WARNING:hf-to-gguf:** chkhsh:  " + "ab" * 32, "does not know the pre-tokenizer of .* abab"),
        (
            "ERROR:hf-to-gguf:Model FooForCausalLM is not supported",
            "cannot convert the architecture FooForCausalLM",
        ),
        ("KeyError: \"could not find any of: ['n_ctx']\"", r"config.json lacks 'n_ctx'"),
        ("FileNotFoundError: File not found: /x/tokenizer.model", "misses /x/tokenizer.model"),
        ("Traceback\nValueError: something new", "failed on .*: ValueError: something new"),
    ],
)
def test_the_converters_tracebacks_become_sentences(tmp_path, said, sentence):
    assert re.search(sentence, str(convert.explained(said, tmp_path)))


@pytest.mark.slow
def test_a_checkpoint_becomes_a_file_with_the_same_logits_and_the_keys_it_is_given(checkpoint, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = tmp_path / "the model.gguf"
    keys = {"general.license": "apache-2.0", "tokenizer.ggml.add_space_prefix": False}
    convert.to_gguf(checkpoint, out, outtype="f32", model_name="ein Test", metadata=keys)
    found = header.read(out).keys
    assert found["general.name"] == "ein Test"
    assert found["tokenizer.ggml.pre"] == "smollm"
    assert {name: found[name] for name in keys} == keys
    assert set(tensor_types.types_in(out).counts) == {"F32"}
    assert list(tmp_path.iterdir()) == [out]
    text = "The heart pumps blood.\n你好"
    ids = AutoTokenizer.from_pretrained(checkpoint)(text)["input_ids"]
    with decode.Decoder(out, n_ctx=64, threads=1) as decoder:
        assert decoder.tokenize(text, add_special=True, parse_special=True) == ids
        ours = decoder.logits(ids)
    with torch.inference_mode():
        model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
        theirs = model(torch.tensor([ids])).logits[0].numpy()
    assert np.abs(ours - theirs).max() < 1e-3


@pytest.mark.slow
def test_an_unknown_tokenizer_is_named_before_any_training(checkpoint, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(checkpoint, broken)
    path = broken / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["pre_tokenizer"] = {"type": "Whitespace"}
    path.write_text(json.dumps(tokenizer))
    with pytest.raises(ToolError, match=r"does not know the pre-tokenizer .*hash [0-9a-f]{64}") as caught:
        convert.to_gguf(broken, tmp_path / "out.gguf", outtype="f16", vocab_only=True)
    assert "tokenizer files" in caught.value.hint
    assert not (tmp_path / "out.gguf").exists()


@pytest.mark.slow
def test_the_vocabulary_alone_converts_too(checkpoint, tmp_path):
    convert.to_gguf(checkpoint, tmp_path / "vocab.gguf", outtype="f16", vocab_only=True)
    assert header.read(tmp_path / "vocab.gguf").tensors == ()
    with decode.Decoder(tmp_path / "vocab.gguf", vocab_only=True) as decoder:
        assert decoder.n_vocab == 49152
