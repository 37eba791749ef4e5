from __future__ import annotations

import pytest

from edgeft.corpus import rules
from edgeft.corpus.conversation import Conversation, Message

PROSE = (
    "The heart is a muscle that pumps blood through the body. It has four chambers, two above and two below. "
    "Valves between them keep the blood from flowing back. The left side is stronger, since it pushes blood "
)


def row(*turns: str, roles: str = "uauaua"):
    names = {"u": "user", "a": "assistant", "s": "system"}
    said = tuple(Message(role=names[r], content=t) for r, t in zip(roles, turns, strict=False))
    return Conversation(messages=said, origin="x:1")


@pytest.mark.parametrize(
    "answer", ["ok", "OK.", "嗯嗯", "嗯，", "n/a", "N/A", "...", "？！", "aaaa", "好的。", "null", "—"]
)
def test_junk_answers_are_found(answer):
    assert rules.junk(answer)


@pytest.mark.parametrize(
    "answer", ["Yes.", "no", "42", "-7", "Aspirin", "AAA", "不是", "贫血", "B", "👍", "1111", "C#"]
)
def test_short_answers_that_say_something_are_not_junk(answer):
    assert not rules.junk(answer)


@pytest.mark.parametrize(
    "answer",
    [
        PROSE + "through the whole of the long way to the toes and back",
        PROSE + "on,",
        "The heart is a muscle and",
        "The causes are (",
        "Use it so:\n```python\nprint(1)\n",
        "心脏是一个肌肉器官，它的主要功能是，",
    ],
)
def test_answers_that_stop_in_mid_sentence_are_found(answer):
    assert rules.truncated(answer)


@pytest.mark.parametrize(
    "answer",
    [
        "Aspirin",
        "vitamin A",
        PROSE + "on.",
        PROSE + 'on." [3]',
        PROSE + "on.\n\n- a list item without a full stop that goes on for quite a number of words",
        PROSE
        + "Symptoms: - Fever - Cough - Pain in the chest - Feeling tired and weak for many weeks or months",
        PROSE + "See\nhttps://example.org/a/very/long/address/of/a/page/about/the/heart",
        "def f():\n    return 1",
        "Dear Ann, thank you for all.\n\nYours sincerely,",
        "Use it so:\n```python\nprint(1)\n```",
        "72",
        "心脏是一个肌肉器官。",
    ],
)
def test_complete_answers_are_not_taken_for_truncated(answer):
    assert not rules.truncated(answer)


def test_turns_must_alternate_and_end_with_an_answer():
    assert not rules.turns(row("q", "a", "q", "a"))
    assert not rules.turns(row("s", "q", "a", roles="sua"))
    for roles in ("a", "au", "u", "uaa", "uau", "usa", "s"):
        assert rules.turns(row("x", "x", "x", "x", roles=roles)), roles


def test_empty_texts_are_found_also_when_only_invisible():
    assert rules.empty(row("q", " \u200b\n")) and rules.empty(row("", "a"))
    assert not rules.empty(row("", "q", "a", roles="sua"))


def test_an_answer_that_begins_with_its_question_is_found():
    assert rules.repeats_question(row("What is the heart?", "What is the heart? A muscle."))
    assert not rules.repeats_question(row("What is the heart?", "The heart is a muscle."))


def test_a_rule_set_to_keep_drops_nothing():
    junk = row("q", "ok")
    assert [r for r, _ in rules.broken_rules(junk, rules.Filters())] == ["junk"]
    assert not list(rules.broken_rules(junk, rules.Filters(junk="keep")))
