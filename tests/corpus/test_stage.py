"""The data stage as a build runs it."""

from __future__ import annotations

import json
import time

import pytest
from pydantic import ValidationError

from edgeft.corpus import load_rows
from edgeft.errors import DataError
from edgeft.recipe import load
from edgeft.stage import Artifact, Job, Step
from edgeft.stages import base, data
from tests.conftest import SHARED
from tests.corpus.models import pair, write_jsonl


def params(folder, **table):
    return data.Data.model_validate(table, context={"base": folder})


def job(model, out, table):
    out.mkdir()
    made = Artifact(base.STAGE, "k", model.parent, {})
    return Job(table, {"base": made}, out)


def test_the_stage_makes_its_files_and_says_what_others_need(model, chatml, tmp_path):
    write_jsonl(tmp_path / "qa.jsonl", [pair(n) for n in range(60)])
    (tmp_path / "LICENSE.txt").write_text("as is")
    table = params(tmp_path, source="qa.jsonl", holdout=0.1, licence="CC0-1.0", notice="LICENSE.txt")
    facts = data.run(job(model, tmp_path / "out", table))
    for name in data.STAGE.makes:
        assert (tmp_path / "out" / name).is_file()
    assert facts["rows"] == {"train": 54, "heldout": 6} and facts["end_of_turn_id"] == chatml.end_of_turn_id
    assert (
        facts["source"] == "qa.jsonl"
        and facts["licence"] == "CC0-1.0"
        and facts["end_of_turn"] == "<|im_end|>"
    )
    assert (tmp_path / "out" / "NOTICE-data-1-LICENSE.txt").read_text() == "as is"
    assert facts["supervised_tokens"]["train"] == sum(
        r.supervised for r in load_rows(tmp_path / "out" / "train.jsonl")
    )
    assert json.loads(json.dumps(facts)) == facts


def test_the_key_follows_the_contents_of_every_source_and_not_its_name(tmp_path):
    def key(name):
        table = params(tmp_path, sources=[{"path": name}])
        return Step(data.STAGE, table).key

    write_jsonl(tmp_path / "a.jsonl", [pair(1)])
    write_jsonl(tmp_path / "b.jsonl", [pair(1)])
    assert key("a.jsonl") == key("b.jsonl")
    before = key("a.jsonl")
    write_jsonl(tmp_path / "a.jsonl", [pair(2)])
    assert key("a.jsonl") != before


@pytest.mark.parametrize(
    ("table", "says"),
    [
        ({}, "name the data"),
        ({"source": "a.jsonl", "sources": [{"path": "a.jsonl"}]}, "not both"),
        ({"sources": [{}]}, "either `path` or `dataset`"),
        ({"sources": [{"dataset": "a/b"}]}, "needs a `revision`"),
        ({"sources": [{"dataset": "a/b", "revision": "main"}]}, "pattern"),
        ({"source": "none.jsonl"}, "does not exist"),
        ({"source": "a.jsonl", "holdout": 0}, "greater than 0"),
        (
            {"holdout": 5, "sources": [{"path": "a.jsonl"}, {"path": "a.jsonl", "split": "heldout"}]},
            "exclude each other",
        ),
        ({"sources": [{"path": "a.jsonl", "repeat": 3}]}, "only makes sense with a `weight`"),
    ],
)
def test_tables_that_contradict_themselves_are_refused(tmp_path, table, says):
    write_jsonl(tmp_path / "a.jsonl", [pair(1)])
    with pytest.raises(ValidationError, match=says):
        params(tmp_path, **table)


def test_a_malformed_row_is_refused_before_anything_runs(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [pair(1), {"question": "Q"}])
    step = Step(data.STAGE, params(tmp_path, source="a.jsonl"))
    with pytest.raises(DataError, match=r"a.jsonl:2: has no `answer`"):
        data.check(step, {})
    data.check(step, {step.key: Artifact(data.STAGE, step.key, tmp_path, {})})  # made already
    write_jsonl(path, [pair(1), pair(2)])
    data.check(Step(data.STAGE, params(tmp_path, source="a.jsonl")), {})


def test_a_recipes_nested_tables_are_read(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [pair(1)])
    (tmp_path / "r.toml").write_text(
        '[data]\nholdout = 20\n[[data.sources]]\npath = "a.jsonl"\nweight = 0.8\ncolumns = { question = "question" }\n'
        '[data.filters]\njunk = "keep"\n'
    )
    read = load(tmp_path / "r.toml", stages=[data.STAGE]).rows[0][1]
    assert read.holdout == 20 and read.filters.junk == "keep"
    assert read.plain_sources()[0].columns.question == "question" and read.plain_sources()[0].weight == 0.8


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data files are not here")
def test_real_medical_data_is_prepared_within_seconds_and_the_known_leak_is_found(model, tmp_path):
    started = time.process_time()
    facts = data.run(job(model, tmp_path / "wordnet", params(SHARED, source="wordnet_medical_qa.jsonl")))
    assert time.process_time() - started < 40, "20 s on an idle core"
    assert facts["rows"] == {"train": 4022, "heldout": 212} and facts["leak"]["max"] < 0.5

    table = params(SHARED, max_tokens=8192, group="focus", filters={"truncated": "keep"}, sources=[
        {"path": "medquad_train.jsonl"}, {"path": "medquad_val.jsonl", "split": "heldout"}])  # fmt: skip
    data.run(job(model, tmp_path / "medquad", table))
    leak = json.loads((tmp_path / "medquad" / "card.json").read_text())["leak"]
    # The data's own notes count 46 held-out answers with half of their 8-grams in train, 11 with nine tenths.
    assert (leak["before"]["over_50_percent"], leak["before"]["over_90_percent"]) == (46, 11)
    assert leak["after"]["over_50_percent"] == 0
