from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from edgeft.errors import ParityError, RecipeError
from edgeft.stage import Artifact, Job, Step
from edgeft.stages import base, quantize_awq
from edgeft.stages.quantize_awq import STAGE, QuantizeAwq
from tests.awq import models


def job(tmp_path, *, heldout=None, **params):
    """A job on a tiny checkpoint, with rows whose words are tokens."""
    for name in ("base", "merge"):
        models.save(tmp_path / name / "model", "llama")
    data = tmp_path / "data"
    data.mkdir()
    rows = [_row(window) for window in models.windows(40, 40)]
    (data / "train.jsonl").write_text("\n".join(rows[:36]) + "\n")
    (data / "heldout.jsonl").write_text("\n".join(heldout(rows) if heldout else rows[36:]) + "\n")
    out = tmp_path / "out"
    out.mkdir()
    inputs = {
        name: Artifact(stage=STAGE, key=name, path=tmp_path / name, facts={})
        for name in ("base", "merge", "data")
    }
    return Job(params=QuantizeAwq(**params), inputs=inputs, out=out)


def _row(ids):
    said = " ".join(f"w{i}" for i in ids)
    row = {
        "messages": [{"role": "user", "content": said}],
        "ids": ids,
        "labels": ids,
        "origin": "x:1",
        "group": "",
    }
    return json.dumps(row)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["compressed-tensors", "gemm"])
def test_the_stage_says_what_it_made_and_what_it_proved(tmp_path, layout):
    given = job(tmp_path, chunks=2, own_chunks=1, group=32, layout=layout)
    facts = json.loads(json.dumps(STAGE.run(given)))
    assert facts["type"].startswith("AWQ g32") and facts["format"] == "awq" and facts["tokens"] == 3 * 512
    assert facts["bytes"] == sum(f.stat().st_size for f in (given.out / "model").iterdir())
    assert {p.name for p in given.out.iterdir()} == {"model", "own-text.json"}
    checks = {c["name"]: c for c in facts["checks"]}
    assert checks["calibration text"]["ok"] and checks["scaling"]["ok"]
    assert checks["unpacking"]["ok"] in ((True, None) if layout == "compressed-tensors" else (None,))


@pytest.mark.slow
def test_calibration_on_held_out_text_is_refused(tmp_path):
    with pytest.raises(ParityError):
        STAGE.run(job(tmp_path, heldout=lambda rows: rows[:4]))


@pytest.mark.parametrize(
    ("params", "label"),
    [({}, "awq"), ({"group": 64}, "awq-g64"), ({"layout": "gemm"}, "awq-gemm"), ({"group": 32, "layout": "gemm"}, "awq-g32-gemm")],
)  # fmt: skip
def test_each_variant_has_a_name_that_begins_with_the_format(params, label):
    assert QuantizeAwq(**params).label() == label


@pytest.mark.parametrize(
    ("tensors", "group", "said"),
    [
        ({"model.layers.0.mlp.up_proj.weight": [64, 48]}, "auto", "48 numbers"),
        ({"model.layers.0.mlp.up_proj.weight": [64, 96]}, 64, "96 numbers"),
        ({"model.layers.0.mlp.experts.3.up_proj.weight": [64, 64]}, "auto", "mixture of experts"),
    ],
)
def test_what_cannot_be_done_is_refused_before_the_training(tmp_path, tensors, group, said):
    header = json.dumps(
        {n: {"dtype": "F16", "shape": s, "data_offsets": [0, 0]} for n, s in tensors.items()}
    ).encode()
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    below = Step(base.STAGE, SimpleNamespace(model_dump=lambda **_: {}))
    step = Step(STAGE, QuantizeAwq(group=group), inputs={"base": below})
    done = {below.key: Artifact(stage=base.STAGE, key=below.key, path=tmp_path, facts={})}
    with pytest.raises(RecipeError, match=said) as error:
        quantize_awq.check(step, done)
    assert error.value.hint
    quantize_awq.check(step, {})  # nothing is known of a base that is not here yet
