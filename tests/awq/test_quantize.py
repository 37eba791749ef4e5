from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from edgeft import awq
from edgeft.awq import weights
from edgeft.awq.session import Session
from edgeft.errors import DataError, StageError
from tests.awq import models

pytestmark = pytest.mark.slow


def made(tmp_path, family="llama", dtype=torch.float16, model=None, **settings):
    source, out = tmp_path / "source", tmp_path / "out"
    models.save(source, family, dtype, **(model or {}))
    return awq.quantize(source, out, models.windows(), awq.Settings(**settings)), source, out


def logits(folder, ids):
    with Session(folder) as session:
        return session.logits(ids)


@pytest.mark.parametrize("family", ["llama", "untied", "biases", "qwen2", "gemma"])
def test_a_folder_speaks_nearly_as_its_checkpoint(tmp_path, family):
    result, _, out = made(tmp_path, family, group=32)
    ids = models.windows(8)[-1]
    with torch.inference_mode():
        plain = models.model(family).float()(torch.tensor([ids])).logits[0].numpy()
    found = logits(out, ids)
    assert result.scaled_off is not None and result.scaled_off < 1e-4
    assert 0 < abs(found - plain).mean() < 0.35 * plain.std()
    assert result.unscaled == () and len(result.shapes) == 14


def test_calibration_is_worth_something(tmp_path):
    ids = torch.tensor(models.windows(12)[6:])
    with torch.inference_mode():
        plain = models.model("llama").float()(ids).logits
        lost = {}
        for method in ("nearest", "awq", "full"):
            made(tmp_path / method, group=32, method=method)
            with Session(tmp_path / method / "out") as session:
                lost[method] = float(((session._model(ids).logits - plain) ** 2).mean())
    assert lost["full"] < lost["awq"] < lost["nearest"]


def test_head_and_embedding_stay_16_bit_and_tied(tmp_path):
    _, source, out = made(tmp_path)
    before, after = (load_file(folder / "model.safetensors") for folder in (source, out))
    assert "lm_head.weight" not in after
    assert torch.equal(before["model.embed_tokens.weight"], after["model.embed_tokens.weight"])


def test_biases_stay_and_follow_the_scaling(tmp_path):
    _, source, out = made(tmp_path, "biases")
    before, after = (load_file(folder / "model.safetensors") for folder in (source, out))
    q, v = (f"model.layers.0.self_attn.{x}_proj.bias" for x in "qv")
    assert torch.equal(before[q], after[q]) and not torch.equal(before[v], after[v])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_both_layouts_hold_the_same_numbers_in_the_checkpoints_own_format(tmp_path, dtype):
    outs = [made(tmp_path / x, dtype=dtype, layout=x)[2] for x in ("compressed-tensors", "gemm")]
    one, other = (weights.dequantized(out) for out in outs)
    assert one.keys() == other.keys() and {t.dtype for t in one.values()} == {dtype}
    assert all(torch.equal(one[name], other[name]) for name in one)
    ids = models.windows(1)[0]
    assert (logits(outs[0], ids) == logits(outs[1], ids)).all()


def test_transformers_opens_the_folder_without_any_help(tmp_path):
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    from transformers import AutoModelForCausalLM

    _, _, out = made(tmp_path)
    state = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float16).state_dict()
    ours = weights.dequantized(out)
    assert all(torch.equal(state[name], value) for name, value in ours.items())
    assert all(torch.equal(ours[name], value) for name, value in weights.by_library(out))


def test_an_interrupted_run_goes_on_and_writes_the_same_bytes(tmp_path, monkeypatch):
    _, source, whole = made(tmp_path / "whole")
    from edgeft.awq import scaling

    search, calls = scaling.search, []

    def dies(*args):
        calls.append(args)
        if len(calls) == 6:  # four pairs a block: in the second
            raise KeyboardInterrupt
        return search(*args)

    monkeypatch.setattr(scaling, "search", dies)
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        awq.quantize(source, out, models.windows(), awq.Settings())
    assert [p.name for p in (out / "blocks").iterdir()] == ["0000.safetensors"]
    awq.quantize(source, out, models.windows(), awq.Settings())
    assert len(calls) == 10 and not (out / "blocks").exists()
    assert (out / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def test_a_large_model_is_cut_into_files_with_an_index(tmp_path, monkeypatch):
    from edgeft.awq import writing

    monkeypatch.setattr(writing, "SHARD", 30_000)
    _, _, out = made(tmp_path)
    index = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(index.values())) > 1
    assert {name for file in out.glob("*.safetensors") for name in load_file(file)} == set(index)
    assert len(logits(out, [3, 4, 5])) == 3


def test_bytes_and_bits_are_those_of_the_files(tmp_path):
    result, _, out = made(tmp_path)
    assert result.bytes == sum(f.stat().st_size for f in out.iterdir())
    parameters = sum(t.numel() for t in weights.dequantized(out).values())
    assert result.parameters == parameters
    assert result.bits_per_weight == 8 * (out / "model.safetensors").stat().st_size / parameters


def test_step_and_value_of_each_parameter_can_be_read(tmp_path):
    _, source, out = made(tmp_path, group=32, method="nearest")
    before = load_file(source / "model.safetensors")
    for name, value, step in weights.stored(out):
        if step is None:
            assert torch.equal(value, before[name].float())
        else:
            off = (value - before[name].float()).abs() / step.repeat_interleave(32, 1)
            assert float(off.max()) < 0.55


def test_a_scaling_that_changed_the_model_is_refused(tmp_path, monkeypatch):
    from edgeft.awq import folding

    real = folding.apply

    def half_done(block, pair, scales, dtype=None):
        found = real(block, pair, scales, dtype)
        if dtype is not None:
            layer = block.get_submodule(pair.readers[0])
            layer.weight.data = layer.weight.data * 1.05
        return found

    monkeypatch.setattr(folding, "apply", half_done)
    with pytest.raises(StageError, match="scaling alone changed the model"):
        made(tmp_path)


@pytest.mark.parametrize(
    ("family", "model", "said"),
    [
        ("llama", {"hidden_size": 48, "head_dim": 12}, "have 48 numbers, which groups of 32 do not divide"),
        ("llama", {"intermediate_size": 100}, "have 100 numbers|has 100 rows"),
        ("mixture", {}, "experts of a mixture"),
    ],
)
def test_what_cannot_be_done_is_refused_with_a_sentence(tmp_path, family, model, said):
    with pytest.raises(StageError, match=said):
        made(tmp_path, family, model=model)


def test_a_quantized_folder_is_no_checkpoint(tmp_path):
    _, _, out = made(tmp_path, method="nearest")
    with pytest.raises(StageError, match="already quantized"):
        awq.quantize(out, tmp_path / "again", models.windows(), awq.Settings())


def test_a_session_reads_renders_and_answers(tmp_path):
    _, _, out = made(tmp_path, group=32)
    with Session(out, context=40) as session:
        text = session.render([{"role": "user", "content": "w7 w8"}])
        ids = session.tokenize(text)
        assert ids == [3, 7, 8, 4] and session.detokenize(ids) == "w3 w7 w8 w4"
        found, ended = session.generate(ids, 6)
        assert len(found) == 6 or ended
        again = [int(row.argmax()) for row in session.logits([*ids, *found])[len(ids) - 1 :]]
        assert again[: len(found)] == found
        assert session.n_vocab == 96 and "transformers" in session.said
        with pytest.raises(DataError, match="41 tokens"):
            session.logits([3] * 41)
    with pytest.raises(DataError, match=r"no config\.json"):
        Session(tmp_path)
