from __future__ import annotations

import json

import pytest

from edgeft.corpus import reading, sources
from edgeft.errors import DataError
from tests.corpus.models import pair, write_jsonl


def read(path, **options):
    return [(r.origin, r.columns, r.problem) for r in reading.read(path, **options)]


def test_lines_lists_and_lists_inside_an_object_give_the_same_rows_with_their_lines(tmp_path):
    rows = [{"a": "1\u2028x"}, {"a": "zwei"}]
    write_jsonl(tmp_path / "l.jsonl", rows)
    (tmp_path / "list.json").write_text(json.dumps(rows, indent=1))
    (tmp_path / "object.json").write_text(json.dumps({"version": {"x": [1]}, "data": rows}, indent=1))
    (tmp_path / "lines.json").write_text((tmp_path / "l.jsonl").read_text())
    (tmp_path / "one.json").write_text(json.dumps({"data": rows}))
    assert [o for o, _, _ in read(tmp_path / "l.jsonl")] == ["l.jsonl:1", "l.jsonl:2"]
    assert [o for o, _, _ in read(tmp_path / "list.json")] == ["list.json:2", "list.json:5"]
    assert [o for o, _, _ in read(tmp_path / "object.json")] == ["object.json:8", "object.json:11"]
    for name in ("l.jsonl", "list.json", "object.json", "lines.json", "one.json"):
        assert [c for _, c, _ in read(tmp_path / name)] == rows, name


def test_a_byte_order_mark_and_blank_lines_do_no_harm(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n\r\n{"a": 2}\r\n')
    assert [o for o, _, _ in read(tmp_path / "a.jsonl")] == ["a.jsonl:1", "a.jsonl:3"]


def test_table_rows_carry_the_line_they_start_on(tmp_path):
    (tmp_path / "t.csv").write_text('question;answer\n"two\nlines";b\n\nc;d\n')
    (tmp_path / "t.tsv").write_text("question\tanswer\na, b\tc\n")
    assert [(o, c["question"]) for o, c, _ in read(tmp_path / "t.csv")] == [
        ("t.csv:2", "two\nlines"),
        ("t.csv:5", "c"),
    ]
    assert read(tmp_path / "t.tsv")[0][1] == {"question": "a, b", "answer": "c"}


def test_parquet_and_saved_datasets_are_read(tmp_path):
    import datasets

    rows = [pair(n) for n in range(3)]
    saved = datasets.Dataset.from_list(rows)
    saved.to_parquet(tmp_path / "p.parquet")
    saved.save_to_disk(tmp_path / "disk")
    datasets.DatasetDict({"train": saved, "test": saved.select([0])}).save_to_disk(tmp_path / "dict")
    assert [c for _, c, _ in read(tmp_path / "p.parquet")] == rows
    assert [c for _, c, _ in read(tmp_path / "disk")] == rows
    assert [o for o, _, _ in read(tmp_path / "dict", split="test")] == ["dict:1"]
    with pytest.raises(DataError, match="no split 'dev'") as e:
        read(tmp_path / "dict", split="dev")
    assert "test, train" in e.value.hint


def test_a_folder_gives_only_the_files_of_its_split(tmp_path):
    for name in ("train-00001.jsonl", "train-00000.jsonl", "test.jsonl"):
        write_jsonl(tmp_path / name, [{"a": name}])
    assert [c["a"] for _, c, _ in read(tmp_path)] == ["train-00000.jsonl", "train-00001.jsonl"]
    assert [c["a"] for _, c, _ in read(tmp_path, split="test")] == ["test.jsonl"]


def test_every_malformed_row_is_named_by_file_and_line(tmp_path):
    good = json.dumps(pair(1))
    (tmp_path / "bad.jsonl").write_bytes(
        f'{good}\n{good[:-3]}\n[1]\n{good}\n{{"question": ["x"], "answer": "y"}}\n'.encode()
        + b'{"question": "\xff", "answer": "y"}\n'
    )
    (tmp_path / "bad.csv").write_text("question,answer\na,b\na,b,c\n")
    with pytest.raises(DataError) as e:
        sources.load([sources.Source(path=tmp_path / n) for n in ("bad.jsonl", "bad.csv")])
    message = str(e.value)
    assert message.startswith("5 rows are malformed:")
    for named in ("bad.jsonl:2: not JSON", "bad.jsonl:3: a row must be", "bad.jsonl:5: `question` must be text",
                  "bad.jsonl:6: not UTF-8", "bad.csv:3: has 3 fields where the header has 2"):  # fmt: skip
        assert named in message
    assert "bad.jsonl:1" not in message and "bad.jsonl:4" not in message


def test_a_broken_list_is_named_by_the_line_where_it_breaks(tmp_path):
    (tmp_path / "bad.json").write_text(
        '[\n{"question": "a", "answer": "b"},\n{"question": "a" "answer": "b"}\n]\n'
    )
    with pytest.raises(DataError, match=r"bad.json:3: not JSON"):
        sources.load([sources.Source(path=tmp_path / "bad.json")])


def test_only_the_first_malformed_rows_are_listed(tmp_path):
    (tmp_path / "bad.jsonl").write_text(json.dumps(pair(0)) + "\n" + "{\n" * 50)
    with pytest.raises(DataError, match=r"10 rows are malformed .*and perhaps more"):
        sources.load([sources.Source(path=tmp_path / "bad.jsonl")])


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("a.xlsx", "x", "does not read .xlsx"),
        ("a.jsonl", "", "holds no rows"),
        ("a.json", '{"x": 1}', "one JSON object without a list"),
        ("a.parquet", "x", "not a Parquet file"),
    ],
)
def test_a_file_that_holds_no_rows_is_refused(tmp_path, name, text, says):
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=says):
        sources.load([sources.Source(path=tmp_path / name)])


def test_a_dataset_that_cannot_be_had_is_one_sentence(monkeypatch):
    import datasets
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=r"dataset 'nobody/nothing' .* cannot be loaded") as e:
        sources.load([sources.Source(dataset="nobody/nothing", revision="0" * 40)])
    assert "\n" not in str(e.value)
