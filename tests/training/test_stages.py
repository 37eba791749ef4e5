import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from edgeft.errors import DataError, RecipeError
from edgeft.stage import Artifact, Job
from edgeft.stages import train
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
