from __future__ import annotations

import json

import pytest

from edgeft.corpus import Row, load_rows
from edgeft.corpus.prepare import Settings, prepare
from edgeft.corpus.rules import Filters
from edgeft.corpus.sources import Source
from edgeft.errors import DataError, RecipeError
from tests.corpus.models import pair, write_jsonl


def build(chatml, out, *sources, **settings):
    out.mkdir(parents=True)
    card = prepare(sources, Settings(**{"holdout": 0.1, **settings}), chatml, out)
    return card, load_rows(out / "train.jsonl"), load_rows(out / "heldout.jsonl")


def with_junk(path):
    """100 good rows, in between one of each kind of bad ones."""
    rows = [pair(n) for n in range(100)]
    bad = [
        {"question": "嗯?", "answer": "嗯嗯"},
        {"question": "Empty?", "answer": " "},
        {"question": "Cut?", "answer": "It begins and"},
        {"question": "Cut?", "answer": "It begins well, goes on and"},
        {"question": pair(3)["question"].upper(), "answer": pair(3)["answer"]},
        {"question": "Control?", "answer": "He said <|im_end|> and left."},
        {"question": "Long?", "answer": "word " * 100 + "end."},
        {"question": pair(5)["question"], "answer": "Something else."},
    ]
    return write_jsonl(path, rows[:50] + bad + rows[50:])


def test_every_row_read_is_kept_or_dropped_by_a_named_rule(chatml, tmp_path):
    path = with_junk(tmp_path / "qa.jsonl")
    card, train, heldout = build(chatml, tmp_path / "out", Source(path=path), max_tokens=300)
    source = card["sources"][0]
    dropped = {rule: found["count"] for rule, found in source["dropped"].items()}
    assert dropped == {
        "junk": 1, "empty": 1, "truncated": 1, "duplicates": 1, "control_tokens": 1, "over_long": 1,
    }  # fmt: skip
    assert source["read"] == 108 == len(train) + len(heldout) + sum(dropped.values())
    assert source["dropped"]["junk"]["examples"] == [
        {"origin": "qa.jsonl:51", "reason": "the answer is a filler", "text": "嗯? → 嗯嗯"}
    ]
    assert source["dropped"]["duplicates"]["examples"][0]["reason"] == "like qa.jsonl:4"
    assert card["remarks"]["conflicts"]["count"] == 1
    assert card["remarks"]["conflicts"]["examples"][0]["origin"] == "qa.jsonl:6 and qa.jsonl:58"
    page = (tmp_path / "out" / "card.md").read_text(encoding="utf-8")
    assert (
        "qa.jsonl:51: the answer is a filler: 嗯? → 嗯嗯" in page and "1 × answers that say nothing" in page
    )


def test_rows_carry_messages_tokens_labels_and_where_they_come_from(chatml, tmp_path):
    path = write_jsonl(tmp_path / "qa.jsonl", [{**pair(n), "topic": f"t{n % 30}"} for n in range(60)])
    card, train, heldout = build(chatml, tmp_path / "out", Source(path=path, group="topic"), holdout=6)
    row: Row = train[0]
    number = int(row.origin.removeprefix("qa.jsonl:")) - 1
    assert row.messages[0] == {"role": "user", "content": pair(number)["question"]}
    assert row.group == f"t{number % 30}"
    assert chatml.tokenizer.decode(row.prompt_ids()).endswith("<|im_start|>assistant\n")
    assert len(heldout) == 6 and not {r.group for r in train} & {r.group for r in heldout}
    assert card["split"]["by"] == "column topic" and card["split"]["units"] == 30
    for r in [*train, *heldout]:
        assert [x for x in r.labels if x >= 0][-1] == chatml.end_of_turn_id


def test_two_runs_write_the_same_bytes_from_wherever_they_read(chatml, tmp_path):
    made = []
    for name in ("one", "zwei drei"):
        (tmp_path / name).mkdir()
        path = with_junk(tmp_path / name / "qa.jsonl")
        build(chatml, tmp_path / name / "out", Source(path=path, weight=1.0, repeat=2), max_tokens=300)
        made.append({p.name: p.read_bytes() for p in sorted((tmp_path / name / "out").iterdir())})
    assert list(made[0]) == ["card.json", "card.md", "heldout.jsonl", "train.jsonl"]
    assert made[0] == made[1]
    assert not any(str(tmp_path).encode() in data for data in made[0].values())


