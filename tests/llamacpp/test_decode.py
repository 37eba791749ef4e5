from __future__ import annotations

import numpy as np
import pytest

from edgeft.errors import DataError, StageError
from edgeft.llamacpp.decode import Decoder

CHAT = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def decoder(library, smollm2):
    with Decoder(smollm2, n_ctx=128, threads=1) as opened:
        yield opened


def test_smollm2_answers_in_its_own_template(decoder):
    assert decoder.n_vocab == 49152
    assert (decoder.bos, decoder.eos, decoder.add_bos) == (1, 2, False)
    assert "<|im_start|>" in decoder.chat_template
    answer = decoder.generate(decoder.tokenize(CHAT, add_special=True, parse_special=True), 24)
    assert decoder.detokenize(answer) == "The capital of France is Paris."


def test_special_text_is_one_token_only_when_asked_for(decoder):
    parsed = decoder.tokenize("<|im_start|>", add_special=False, parse_special=True)
    plain = decoder.tokenize("<|im_start|>", add_special=False, parse_special=False)
    assert parsed == [1]
    assert len(plain) > 1
    assert decoder.detokenize(plain) == "<|im_start|>"


@pytest.mark.parametrize("text", ["", "a", "  two  spaces\n\n\ttab", "Grüße, 你好 👩‍⚕️ ☃", "x" * 3000])
def test_text_comes_back_from_its_tokens(decoder, text):
    assert decoder.detokenize(decoder.tokenize(text, add_special=False, parse_special=False)) == text


def test_logits_do_not_depend_on_what_was_computed_before(decoder):
    ids = decoder.tokenize(CHAT, add_special=False, parse_special=True)
    first = decoder.logits(ids)
    assert first.shape == (len(ids), 49152)
    assert first.dtype == np.float32
    decoder.logits(ids[::-1])
    assert np.array_equal(decoder.logits(ids), first)


def test_logits_from_a_position_on_are_the_last_rows(decoder):
    ids = decoder.tokenize(CHAT, add_special=False, parse_special=True)
    whole, part = decoder.logits(ids), decoder.logits(ids, first=10)
    assert part.shape == (len(ids) - 10, 49152)
    assert np.abs(part - whole[10:]).max() < 1e-2


def test_generation_stops_when_the_context_is_full(tiny):
    with Decoder(tiny(64), n_ctx=16, threads=1) as decoder:
        assert len(decoder.generate([10, 11, 12], 100)) <= 13


def test_what_cannot_be_decoded_is_refused(decoder):
    with pytest.raises(StageError, match="129 tokens do not fit a context of 128"):
        decoder.logits([5] * 129)
    with pytest.raises(StageError, match="token 49152 is not in the vocabulary"):
        decoder.logits([5, 49152])
    with pytest.raises(StageError, match="no logits are left"):
        decoder.logits([])


def test_keys_are_read_as_text(decoder):
    assert decoder.meta("general.license") == "apache-2.0"
    assert len(decoder.meta("tokenizer.chat_template")) > 256
    assert decoder.meta("no.such.key") is None


def test_a_vocabulary_alone_tokenizes_and_refuses_to_decode(library, smollm2):
    with Decoder(smollm2, vocab_only=True) as decoder:
        ids = decoder.tokenize("hello", add_special=False, parse_special=False)
        assert ids
        with pytest.raises(StageError, match="opened for its vocabulary only"):
            decoder.logits(ids)


def test_a_file_that_is_no_model_is_refused_with_llama_cpps_reason(library, tmp_path):
    path = tmp_path / "no model.gguf"
    path.write_bytes(b"GGUF" + bytes(60))
    with pytest.raises(DataError, match="cannot load"):
        Decoder(path)
    with pytest.raises(DataError, match="does not exist"):
        Decoder(tmp_path / "absent.gguf")
