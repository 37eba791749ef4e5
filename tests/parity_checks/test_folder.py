"""Folders that another runtime serves: what must be exact about their files and about the runtime that has them open."""

from __future__ import annotations

import json

import numpy as np
import pytest

from edgeft.errors import DataError, SetupError
from edgeft.parity import served
from edgeft.parity.checks import folder as checking
from tests.parity_checks.plain_session import Session


@pytest.fixture(scope="module")
def session(tiny_checkpoint):
    with Session(tiny_checkpoint) as opened:
        yield opened


@pytest.fixture
def few(monkeypatch):
    """A handful of texts and chats: which ones there are is tested elsewhere."""
    monkeypatch.setattr(checking, "plain", lambda texts, form: ["Hello, world!", "1234 ½", "a\n b"])
    monkeypatch.setattr(checking, "chats", lambda texts, form: checking.CONVERSATIONS)


def answers(checkpoint, folder, session):
    return {c.name: c for c in checking.against_checkpoint(checkpoint, folder, session)}


class Other:
    """A session of which some answers are other ones."""

    def __init__(self, session, **changed):
        self.session, self.changed = session, changed

    def __getattr__(self, name):
        return self.changed.get(name, getattr(self.session, name))


@pytest.mark.slow
def test_a_copy_is_found_to_be_one_by_every_check(tiny_checkpoint, session, few):
    found = answers(tiny_checkpoint, tiny_checkpoint, session)
    assert len(found) == 12 and all(c.ok for c in found.values()), found
    assert {c.step for c in found.values()} == {"quantized", "served"}
    assert "by Jinja, with the folder's template" in found["served prompts"].said


@pytest.mark.slow
def test_all_texts_and_chats_are_compared(tiny_checkpoint, session):
    found = answers(tiny_checkpoint, tiny_checkpoint, session)
    assert all(c.ok for c in found.values())
    assert "1047 texts" in found["token ids"].said and "111 templated chats" in found["served tokens"].said


def change(folder, name, **values):
    path = folder / name
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.slow
def test_faults_in_the_files_fail_at_the_step_that_wrote_them(tiny_checkpoint, copied, session, few):
    (copied / "chat_template.jinja").write_text((tiny_checkpoint / "chat_template.jinja").read_text() + " ")
    change(copied, "generation_config.json", eos_token_id=[2, 17])
    change(copied, "config.json", tie_word_embeddings=False)
    tokens = json.loads((copied / "tokenizer.json").read_text())
    vocab = tokens["model"]["vocab"]
    a, b = "Hello", "world"
    vocab[a], vocab[b] = vocab[b], vocab[a]
    (copied / "tokenizer.json").write_text(json.dumps(tokens))
    found = answers(tiny_checkpoint, copied, session)
    wrong = {n for n, c in found.items() if not c.ok}
    assert wrong == {"chat template", "end of generation", "tied embeddings", "vocabulary", "token ids", "served prompts"}  # fmt: skip
    assert "ends answers at token 17" in found["end of generation"].said
    assert "(369 characters, 368 expected)" in found["chat template"].said
    assert all(c.step == "quantized" for n, c in found.items() if n in wrong - {"served prompts"})


@pytest.mark.slow
def test_an_end_that_is_not_named_and_a_moved_special_id_are_found(
    tiny_checkpoint, copied, session, few, tmp_path
):
    change(copied, "tokenizer_config.json", eos_token="<|endoftext|>")
    change(copied, "generation_config.json", eos_token_id=0)
    found = answers(tiny_checkpoint, copied, session)
    assert found["special ids"].ok is False and "the eos id is 0 in the folder's" in found["special ids"].said
    assert "does not stop an answer at token 2" in found["end of generation"].said
    (copied / "genai_config.json").write_text(json.dumps({"model": {"eos_token_id": [2], "bos_token_id": 5}}))
    found = answers(tiny_checkpoint, copied, session)
    assert found["end of generation"].ok, "genai_config.json is what ONNX Runtime reads"
    change(copied, "tokenizer_config.json", eos_token="<|im_end|>")
    assert (
        "the bos id is 5 in genai_config.json"
        in answers(tiny_checkpoint, copied, session)["special ids"].said
    )


