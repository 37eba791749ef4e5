"""The session: GenAI's own logits, answers, tokenizer and template, against ONNX Runtime and transformers."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from edgeft.errors import DataError, SetupError
from edgeft.onnx import tokenizer
from edgeft.onnx.session import Session
from tests.onnx_genai.conftest import TEXT

pytest.importorskip(
    "onnxruntime_genai", reason="ONNX Runtime GenAI is not installed: pip install 'edgeft[onnx]'"
)


pytestmark = pytest.mark.slow

IDS = [1, 40, 50, 60, 71, 82, 93, 104, 2, 200]
CHAT = [
    {"role": "user", "content": "What's 12 ½?"},
    {"role": "assistant", "content": "ü 3"},
    {"role": "user", "content": "a  b"},
]
NASTY = [
    TEXT, "50% ½ ²", "Ⅳ x² a  5 b   77", "١٢٣ abc", "日本語 １２ 3", "\t 8 ", " \n5", " 5\u00a05 \u20035", "  ½  x", "a  b  \n\n c",
    "don't  we'll", "<|im_start|>user\n½<|im_end|>", "𝟘𝟙 ㊀ ⑩ ৴", "   ", "😀2 e\u0301",
]  # fmt: skip


@pytest.fixture(scope="module")
def session(built):
    with Session(built) as opened:
        yield opened


@pytest.fixture(scope="module")
def trained(tiny):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny)


def test_logits_are_those_of_the_same_graph_in_onnx_runtime(session, built):
    import onnxruntime

    runner = onnxruntime.InferenceSession(str(built / "model.onnx"), providers=["CPUExecutionProvider"])
    given = {"input_ids": np.array([IDS]), "attention_mask": np.ones((1, len(IDS)), np.int64)}
    for port in runner.get_inputs():
        if port.name not in given:
            given[port.name] = np.zeros((1, 2, 0, 16), np.float32)
    assert np.array_equal(session.logits(IDS), runner.run(["logits"], given)[0][0])
    assert session.logits(IDS).shape == (len(IDS), session.n_vocab)


def test_an_answer_is_greedy_whatever_the_folder_says_of_sampling(session):
    ids, stopped = session.generate(IDS, 6)
    prompt = list(IDS)
    for token in ids:
        assert token == int(session.logits(prompt)[-1].argmax())
        prompt.append(token)
    if stopped:
        assert int(session.logits(prompt)[-1].argmax()) in session.ends
    else:
        assert len(ids) == 6


def test_an_answer_ends_at_each_end_that_the_folder_lists(built, session, tmp_path):
    first = session.generate(IDS, 1)[0][0]
    shutil.copytree(built, tmp_path / "model")
    said = json.loads((built / "genai_config.json").read_text())
    said["model"]["eos_token_id"] = [383, first]
    (tmp_path / "model" / "genai_config.json").write_text(json.dumps(said))
    with Session(tmp_path / "model") as other:
        assert other.generate(IDS, 6) == ([], True)


def test_the_tokenizer_of_genai_reads_what_the_checkpoint_reads(session, trained, tiny, built):
    from transformers import AutoTokenizer

    ours = AutoTokenizer.from_pretrained(built)
    for text in NASTY:
        wanted = trained.encode(text, add_special_tokens=False)
        assert session.tokenize(text) == wanted, text
        assert ours.encode(text, add_special_tokens=False) == wanted, text
        assert session.detokenize(wanted) == text


def test_without_the_repair_it_does_not(built, tiny, trained, tmp_path):
    shutil.copytree(built, tmp_path / "model")
    shutil.copyfile(tiny / "tokenizer.json", tmp_path / "model" / "tokenizer.json")
    with Session(tmp_path / "model") as other:
        assert other.tokenize("a  5") != trained.encode("a  5", add_special_tokens=False)


def test_only_what_genai_misreads_is_put_in_other_words():
    digits, bytes_ = (
        {"type": "Digits", "individual_digits": False},
        {"type": "ByteLevel", "add_prefix_space": False},
    )
    both = {"type": "Sequence", "pretokenizers": [digits, bytes_]}
    plain = tokenizer.in_plain_words(both)["pretokenizers"]
    assert [p["type"] for p in plain] == ["Split", "Split", "ByteLevel"]
    assert plain[0]["pattern"]["Regex"] == r"\p{N}+" and plain[2]["use_regex"] is False
    untouched = (bytes_, None, {"type": "Sequence", "pretokenizers": [bytes_]},
                 {"type": "Sequence", "pretokenizers": [digits, {**bytes_, "add_prefix_space": True}]})  # fmt: skip
    for other in untouched:
        assert tokenizer.in_plain_words(other) == other


def test_the_template_of_genai_renders_as_transformers_does(session, trained):
    wanted = trained.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    assert session.render(CHAT) == wanted


def test_without_a_template_it_says_so(built, tmp_path):
    shutil.copytree(built, tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").unlink()
    with Session(tmp_path / "model") as other:
        assert other.render(CHAT) is None


def test_more_tokens_than_the_context_are_refused(built):
    with Session(built, context=8) as short:
        with pytest.raises(DataError, match="10 tokens do not go into a context of 8"):
            short.logits(IDS)
        assert len(short.generate(IDS[:7], 5)[0]) <= 1


def test_a_folder_that_is_none_is_refused(tmp_path, built):
    with pytest.raises(DataError, match="is no ONNX Runtime GenAI folder"):
        Session(tmp_path)
    shutil.copytree(built, tmp_path / "model")
    (tmp_path / "model" / "model.onnx").write_bytes(b"nothing")
    with pytest.raises(DataError, match="cannot open model/"):
        Session(tmp_path / "model")


@pytest.fixture
def for_cuda(built, tmp_path):
    """The folder, saying that it is made for CUDA."""
    shutil.copytree(built, tmp_path / "cuda")
    said = json.loads((built / "genai_config.json").read_text())
    said["model"]["decoder"].setdefault("session_options", {})["provider_options"] = [{"cuda": {}}]
    (tmp_path / "cuda" / "genai_config.json").write_text(json.dumps(said))
    return tmp_path / "cuda"


@pytest.fixture
def cannot_compute(monkeypatch):
    """A GenAI with CUDA on a machine that cannot use it."""
    import onnxruntime_genai

    if onnxruntime_genai.is_cuda_available():
        pytest.skip("ONNX Runtime GenAI has CUDA here")
    monkeypatch.setattr(onnxruntime_genai, "is_cuda_available", lambda: True)


def test_a_folder_for_cuda_is_computed_by_the_cpu_where_there_is_no_cuda(
    for_cuda, cannot_compute, session, caplog
):
    with Session(for_cuda) as fallen:
        assert fallen.said.endswith(", CPU (the folder is made for cuda)")
        assert np.array_equal(fallen.logits(IDS), session.logits(IDS))
    assert "cuda/ is made for CUDA and is computed by the CPU: Cuda interface not available" in caplog.text
    caplog.clear()
    with Session(for_cuda, device="cpu") as wanted:
        assert wanted.said.endswith(", CPU (the folder is made for cuda)")
    assert not caplog.text


def test_who_insists_on_cuda_is_told_why_there_is_none(built, cannot_compute, monkeypatch):
    with pytest.raises(SetupError, match="cannot compute model/ with CUDA: Cuda interface not available"):
        Session(built, device="cuda")
    monkeypatch.undo()
    with pytest.raises(SetupError, match="ONNX Runtime GenAI has no CUDA"):
        Session(built, device="cuda")


@pytest.mark.parametrize(
    ("fixture", "asked"),
    [("for_cuda", ["append_provider cuda"]), ("built", ["clear_providers", "append_provider cuda"])],
)
def test_what_a_folder_says_of_cuda_is_kept_and_any_other_provider_is_not(
    fixture, asked, request, cannot_compute, monkeypatch
):
    import onnxruntime_genai

    calls = []

    class Config:
        """In place of GenAI's, where no GPU is: keeps what is asked of it."""

        def __init__(self, folder):
            pass

        def __getattr__(self, name):
            return lambda *given: calls.append(" ".join([name, *given]))

    def model(config):
        raise RuntimeError("no GPU here")

    folder = request.getfixturevalue(fixture)  # built with the real ones
    monkeypatch.setattr(onnxruntime_genai, "Config", Config)
    monkeypatch.setattr(onnxruntime_genai, "Model", model)
    with pytest.raises(SetupError, match="no GPU here"):
        Session(folder, device="cuda")
    assert calls == asked


@pytest.mark.parametrize(
    ("fixture", "said", "ways"),
    [("built", "CPU", "inputs of products in floats / in 8 bits"), ("for_cuda", "CUDA", "CUDA / CPU")],
)
def test_kernel_noise_is_another_accuracy_on_the_cpu_and_the_cpu_beside_cuda(
    fixture, said, ways, request, tmp_path
):
    from edgeft.llamacpp import kernels
    from edgeft.parity import noise, served

    folder, scratch, window = request.getfixturevalue(fixture), tmp_path / "scratch", [1, *range(40, 71)]
    scratch.mkdir()
    with Session(folder, device="cpu") as session:
        kernels.remembered(served.Served(session).logits, 1, scratch / "native.f32")(window)
        told = session.said
    found = noise.floor(
        "onnx", folder, [window], scratch / "native.f32", f"ONNX Runtime GenAI, {said}", scratch
    )
    (pair,) = found["pairs"]
    assert pair["what"] == ways and pair["kernels"] == told
    assert (pair["kld"] < 1e-9) == (said == "CUDA")  # both are the CPU here
    assert not list(scratch.iterdir())
