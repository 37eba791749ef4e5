"""`edgeft serve` and `edgeft chat` know which program a built model is for."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from edgeft.chat import FolderChat
from edgeft.commands.talking import Found, find, folder_command, serve
from edgeft.errors import DataError, EdgeftError, SetupError
from edgeft.stages.serve import Serve
from tests.servers import standin
from tests.servers.conftest import CONFIG


@pytest.fixture
def awq(tmp_path):
    folder = tmp_path / "My Model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


@pytest.fixture
def built(tmp_path):
    """`built(*ids)`: a recipe with three formats, and a store in which these steps are done."""
    (tmp_path / "base").mkdir()
    (tmp_path / "rows.jsonl").write_text("{}")
    recipe = tmp_path / "r.toml"
    kinds = "".join(
        f"[[quantize]]\n{line}\n"
        for line in ('kind = "gguf"\ntype = "Q8_0"', 'kind = "awq"', 'kind = "onnx"')
    )
    recipe.write_text(
        f'[base]\npath = "base"\n[data]\nsource = "rows.jsonl"\n[serve]\ncontext = 300\n{kinds}'
    )

    def of(*done):
        def get(step):
            facts = {} if step.stage.kind == "gguf" else {"format": step.stage.kind}
            return (
                SimpleNamespace(path=tmp_path / step.stage.kind, facts=facts)
                if step.stage.id in done
                else None
            )

        return recipe, SimpleNamespace(get=get, root=tmp_path)

    return of


def test_the_first_finished_file_is_taken_and_a_variant_by_its_name(built):
    recipe, store = built("quantize/gguf", "gate", "quantize/awq", "gate/served")
    assert (find(recipe, "", store).path.name, find(recipe, "", store).format) == ("model.gguf", "gguf")
    recipe, store = built("quantize/gguf", "quantize/awq", "gate/served")
    found = find(recipe, "", store)  # the GGUF file did not pass
    assert (found.path.name, found.format, found.settings.context) == ("model", "awq", 300)
    with pytest.raises(EdgeftError, match="has no finished model"):
        find(recipe, "q8_0", store)
    recipe, store = built("quantize/onnx", "gate/served")
    assert find(recipe, "", store).format == "onnx"


def test_an_awq_folder_is_served_by_vllm_and_the_key_stays_out_of_the_process_list(
    awq, tmp_path, monkeypatch
):
    monkeypatch.setenv("EDGEFT_VLLM", str(standin.environment(tmp_path / "vllm")))
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    found = find(awq, "", None)
    assert (found.name, found.format) == ("my-model", "awq")
    argv, environment = folder_command(found, "0.0.0.0", 9000, "geheim")
    assert argv[:5] == [
        str(tmp_path / "vllm/bin/python"),
        "-m",
        "vllm.entrypoints.openai.api_server",
        "--model",
        str(awq),
    ]
    assert argv[argv.index("--port") + 1] == "9000" and "geheim" not in argv
    assert environment["VLLM_API_KEY"] == "geheim" and "PYTHONPATH" not in environment


def test_without_a_server_there_is_a_sentence(awq, monkeypatch, tmp_path):
    for name in ("EDGEFT_VLLM", "EDGEFT_SGLANG"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    with pytest.raises(SetupError, match="neither vLLM nor SGLang") as caught:
        folder_command(find(awq, "", None), "127.0.0.1", 1, "")
    assert "EDGEFT_VLLM" in caught.value.hint
    with pytest.raises(SetupError, match="library without a server") as caught:
        folder_command(Found(awq, "m", Serve(), "onnx"), "127.0.0.1", 1, "")
    assert "edgeft chat" in caught.value.hint


def test_nothing_is_served_to_the_network_without_a_key(awq, tmp_path):
    with pytest.raises(SetupError, match="would answer anybody"):
        serve(awq, "", tmp_path, 0, "0.0.0.0", 1, "", web=False)


class Echo:
    """A session whose template writes the conversation out, and whose answer is the number of messages."""

    template = True

    def render(self, messages):
        return "|".join(m["content"] for m in messages) if self.template else None

    def tokenize(self, text):
        return list(text.encode())

    def generate(self, prompt, max_tokens):
        return list(f" {prompt.count(ord('|')) + 1} messages"[:max_tokens].encode()), True

    def detokenize(self, ids):
        return bytes(ids).decode()

    def close(self):
        self.closed = True


def test_a_conversation_with_a_folder_goes_on_from_what_was_said():
    session = Echo()
    with FolderChat(session, context=60, system="Be brief.") as talk:
        assert list(talk.ask("One?", 100)) == ["2 messages"]
        assert list(talk.ask("Two?", 100)) == ["4 messages"]
        assert [m["role"] for m in talk.messages] == ["system", "user", "assistant", "user", "assistant"]
        with pytest.raises(DataError, match="the context 60"):
            list(talk.ask("x" * 60, 100))
        assert len(talk.messages) == 5  # a refused question is not part of it
        session.template = False
        with pytest.raises(SetupError, match="no chat template"):
            list(talk.ask("Three?", 100))
    assert session.closed
