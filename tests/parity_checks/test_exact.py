"""A converted file against its checkpoint; each fault is planted in a copy of the checkpoint."""

from __future__ import annotations

import json

import pytest

pytestmark = pytest.mark.slow


def problems(checkpoint, gguf):
    from edgeft.parity.checks import exact

    return "; ".join(exact.compare(checkpoint, gguf).problems)


def test_a_faithful_conversion_has_no_problem_and_says_what_was_looked_at(tiny_checkpoint, tiny_gguf):
    from edgeft.parity.checks import exact

    found = exact.compare(tiny_checkpoint, tiny_gguf, ["A text of the caller's own."])
    assert found.problems == () and found.kld < 1e-6 and found.same_top > 0.99
    assert {c.step for c in found.checks} == {"gguf"} and all(c.ok for c in found.checks)
    assert found.checks[-1].name == "logits at 32 bits"
    assert found.texts > 1000 and found.conversations > 100


def test_other_weights_are_found(copied, tiny_gguf):
    from safetensors.torch import load_file, save_file

    weights = load_file(copied / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"] *= 0
    save_file(weights, copied / "model.safetensors", {"format": "pt"})
    assert "the logits differ" in problems(copied, tiny_gguf)


def test_another_template_is_found(copied, tiny_gguf):
    (copied / "chat_template.jinja").write_text((copied / "chat_template.jinja").read_text() + " ")
    assert "another chat template" in problems(copied, tiny_gguf)


def test_another_end_of_sequence_is_found(copied, tiny_gguf):
    config = json.loads((copied / "tokenizer_config.json").read_text())
    config["eos_token"] = "<|endoftext|>"
    (copied / "tokenizer_config.json").write_text(json.dumps(config))
    assert "the end-of-sequence id is 2 in the file and 0 in the checkpoint" in problems(copied, tiny_gguf)


def test_a_tokenizer_that_splits_digits_otherwise_is_found(copied, tiny_gguf):
    tokenizer = json.loads((copied / "tokenizer.json").read_text())
    tokenizer["pre_tokenizer"] = tokenizer["pre_tokenizer"]["pretokenizers"][-1]
    (copied / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert "the tokenizers disagree on" in problems(copied, tiny_gguf)
