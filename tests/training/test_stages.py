import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from edgeft.errors import DataError, RecipeError
from edgeft.stage import Artifact, Job, Step
from edgeft.stages import base, quantize_gguf, train, tune
from edgeft.training import Settings
from edgeft.training.rows import order, read_rows
from tests.training import tiny


@pytest.fixture
def job(tmp_path: Path):
    """Makes the train stage's Job over a tiny base and tiny data."""
    tiny.checkpoint(tmp_path / "base" / "model", dtype=torch.float16)
    data = tmp_path / "data"
    data.mkdir()
    for split, count, seed in (("train", 30, 0), ("heldout", 8, 1)):
        lines = [
            json.dumps({**asdict(row), "origin": "toy", "group": ""}) for row in tiny.rows(count, seed=seed)
        ]
        (data / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "out").mkdir()

    def made(**options):
        inputs = {
            "base": Artifact(train.STAGE, "b", tmp_path / "base", {}),
            "data": Artifact(train.STAGE, "d", data, {"end_of_turn_id": tiny.END}),
        }
        return Job(train.Train(learning_rate=1e-2, rank=4, **options), inputs, tmp_path / "out")

    return made


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    monkeypatch.setenv("EDGEFT_DEVICE", "cpu")


def test_a_trained_adapter_is_written_and_the_facts_fit_into_json(job):
    trained = job(epochs=1)
    facts = json.loads(json.dumps(train.run(trained)))
    assert all((trained.out / name).exists() for name in train.STAGE.makes)
    assert facts["method"] == "qlora"
    assert facts["steps"] == 4
    assert facts["adapted_layers"] == 21
    assert facts["optimizer"] == "adamw_torch"
    assert facts["heldout_loss"] < facts["heldout_loss_base"]
    assert facts["tokens"] == sum(len(row.ids) for row in tiny.rows(30))
    assert len(facts["curve"]) <= 60


def test_with_grid_merged_only_the_first_part_is_trained_and_the_rest_of_the_rows_is_left_for_tune(job):
    first = job(method="grid-merged", epochs=1, batch_size=4, grid_share=0.25)
    facts = json.loads(json.dumps(train.run(first)))
    assert (facts["method"], facts["steps"]) == ("lora", 6)
    rest = facts["rest"]
    assert (rest["rows"], rest["seen"], rest["rslora"]) == (30, 24, False)
    rows, whole = read_rows(first.inputs["data"].path / "train.jsonl"), Settings(**rest["settings"])
    seen = order(rows, total=rest["seen"], batch=4, seed=whole.seed)
    everything = order(rows, total=rest["rows"], batch=4, seed=whole.seed)
    assert everything[:24] == seen and sorted(everything) == list(range(30))
    assert facts["tokens"] == sum(len(rows[n].ids) for n in seen)


def test_the_other_methods_leave_nothing_for_tune(job):
    assert train.run(job(epochs=1, method="lora"))["rest"] is None


def test_a_share_that_leaves_a_part_without_a_step_is_refused(job):
    one = job(method="grid-merged", max_steps=2, grid_share=0.1)
    with pytest.raises(RecipeError, match="leaves 2 of 2 steps for the first part"):
        train.run(one)
    assert not list(one.out.iterdir())


def tuned(tmp_path, label, *, width):
    """The step `tune` in a plan whose base has rows of `width` weights."""
    changes = {"hidden_size": width, "intermediate_size": width}
    folder = tmp_path / f"width {width}"
    tiny.config("llama", **changes).save_pretrained(folder)
    above = {
        "base": Step(base.STAGE, base.Base(path=folder)),
        "train": Step(train.STAGE, train.Train(method="grid-merged")),
        "quantize/gguf": Step(quantize_gguf.STAGE, quantize_gguf.QuantizeGguf(type=label)),
    }
    return Step(tune.STAGE, tune.Tune(), inputs=above)


@pytest.mark.parametrize("label", ["Q8_0", "Q4_0", "Q4_K_M", "Q3_K_M", "Q2_K", "IQ4_XS", "IQ4_NL", "TQ2_0"])
def test_types_with_levels_can_be_trained_through(tmp_path, label):
    for width in (32, 256):
        tune.check(tuned(tmp_path, label, width=width), {})


@pytest.mark.parametrize(("label", "why"), [("F16", "no grid"), ("IQ2_M", "codebook"), ("IQ3_S", "codebook")])
def test_types_without_are_refused_with_those_that_can(tmp_path, label, why):
    with pytest.raises(RecipeError, match=rf'"{label}" cannot be trained through .*{why}') as e:
        tune.check(tuned(tmp_path, label, width=256), {})
    assert "Q4_K_M" in e.value.hint and "IQ4_XS" in e.value.hint and "F16" not in e.value.hint


def test_a_codebook_type_that_no_row_of_the_model_can_have_is_trained_in_what_it_falls_back_to(tmp_path):
    tune.check(tuned(tmp_path, "IQ3_S", width=96), {})
    with pytest.raises(RecipeError, match="cannot be trained through"):
        tune.check(tuned(tmp_path, "F16", width=96), {})


def test_rows_that_never_end_are_refused_before_the_first_step(job):
    one = job()
    one.inputs["data"].facts["end_of_turn_id"] = 63
    with pytest.raises(DataError, match="end-of-turn token 63"):
        train.run(one)
    assert not list(one.out.iterdir())


def test_an_optimizer_that_needs_a_gpu_is_refused_on_a_cpu(job):
    with pytest.raises(RecipeError, match="paged_adamw_8bit"):
        train.run(job(optimizer="paged_adamw_8bit"))


@pytest.mark.parametrize("name", ["lm_head", "model.embed_tokens"])
def test_embeddings_cannot_be_named_in_a_recipe(name):
    with pytest.raises(ValidationError, match="cannot be adapted"):
        train.Train(target_modules=[name])


def test_a_long_curve_is_thinned_but_keeps_every_heldout_loss():
    curve = [{"step": n, "loss": 1.0, **({"heldout_loss": 1.0} if n % 50 == 0 else {})} for n in range(1000)]
    thin = train.thin(curve, 60)
    assert len(thin) <= 61
    assert sum("heldout_loss" in point for point in thin) == 20
