"""Tokenizers with planted faults: which check names them, and nothing else."""

from __future__ import annotations

import json
import struct

import pytest

from edgeft.llamacpp import header
from edgeft.llamacpp.decode import Decoder
from edgeft.parity.checks import prompts, tokens
from edgeft.parity.checks.check import failed

pytestmark = pytest.mark.slow

TEMPLATE, TOKENS = "tokenizer.chat_template", "tokenizer.ggml.tokens"
BOS, EOS, ADD_BOS = ("tokenizer.ggml." + k for k in ("bos_token_id", "eos_token_id", "add_bos_token"))
BOS_FIRST = "{{ bos_token }}{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|im_end|>' }}{% endfor %}"


def against(checkpoint, gguf):
    with Decoder(gguf, vocab_only=True) as file:
        return tokens.against_checkpoint(checkpoint, file)


def between(reference, shipped, **how):
    with Decoder(reference, vocab_only=True) as a, Decoder(shipped, vocab_only=True) as b:
        return tokens.between_files(a, b, **how)


def wrong(checks):
    return {c.name: c.said for c in failed(checks)}


def spelled(gguf):
    return list(header.read(gguf, arrays=(TOKENS,)).keys[TOKENS])


def retype(gguf, token, kind):
    """Change one element of the array of token types: 3 is control, 4 user-defined."""
    key = "tokenizer.ggml.token_type"
    _, end = header.read(gguf).spans[key]
    with gguf.open("r+b") as stream:
        stream.seek(end - 4 * (len(spelled(gguf)) - token))
        assert stream.read(4) == struct.pack("<i", 3)
        stream.seek(-4, 1)
        stream.write(struct.pack("<i", kind))


def with_template(checkpoint, text):
    (checkpoint / "chat_template.jinja").write_text(text)
    return checkpoint


def test_a_faithful_file_passes_every_check(tiny_checkpoint, tiny_gguf):
    checks = against(tiny_checkpoint, tiny_gguf)
    assert {c.ok for c in checks} == {True} and {c.step for c in checks} == {"gguf"}
    assert {"C-04", "C-14", "C-15", "C-16", "C-17", "C-20", "C-21", "C-22", "C-24", "C-26"} == {
        code for c in checks for code in c.codes
    }
    checks = between(tiny_gguf, tiny_gguf, step="quantized")
    assert {c.ok for c in checks} == {True} and {c.step for c in checks} == {"quantized"}


def test_two_tokens_that_changed_places_are_found_though_no_text_has_them(
    tiny_checkpoint, tiny_gguf, planted
):
    swapped = spelled(tiny_gguf)
    swapped[40_000], swapped[40_001] = swapped[40_001], swapped[40_000]
    gguf = planted(**{TOKENS: swapped})
    assert wrong(against(tiny_checkpoint, gguf))["vocabulary"].startswith("token 40000 is ")
    assert "vocabulary" in wrong(between(tiny_gguf, gguf))


def test_a_shifted_tokenizer_is_found_by_its_ids(tiny_checkpoint, tiny_gguf, planted):
    by_one = spelled(tiny_gguf)
    by_one[100:] = [*by_one[101:], by_one[100]]
    gguf = planted(**{TOKENS: by_one})
    found = wrong(against(tiny_checkpoint, gguf))
    assert "the tokenizers disagree on 'Hello, world!': at token 0" in found["token ids"]
    assert {"vocabulary", "token ids", "chat tokens"} <= set(found)
    assert {"vocabulary", "token ids", "chat tokens"} <= set(wrong(between(tiny_gguf, gguf)))


def test_another_template_in_the_file_is_found(tiny_checkpoint, tiny_gguf, planted):
    gguf = planted(**{TEMPLATE: "{% for m in messages %}{{ m['content'] }}{% endfor %}"})
    assert list(wrong(against(tiny_checkpoint, gguf))) == ["chat template"]
    assert list(wrong(between(tiny_gguf, gguf))) == ["chat template"]


def test_a_rewritten_end_of_sequence_is_found(tiny_checkpoint, tiny_gguf, planted):
    gguf = planted(**{EOS: 0})
    said = wrong(against(tiny_checkpoint, gguf))["special ids"]
    assert said == "the end-of-sequence id is 0 in the file and 2 in the checkpoint"
    assert (
        "eos is 0 in the shipped file and 2 in the reference"
        in wrong(between(tiny_gguf, gguf))["special ids"]
    )


def test_an_end_of_turn_that_llama_cpp_does_not_stop_at_is_found(copied, tiny_gguf):
    template = (copied / "chat_template.jinja").read_text()
    with_template(copied, template.replace("['content'] + '<|im_end|>'", "['content'] + '<filename>'"))
    said = wrong(against(copied, tiny_gguf))["end of generation"]
    assert (
        said == "llama.cpp does not stop at token 6 '<filename>', which the template writes after an answer"
    )
    config = json.loads((copied / "generation_config.json").read_text())
    (copied / "generation_config.json").write_text(json.dumps({**config, "eos_token_id": [2, 7]}))
    said = wrong(against(copied, tiny_gguf))["end of generation"]
    assert "token 7 '<gh_stars>', which generation_config.json names" in said


def test_what_opens_an_answer_need_not_end_one_though_a_model_lists_it(copied, tiny_gguf):
    with_template(
        copied,
        BOS_FIRST.replace("{{ bos_token }}", "") + "{% if add_generation_prompt %}<gh_stars>{% endif %}",
    )
    config = json.loads((copied / "generation_config.json").read_text())
    (copied / "generation_config.json").write_text(json.dumps({**config, "eos_token_id": [2, 7]}))
    assert "end of generation" not in wrong(against(copied, tiny_gguf))