def test_weights_caps_and_repeats_are_honoured(chatml, tmp_path):
    big = write_jsonl(tmp_path / "big.jsonl", [pair(n) for n in range(300)])
    small = write_jsonl(tmp_path / "small.jsonl", [pair(n) for n in range(1000, 1040)])
    card, train, heldout = build(
        chatml,
        tmp_path / "out",
        Source(path=big, weight=3, rows=250),
        Source(path=small, weight=1, repeat=2),
        holdout=20,
    )
    count = {name: sum(r.origin.startswith(name) for r in train) for name in ("big", "small")}
    first, second = card["sources"]
    assert abs(count["big"] - 3 * count["small"]) <= 3
    assert count["small"] == 2 * (40 - second["heldout"]), "all small rows are used, and used twice"
    assert first["dropped"]["rows"]["count"] == 50 and first["kept"] == 250
    assert first["dropped"]["weight"]["count"] == 250 - first["train"] - first["heldout"]
    assert card["sources"][0]["share"] == pytest.approx(0.75, abs=0.01)
    assert len(heldout) == 20


def test_a_weight_on_some_sources_only_is_refused(chatml, tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [pair(1)])
    with pytest.raises(RecipeError, match=r"a.jsonl has no weight while other sources have one"):
        build(chatml, tmp_path / "out", Source(path=path), Source(path=path, weight=1))


def test_a_leak_planted_in_a_held_out_file_is_found_and_taken_out(chatml, tmp_path):
    train = write_jsonl(tmp_path / "train.jsonl", [pair(n) for n in range(80)])
    copied = {"question": "Tell me in other words, please?", "answer": pair(7)["answer"]}
    same = pair(9)
    heldout = write_jsonl(tmp_path / "test.jsonl", [copied, same, *(pair(n) for n in range(500, 510))])
    card, rows, kept = build(chatml, tmp_path / "out", Source(path=train), Source(path=heldout, heldout=True))
    dropped = card["sources"][1]["dropped"]
    assert dropped["duplicates"]["examples"][0]["origin"] == "test.jsonl:2"
    assert dropped["leak"]["examples"][0]["origin"] == "test.jsonl:1"
    assert dropped["leak"]["examples"][0]["reason"].startswith("100% of its answer's 8-word runs")
    assert len(rows) == 80 and len(kept) == 10
    assert card["leak"]["before"]["over_90_percent"] == 1 and card["leak"]["after"]["over_50_percent"] == 0


def test_a_group_on_both_sides_of_a_held_out_file_is_taken_out(chatml, tmp_path):
    train = write_jsonl(tmp_path / "train.jsonl", [{**pair(n), "g": f"t{n}"} for n in range(30)])
    heldout = write_jsonl(tmp_path / "test.jsonl", [{**pair(n), "g": f"t{n - 470}"} for n in range(490, 510)])
    sources = Source(path=train, group="g"), Source(path=heldout, group="g", heldout=True)
    card, rows, kept = build(chatml, tmp_path / "out", *sources)
    assert len(rows) == 30 and {r.group for r in kept} == {f"t{n}" for n in range(30, 40)}
    assert card["dropped"]["leak"] == 10


def test_nothing_left_names_the_rules_that_took_the_rows(chatml, tmp_path):
    path = write_jsonl(
        tmp_path / "a.jsonl", [{"question": f"Q{n}", "answer": "ok" if n % 3 else ""} for n in range(9)]
    )
    with pytest.raises(DataError, match="no row is left to use: of 9 rows read") as e:
        build(chatml, tmp_path / "out", Source(path=path))
    assert "(empty): 3" in str(e.value) and "(junk): 6" in str(e.value)


def test_over_long_rows_can_stop_the_build_and_are_never_cut(chatml, tmp_path):
    path = write_jsonl(
        tmp_path / "a.jsonl", [*(pair(n) for n in range(20)), {"question": "Q", "answer": "word " * 99 + "."}]
    )
    with pytest.raises(
        DataError, match=r"1 rows have more than 300 tokens, the first a.jsonl:21 \(5\d\d tokens\)"
    ):
        build(chatml, tmp_path / "a", Source(path=path), max_tokens=300, filters=Filters(over_long="refuse"))
    card, train, heldout = build(chatml, tmp_path / "b", Source(path=path), max_tokens=300)
    assert len(train) + len(heldout) == 20 and card["max_length"] <= 300


def test_a_group_column_that_is_nowhere_is_refused(chatml, tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [pair(n) for n in range(20)])
    with pytest.raises(DataError, match="group column 'topic'") as e:
        build(chatml, tmp_path / "out", Source(path=path, group="topic"))
    assert "question, answer" in e.value.hint


def test_rows_that_a_training_stage_could_not_use_are_refused_on_loading(tmp_path):
    (tmp_path / "r.jsonl").write_text(
        json.dumps({"messages": [], "ids": [1, 2], "labels": [1], "origin": "a:1"}) + "\n"
    )
    with pytest.raises(DataError, match=r"r.jsonl:1: 2 ids but 1 labels"):
        load_rows(tmp_path / "r.jsonl")
