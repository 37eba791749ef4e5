"""The merge stage on a tiny model: which base it takes, what it reports, what it refuses."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from edgeft import merging
from edgeft.errors import ParityError, RecipeError
from edgeft.merging import dequantized, fold
from edgeft.parity import evidence, reference, suite
from edgeft.parity.speakers import Torch
from edgeft.stage import Artifact, Job, Step
from edgeft.stages import base, merge, train
from edgeft.training import load_trained, resolve
from edgeft.training import model as models
from tests.training import tiny
from tests.training.test_merging import make_adapter

WINDOWS, LENGTH = 8, 64


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    monkeypatch.setenv("EDGEFT_DEVICE", "cpu")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """By method: a tiny base with a word for each of its 64 ids, and an adapter for it."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("merge")
    model = tiny.checkpoint(folder / "base" / "model", dtype=torch.float16)
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(64)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w2").save_pretrained(model)
    for method in ("qlora", "lora"):
        make_adapter(model, folder / method / "adapter", method=method)
    return folder


@pytest.fixture
def job(made, tmp_path):
    """Makes the stage's Job, and the text on which the merges are measured."""

    def build(method="qlora", favour=None, **options):
        where, adapter = made / "base" / "model", made / method / "adapter"
        trained = load_trained(where, adapter, method=method, compute_dtype="float32")
        full = load_trained(where, adapter, method="lora", compute_dtype="float32")
        speaker = Torch(trained, _tokenizer(where))
        pair = (full, trained) if favour == "original" else (trained, full)
        ids = _telling(*pair) if favour else [i for row in tiny.rows(80, seed=1) for i in row.ids]
        text = suite.plain(ids, LENGTH, WINDOWS, bos=None, name="domain")
        said = tmp_path / "reference"
        said.mkdir()
        nll = {"domain": reference.write(speaker, text, said / "domain.kld")}
        np.savez(
            said / "reference.npz", **evidence.Reference(texts={"domain": text}, nll=nll, base=None).arrays()
        )
        facts = {
            "method": method,
            "compute_dtype": "float32",
            "adapted": list(resolve(models.skeleton(where)).names),
        }
        inputs = {
            "base": Artifact(base.STAGE, "b", made / "base", {}),
            "train": Artifact(train.STAGE, "t", made / method, facts),
            "reference": Artifact(train.STAGE, "r", said, {}),
        }
        (tmp_path / "out").mkdir()
        return Job(merge.Merge(**options), inputs, tmp_path / "out")

    return build


def _tokenizer(folder: Path):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def _telling(better, worse) -> list[int]:
    """Windows in which every token is the one that `better` finds likelier than `worse` does, most of all."""
    ids = torch.arange(WINDOWS)[:, None] + 10
    with torch.no_grad():
        while ids.shape[1] < LENGTH:
            one, other = (m(ids).logits[:, -1].log_softmax(-1) for m in (better, worse))
            ids = torch.cat([ids, (one - other).argmax(-1, keepdim=True)], 1)
    return ids.flatten().tolist()


def _weights(folder: Path):
    return load_file(folder / "model.safetensors")