@pytest.mark.slow
def test_faults_of_the_runtime_fail_at_serving(tiny_checkpoint, session, few):
    twice = Other(session, tokenize=lambda text: [1, *session.tokenize(text)], said="Runtime 1.0, CPU")
    found = answers(tiny_checkpoint, tiny_checkpoint, twice)
    assert {n for n, c in found.items() if not c.ok} == {"served texts", "added tokens", "served tokens", "BOS"}  # fmt: skip
    assert found["BOS"].codes == ("C-24",) and "1 BOS" not in found["BOS"].said and found["BOS"].step == "served"  # fmt: skip
    assert "Runtime 1.0 [1, 19556" in found["served texts"].said

    def trimmed(messages):
        text = session.tokenizer.apply_chat_template(
            [{**m, "content": m["content"].strip()} for m in messages],
            tokenize=False,
            add_generation_prompt=True,
        )
        return str(text)

    found = answers(tiny_checkpoint, tiny_checkpoint, Other(session, render=trimmed))["served prompts"]
    assert found.ok is False and "differs at character" in found.said

    def refuses(messages):
        raise DataError("no such filter: tojson")

    found = answers(tiny_checkpoint, tiny_checkpoint, Other(session, render=refuses))["served prompts"]
    assert found.ok is False and "is refused: no such filter" in found.said
    found = answers(tiny_checkpoint, tiny_checkpoint, Other(session, n_vocab=49216))["vocabulary rows"]
    assert found.ok is False and "49216 vocabulary rows are served" in found.said


def test_a_session_is_scored_as_every_other_speaker(tiny_checkpoint, session):
    from edgeft.parity.speakers import Torch

    window, speaker = list(range(100, 132)), served.Served(session)
    torch = Torch(session.model, session.tokenizer)
    assert np.allclose(speaker.logits(window), torch.logits(window), atol=1e-5)
    assert speaker.logits(window).shape == (15, 49152) and speaker.n_vocab == torch.n_vocab
    assert speaker.answer(window, 4) == torch.answer(window, 4)


def config(folder, **values):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(values))
    return folder


@pytest.mark.parametrize(
    ("quantized", "said", "hint"),
    [
        ({"quant_method": "gptq"}, "is quantized by gptq", "a session that gives the logits of every token"),
        ({"quant_method": "bitsandbytes"}, "is quantized by bitsandbytes", "a reader of its packed weights"),
        ({"quant_method": "compressed-tensors", "format": "float-quantized"}, "float-quantized", "pack-quantized"),
        (None, "is a checkpoint", "AWQ or ONNX folder last"),
    ],
)  # fmt: skip
def test_a_folder_that_cannot_be_certified_is_refused_with_what_is_missing(tmp_path, quantized, said, hint):
    folder = config(tmp_path / "x", **({"quantization_config": quantized} if quantized else {}))
    with pytest.raises(DataError, match=said) as caught:
        served.format_of(folder)
    assert hint in caught.value.hint


def test_formats_are_told_by_what_their_runtime_reads(tmp_path):
    assert served.format_of(config(tmp_path / "a", quantization_config={"quant_method": "awq"})) == "awq"
    packs = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
    assert served.format_of(config(tmp_path / "b", quantization_config=packs)) == "awq"
    (tmp_path / "c").mkdir()
    (tmp_path / "c/model.onnx").touch()
    with pytest.raises(DataError, match="neither genai_config") as caught:
        served.format_of(tmp_path / "c")
    assert "ONNX Runtime GenAI" in caught.value.hint
    (tmp_path / "c/genai_config.json").write_text("{}")
    assert served.format_of(tmp_path / "c") == "onnx"


def test_the_first_runtime_that_can_be_started_speaks_and_a_missing_one_is_named(monkeypatch):
    monkeypatch.setitem(served.MISSING, "vllm", lambda: "install vLLM")
    monkeypatch.setitem(served.MISSING, "transformers", lambda: "")
    assert served.which("awq") == "transformers"
    with pytest.raises(SetupError, match="nothing here can score AWQ") as caught:
        served.which("awq", "vllm")
    assert caught.value.hint == "install vLLM"
    with pytest.raises(SetupError, match="not scored by 'vllm'"):
        served.which("onnx", "vllm")
    monkeypatch.setitem(served.MISSING, "vllm", lambda: "")
    assert served.which("awq") == "vllm"
