"""The stage: what it takes from the steps before it, what it says, and what it refuses before the training."""

from __future__ import annotations

import json

import numpy as np
import pytest
from pydantic import ValidationError

from edgeft.errors import ParityError, RecipeError, SetupError
from edgeft.stage import Artifact, Job
from edgeft.stages import quantize_onnx
from edgeft.stages.quantize_onnx import QuantizeOnnx
from tests.onnx_genai.conftest import TEXT

pytest.importorskip(
    "onnxruntime_genai", reason="ONNX Runtime GenAI is not installed: pip install 'edgeft[onnx]'"
)


ROLES = {
    "attn_q": 64, "attn_k": 64, "attn_v": 64, "attn_output": 64, "ffn_gate": 64, "ffn_up": 64, "ffn_down": 128,
}  # fmt: skip


@pytest.fixture
def inputs(tiny, tmp_path):
    """Results of base, data, merge and imatrix, as files."""
    from transformers import AutoTokenizer

    from edgeft.corpus.rows import Row, write_rows
    from edgeft.llamacpp import imatrix

    read = AutoTokenizer.from_pretrained(tiny)
    folders = {name: tmp_path / name for name in ("base", "data", "merge", "imatrix")}
    for folder in folders.values():
        folder.mkdir()
    for name, words in (("train", "on and on it goes, "), ("heldout", "something else entirely, and ")):
        ids = read.encode(words * 60 + TEXT)
        said = [{"role": "user", "content": words * 60}, {"role": "assistant", "content": "yes"}]
        write_rows(folders["data"] / f"{name}.jsonl", [Row(messages=said, ids=ids, labels=ids, origin="x:1")])
    for name in ("base", "merge"):
        (folders[name] / "model").symlink_to(tiny)
    random = np.random.default_rng(0)
    sums = {
        f"blk.{i}.{role}.weight": random.random((1, width), np.float32) ** 4
        for i in range(2) for role, width in ROLES.items()
    }  # fmt: skip
    matrix = imatrix.Matrix(
        sums=sums, counts={n: np.ones(1, np.float32) for n in sums}, datasets=("x",), chunks=1, chunk_size=64
    )
    imatrix.save(matrix, folders["imatrix"] / "imatrix.gguf")
    return {name: Artifact(None, "", folder, {}) for name, folder in folders.items()}  # type: ignore[arg-type]


def run(inputs, out, **given):
    out.mkdir()
    return quantize_onnx.run(Job(QuantizeOnnx(**given), inputs, out))


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["importance", "awq", "k_quant", "rtn"])
def test_it_makes_a_folder_and_says_what_is_in_it(algorithm, inputs, tmp_path):
    found = run(inputs, tmp_path / "out", algorithm=algorithm)
    beside = ["own-text.json"] if algorithm == "awq" else []
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["model", *beside]
    assert found["format"] == "onnx" and found["type"] == "ONNX int4"
    assert found["bytes"] == sum(p.stat().st_size for p in (tmp_path / "out" / "model").iterdir())
    assert found["types"]["int4"] == (10 if algorithm == "awq" else 8)
    assert all(c["ok"] for c in found["checks"] if c["name"] != "calibration text"), found["checks"]
    assert json.dumps(found)
    assert ("importance" in {c["name"] for c in found["checks"]}) == (algorithm == "importance")


@pytest.mark.slow
def test_an_importance_matrix_of_other_names_is_not_passed_over_in_silence(inputs, tmp_path, monkeypatch):
    from edgeft.llamacpp import imatrix

    monkeypatch.setattr(
        imatrix.Matrix, "means", lambda self: {"blk.0.attn_q.weight": np.ones(64, np.float32)}
    )
    found = {c["name"]: c for c in run(inputs, tmp_path / "out")["checks"]}
    assert found["importance"]["ok"] is None
    assert "says nothing of 9 products" in found["importance"]["said"]


@pytest.mark.slow
def test_awq_does_not_look_at_what_is_tested_on(inputs, tmp_path):
    data = inputs["data"].path
    (data / "heldout.jsonl").write_bytes((data / "train.jsonl").read_bytes())
    with pytest.raises(ParityError):
        run(inputs, tmp_path / "out", algorithm="awq")


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"algorithm": "awq", "mixed": True}, "leave mixed out"),
        ({"algorithm": "awq", "symmetric": True}, "leave symmetric out"),
        ({"algorithm": "awq", "block_size": 16}, "blocks of 32, 64 or 128, not 16"),
        ({"block_size": 48}, "block_size"),
        ({"provider": "coreml"}, "provider"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(given, reason):
    with pytest.raises(ValidationError, match=reason):
        QuantizeOnnx(**given)


def planned(config, tmp_path, **given):
    from edgeft.stage import Step
    from edgeft.stages import base

    (tmp_path / "config.json").write_text(json.dumps(config))
    above = Step(base.STAGE, base.Base(path=tmp_path))
    return Step(quantize_onnx.STAGE, QuantizeOnnx(**given), inputs={"base": above})


CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 72, "num_attention_heads": 4, "head_dim": 16,
    "num_hidden_layers": 2, "vocab_size": 384, "intermediate_size": 128, "max_position_embeddings": 512,
}  # fmt: skip


def test_a_base_that_cannot_be_built_is_refused_before_the_training(tmp_path):
    unknown = {**CONFIG, "architectures": ["BloomForCausalLM"]}
    with pytest.raises(RecipeError, match="does not know BloomForCausalLM"):
        quantize_onnx.check(planned(unknown, tmp_path), {})
    quantize_onnx.check(planned(CONFIG, tmp_path), {})


def test_widths_that_no_block_divides_are_refused_for_awq_alone(tmp_path):
    with pytest.raises(RecipeError, match="needs widths that 32 divides, and attn_q is 72 wide"):
        quantize_onnx.check(planned(CONFIG, tmp_path, algorithm="awq"), {})


def test_what_it_takes_is_predicted_from_the_shape(tmp_path):
    small, half = (quantize_onnx.estimate(planned(CONFIG, tmp_path, provider=p), {}) for p in ("cpu", "cuda"))
    assert small.ram_mb >= 900 and small.disk_mb >= half.disk_mb


@pytest.mark.parametrize(
    "package", ["onnxruntime-genai", "onnxruntime-genai-cuda", "onnxruntime-genai-directml"]
)
def test_the_package_for_any_provider_is_genai(package, monkeypatch):
    def version(name):
        if name != package:
            raise quantize_onnx.metadata.PackageNotFoundError(name)
        return "0.18.0"

    monkeypatch.setattr(quantize_onnx.metadata, "version", version)
    assert quantize_onnx.GENAI.find() == "0.18.0"


def test_without_genai_it_says_what_to_install(monkeypatch):
    def version(name):
        raise quantize_onnx.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(quantize_onnx.metadata, "version", version)
    with pytest.raises(SetupError, match="is not installed"):
        quantize_onnx.GENAI.find()