def test_a_bos_that_the_template_writes_and_the_vocabulary_adds_is_served_once(copied, planted):
    with_template(copied, BOS_FIRST)
    assert wrong(against(copied, planted(**{TEMPLATE: BOS_FIRST, ADD_BOS: True}))) == {}
    assert wrong(against(copied, planted(**{TEMPLATE: BOS_FIRST, ADD_BOS: False}))) == {}


def test_a_double_bos_is_found_where_the_server_does_not_take_one_away(copied, planted):
    """The server removes one BOS from the very beginning of a prompt; here something stands before it."""
    later = "\n\n" + BOS_FIRST
    gguf = planted(**{TEMPLATE: later, ADD_BOS: True})
    said = wrong(against(with_template(copied, later), gguf))["BOS"]
    assert "has 1 BOS (token 1) as the checkpoint knows it and 2 as llama-server decodes it" in said
    twice = planted(**{TEMPLATE: "{{ bos_token }}" + BOS_FIRST, ADD_BOS: True})
    with_template(copied, BOS_FIRST)
    assert list(wrong(against(copied, twice))) == ["chat template"]  # what it writes: test_rendering.py


def test_a_bos_that_was_not_trained_is_found(copied, tiny_gguf, planted):
    plain = BOS_FIRST.removeprefix("{{ bos_token }}")
    gguf = planted(**{TEMPLATE: plain, ADD_BOS: True})
    found = wrong(against(with_template(copied, plain), gguf))
    assert "has 0 BOS (token 1) as the checkpoint knows it and 1 as" in found["BOS"]
    assert set(found) == {"BOS", "chat tokens"}
    assert "add_bos is True in the shipped file" in wrong(between(tiny_gguf, gguf))["special ids"]


def test_an_eos_that_the_vocabulary_appends_to_a_prompt_is_found(tiny_checkpoint, tiny_gguf, planted):
    gguf = planted(**{"tokenizer.ggml.add_eos_token": True})
    assert "EOS (token 2)" in wrong(against(tiny_checkpoint, gguf))["BOS"]
    assert "added to a prompt is [2]" in wrong(between(tiny_gguf, gguf))["special ids"]


def test_a_tokenizer_that_composes_characters_is_said_to_and_fails_only_on_the_callers_own_text(
    copied, tiny_gguf
):
    tokenizer = json.loads((copied / "tokenizer.json").read_text())
    tokenizer["normalizer"] = {"type": "NFC"}
    (copied / "tokenizer.json").write_text(json.dumps(tokenizer))
    checks = against(copied, tiny_gguf)
    assert wrong(checks) == {} and "puts text into NFC first" in next(
        c.said for c in checks if c.name == "token ids"
    )
    with Decoder(tiny_gguf, vocab_only=True) as file:
        found = wrong(tokens.against_checkpoint(copied, file, ["cafe\u0301"]))
    assert set(found) == {"token ids", "chat tokens"}


def test_an_added_token_that_the_file_reads_as_text_is_found(copied, tiny_gguf):
    tokenizer = json.loads((copied / "tokenizer.json").read_text())
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    tokenizer["added_tokens"].append({"id": 49152, "content": "<dose>", **plain})
    (copied / "tokenizer.json").write_text(json.dumps(tokenizer))
    found = wrong(against(copied, tiny_gguf))
    assert (
        found["vocabulary rows"] == "the file has 49152 vocabulary rows; the tokenizer's highest id is 49152"
    )
    assert found["added tokens"].startswith("token 49152 '<dose>' alone is read as [49152] by transformers")


def test_a_special_token_that_would_show_in_answers_is_found_and_one_that_would_vanish(
    copied, tiny_gguf, planted
):
    shown = planted()
    retype(shown, 6, 4)
    said = "token 6 '<filename>' is not a control token in the file, but was special"
    assert wrong(against(copied, shown)) == {"control tokens": said}
    assert wrong(between(tiny_gguf, shown)) == {"control tokens": said}
    tokenizer = json.loads((copied / "tokenizer.json").read_text())
    tokenizer["added_tokens"][6]["special"] = False
    (copied / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert (
        "is a control token in the file, but was not" in wrong(against(copied, tiny_gguf))["control tokens"]
    )


def test_files_with_different_vocabularies_are_told_apart(library):
    from edgeft.llamacpp.source import llama_cpp_tree

    models = llama_cpp_tree() / "models"
    found = wrong(between(models / "ggml-vocab-qwen2.gguf", models / "ggml-vocab-llama-bpe.gguf"))
    assert found["vocabulary"] == "the shipped file has 128256 tokens, the reference file 151936"
    assert {"vocabulary", "token ids", "added tokens", "special ids"} <= set(found)


@pytest.mark.parametrize(
    "name", ["llama-spm", "llama-bpe", "gemma-4", "phi-3", "qwen2", "deepseek-llm", "command-r"]
)
def test_other_families_files_agree_with_themselves(library, name):
    from edgeft.llamacpp.source import llama_cpp_tree

    path = llama_cpp_tree() / "models" / f"ggml-vocab-{name}.gguf"
    assert wrong(between(path, path)) == {}


def test_a_prompt_loses_only_the_bos_at_its_very_beginning(library):
    from edgeft.llamacpp.source import llama_cpp_tree

    with Decoder(llama_cpp_tree() / "models" / "ggml-vocab-llama-spm.gguf", vocab_only=True) as file:
        assert prompts.served_text(file, "<s>[INST] a</s><s>b") == "[INST] a</s><s>b"
        assert prompts.served_text(file, "<s><s>a") == "<s>a"
        assert prompts.served_ids(file, "<s>a").count(1) == 1
        assert prompts.served_ids(file, " <s>a").count(1) == 2
