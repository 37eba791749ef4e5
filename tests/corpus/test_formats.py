from __future__ import annotations

import json

import pytest

from edgeft.corpus import formats, sources
from edgeft.errors import DataError
from tests.corpus.models import write_jsonl


def load(tmp_path, *rows, **options):
    path = write_jsonl(tmp_path / "rows.jsonl", list(rows))
    system = options.pop("system", "")
    loaded = sources.load([sources.Source(path=path, **options)], system=system)[0]
    return loaded.form.name, [[(m.role, m.content) for m in row.messages] for row in loaded.rows]


def test_alpaca_joins_instruction_and_input_and_keeps_history_and_system(tmp_path):
    name, rows = load(
        tmp_path,
        {"instruction": " Add. ", "input": "1 and 2", "output": "3\r\n", "id": 7, "url": None},
        {
            "instruction": "Hi.",
            "input": "",
            "output": "Hello.",
            "history": [["a", "b"]],
            "system": "Be kind.",
        },
    )
    assert name == "alpaca"
    assert rows[0] == [("user", "Add.\n\n1 and 2"), ("assistant", "3")]
    assert [r for r, _ in rows[1]] == ["system", "user", "assistant", "user", "assistant"]


@pytest.mark.parametrize(
    ("question", "answer"),
    [("question", "answer"), ("prompt", "completion"), ("prompt", "response"), ("query", "response"),
     ("input", "output"), ("Question", "Answer"), ("problem", "solution"), ("user", "assistant"), ("q", "a")],
)  # fmt: skip
def test_usual_names_of_question_and_answer_columns_are_recognised(tmp_path, question, answer):
    name, rows = load(tmp_path, {"id": "1", question: "Why?", answer: 42, "extra": {"x": 1}})
    assert (name, rows) == ("qa", [[("user", "Why?"), ("assistant", "42")]])


def test_sharegpt_and_messages_are_told_apart_by_their_turns_not_by_the_columns_name(tmp_path):
    sharegpt = {"conversations": [{"from": "system", "value": "S"}, {"from": "human", "value": "Q"},
                                  {"from": "gpt", "value": "A"}]}  # fmt: skip
    messages = {"conversations": [{"role": "user", "content": [{"type": "text", "text": "Q"}]},
                                  {"role": "assistant", "content": "A"}]}  # fmt: skip
    assert load(tmp_path, sharegpt) == ("sharegpt", [[("system", "S"), ("user", "Q"), ("assistant", "A")]])
    assert load(tmp_path, messages) == ("messages", [[("user", "Q"), ("assistant", "A")]])
    assert load(tmp_path, {"dialog": json.dumps(messages["conversations"])})[0] == "messages"
    trl = {"prompt": messages["conversations"][:1], "completion": messages["conversations"][1:]}
    assert load(tmp_path, trl)[1] == [[("user", "Q"), ("assistant", "A")]]


def test_columns_and_format_named_in_the_recipe_win(tmp_path):
    row = {"question": "wrong", "answer": "wrong", "Frage": "Q", "Antwort": "A", "input": "more"}
    columns = formats.Columns(question="Frage", answer="Antwort")
    assert load(tmp_path, row, columns=columns)[1] == [[("user", "Q"), ("assistant", "A")]]
    with_input = formats.Columns(question="Frage", answer="Antwort", input="input")
    assert load(tmp_path, row, format="alpaca", columns=with_input)[1][0][0] == ("user", "Q\n\nmore")


def test_a_recipe_wide_system_prompt_yields_to_a_rows_own(tmp_path):
    own, plain = {"question": "Q", "answer": "A", "system": "own"}, {"question": "Q", "answer": "A"}
    _, rows = load(tmp_path, plain, own, {**plain, "system": None}, system="all")
    assert [r[0] for r in rows] == [("system", "all"), ("system", "own"), ("system", "all")]


def test_an_unknown_format_names_the_columns_and_what_would_do(tmp_path):
    with pytest.raises(DataError, match="columns are text, label") as e:
        load(tmp_path, {"text": "x", "label": 1})
    assert "instruction/input/output" in e.value.hint and "columns = {" in e.value.hint
    with pytest.raises(DataError, match="no column 'Frage'"):
        load(tmp_path, {"text": "x"}, columns=formats.Columns(question="Frage"))


@pytest.mark.parametrize(
    ("turn", "says"),
    [
        ({"from": "narrator", "value": "x"}, "turn 2 of `conversations` is by 'narrator'"),
        ({"from": "gpt"}, "turn 2 of `conversations` has no `value`"),
        ({"from": "gpt", "value": 3}, "turn 2 of `conversations` must be text"),
        ("x", "turn 2 of `conversations` must be an object"),
    ],
)
def test_a_wrong_turn_is_named_by_file_line_and_turn(tmp_path, turn, says):
    good = {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]}
    bad = {"conversations": [good["conversations"][0], turn]}
    with pytest.raises(DataError) as e:
        load(tmp_path, good, bad)
    assert f"rows.jsonl:2: {says}" in str(e.value)


def test_a_row_without_its_answer_column_is_malformed(tmp_path):
    with pytest.raises(DataError, match=r"rows.jsonl:2: has no `answer`"):
        load(tmp_path, {"question": "Q", "answer": "A"}, {"question": "Q"})