def _same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.slow
@pytest.mark.parametrize("better", ["original", "dequantized"])
def test_qlora_is_merged_both_ways_and_the_lower_heldout_loss_is_kept(job, tmp_path, better):
    one = job(favour=better)
    facts = json.loads(json.dumps(merge.run(one)))
    assert facts["merge_base"] == better and "its held-out loss is lower" in facts["merge_reason"]
    assert (
        f"into the {better} base: held-out loss" in facts["summary"]
        and facts["merge_reason"] in facts["summary"]
    )
    found = facts["candidates"]
    worse = ({"original", "dequantized"} - {better}).pop()
    assert found[better]["loss"] < found[worse]["loss"]
    assert abs(found["dequantized"]["kld"]) < 1e-6
    assert found["original"]["kld"] > 1e-4
    assert {"adapter applied", "base weights"} <= {c["name"] for c in facts["checks"]}
    assert all(c["ok"] for c in facts["checks"])
    assert 0.01 < facts["nf4_noise"]["median"] < facts["nf4_noise"]["max"]

    assert sorted(p.name for p in one.out.iterdir()) == ["model", "scores.npz"]
    scores = evidence.scores_of(dict(np.load(one.out / "scores.npz")))
    assert scores["domain"].nll.mean() == pytest.approx(found[better]["loss"])
    where, adapter = one.inputs["base"].path / "model", one.inputs["train"].path / "adapter"
    if better == "dequantized":
        dequantized.write(where, tmp_path / "seen", compute_dtype="float32", device="cpu")
    merging.merge(where if better == "original" else tmp_path / "seen", adapter, tmp_path / "expected")
    assert _same(_weights(one.out / "model"), _weights(tmp_path / "expected"))


@pytest.mark.slow
@pytest.mark.parametrize("wanted", ["original", "dequantized"])
def test_a_base_that_the_recipe_names_is_taken_and_measured(job, wanted):
    one = job(favour="original" if wanted == "dequantized" else "dequantized", base=wanted)
    facts = merge.run(one)
    assert (facts["merge_base"], list(facts["candidates"]), facts["merge_reason"]) == (wanted, [wanted], "")
    assert facts["nf4_noise"]["median"] > 0.01
    assert sorted(p.name for p in one.out.iterdir()) == ["model", "scores.npz"]


def test_lora_has_one_base_and_its_merge_is_the_trained_model(job):
    facts = merge.run(job(method="lora"))
    assert (facts["merge_base"], list(facts["candidates"]), facts["nf4_noise"]) == (
        "original",
        ["original"],
        None,
    )
    assert abs(facts["candidates"]["original"]["kld"]) < 1e-6


def test_a_dequantized_base_is_refused_for_lora_before_anything_runs():
    def step(method, wanted):
        trained = Step(train.STAGE, train.Train(method=method))
        return Step(merge.STAGE, merge.Merge(base=wanted), inputs={"train": trained})

    with pytest.raises(RecipeError, match=r'merge\.base is "dequantized", but train\.method is "lora"'):
        merge.STAGE.check(step("lora", "dequantized"), {})
    for method, wanted in (
        ("qlora", "dequantized"),
        ("qlora", "auto"),
        ("lora", "auto"),
        ("lora", "original"),
    ):
        merge.STAGE.check(step(method, wanted), {})


@pytest.mark.slow
def test_a_scale_that_got_lost_in_the_merge_is_found_by_the_check_of_the_weights(job, monkeypatch):
    honest = fold._blocks

    def half(entry, pair, transposed):
        from dataclasses import replace

        return honest(entry, replace(pair, scale=pair.scale / 2) if pair else None, transposed)

    monkeypatch.setattr(fold, "_blocks", half)
    one = job()
    with pytest.raises(ParityError, match=r"the merge is wrong: .* with a scale of 1 instead of 2"):
        merge.run(one)


@pytest.mark.parametrize(
    ("method", "wanted", "times"),
    [("qlora", "auto", 3), ("qlora", "dequantized", 2), ("qlora", "original", 1), ("lora", "auto", 1)],
)
def test_the_estimate_counts_every_checkpoint_that_stands_there_at_once(made, method, wanted, times):
    from edgeft.fit import training as sizes
    from edgeft.fit.shape import shape_of

    inputs = {
        "base": Step(base.STAGE, base.Base(path=made / "base" / "model")),
        "train": Step(train.STAGE, train.Train(method=method)),
    }
    need = merge.STAGE.estimate(Step(merge.STAGE, merge.Merge(base=wanted), inputs=inputs), {})
    assert need.disk_mb == times * sizes.checkpoint_mb(shape_of(made / "base" / "model"))
    assert need.ram_mb > 0
