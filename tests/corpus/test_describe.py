from __future__ import annotations

import tomllib

import pytest

from edgeft.corpus.describe import describe, recipe_for
from edgeft.errors import DataError
from edgeft.recipe import load
from tests.conftest import SHARED
from tests.corpus.models import pair, write_jsonl


def test_a_data_file_is_described_without_a_model(tmp_path):
    rows = [{**pair(n), "id": n, "focus": f"f{n // 2}", "kind": "x"} for n in range(300)]
    path = write_jsonl(
        tmp_path / "qa.jsonl", [*rows, {"question": "Q", "answer": "ok", "id": 1, "focus": "z", "kind": ""}]
    )
    found = describe(path)
    assert (found.form.name, found.rows, found.group, found.dropped) == ("qa", 301, "focus", {"junk": 1})
    assert found.columns == ("question", "answer", "id", "focus", "kind")
    assert found.max_tokens == 128 and found.laptop_rows == 301


def test_a_column_that_says_nothing_about_rows_is_no_group(tmp_path):
    rows = [{**pair(n), "id": f"id{n}", "kind": "ab"[n % 2], "url": None} for n in range(300)]
    assert describe(write_jsonl(tmp_path / "qa.jsonl", rows)).group == ""


def test_the_written_recipe_loads_and_names_its_data_relative_to_itself(tmp_path):
    (tmp_path / "my data").mkdir()
    odd = {'a "b"\n[train]': "x"}
    path = write_jsonl(tmp_path / "my data" / "ärzte.jsonl", [{**pair(n), **odd} for n in range(120)])
    recipe = tmp_path / "ärzte.toml"
    recipe.write_text(recipe_for(path, recipe), encoding="utf-8")
    document = tomllib.loads(recipe.read_text(encoding="utf-8"))
    assert document["data"]["sources"] == [
        {
            "path": "my data/ärzte.jsonl",
            "format": "qa",
            "columns": {"question": "question", "answer": "answer"},
        }
    ]
    tables = load(recipe)
    data = next(p for s, p in tables.rows if s.name == "data")
    assert data.sources[0].path == path and tables.target == "laptop"
    assert [p.type for s, p in tables.rows if s.name == "quantize"] == ["Q8_0", "Q5_K_M"]


def test_malformed_rows_are_written_into_the_recipe_as_comments(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [pair(n) for n in range(5)])
    path.write_text(path.read_text() + "{\n")
    text = recipe_for(path)
    assert "# a.jsonl:6: not JSON" in text and tomllib.loads(text)["data"]["sources"][0]["path"] == "a.jsonl"


def test_a_file_that_is_no_data_is_refused(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        recipe_for(tmp_path / "none.jsonl")
    (tmp_path / "a.jsonl").write_text("hello\n")
    with pytest.raises(DataError, match=r"a.jsonl:1: not JSON"):
        recipe_for(tmp_path / "a.jsonl")


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data files are not here")
@pytest.mark.parametrize(
    ("name", "group"), [("wordnet_medical_qa", "focus"), ("medquad_val", "focus"), ("meqsum", "")]
)
def test_real_files_are_recognised(name, group):
    found = describe(SHARED / f"{name}.jsonl")
    assert found.form.name == "alpaca" and found.group == group and not found.malformed
