from __future__ import annotations

import pytest

from edgeft.corpus import duplicates, split
from edgeft.corpus.conversation import Conversation, Message
from edgeft.errors import DataError
from tests.corpus.models import pair

LONG = "This condition is inherited in an autosomal recessive pattern, which means both copies of the gene in each cell have mutations."


def row(question: str, answer: str, *, group: str = "", source: int = 0):
    said = (Message(role="user", content=question), Message(role="assistant", content=answer))
    return Conversation(messages=said, origin="x:1", group=group, source=source)


def unrelated(count: int, start: int = 0):
    return [row(*pair(n).values()) for n in range(start, start + count)]


def test_exact_duplicates_ignore_case_and_white_space_but_not_operators():
    rows = [row("What is 2 + 3?", "5"), row("what is  2 + 3?", "5"), row("What is 2 - 3?", "5")]
    assert duplicates.exact(rows) == {1: 0}


def test_near_duplicates_are_found_in_words_and_in_chinese():
    chinese = "心脏是位于胸腔中部偏左的肌肉器官，它通过有节律的收缩把血液输送到全身各处的组织和器官。"
    rows = [
        row("How is Danon disease inherited?", f"{LONG} {pair(1)['answer']} {pair(2)['answer']}"),
        row("How is Danon disease inherited, please?", f"{LONG} {pair(1)['answer']}, {pair(2)['answer']}"),
        row("心脏是什么？", chinese),
        row("心脏是什么呢？", chinese),
    ]
    assert duplicates.near(rows, 0.8) == {1: 0, 3: 2}


def test_one_answer_to_two_questions_and_other_numbers_are_no_near_duplicates():
    dose = "Take the tablets with a full glass of water in the morning, at the latest one hour before the first meal: {} mg."
    rows = [
        row("How is Danon disease inherited?", LONG * 3),
        row("Is the Alport syndrome passed on to children?", LONG * 3),
        row("What is the dose?", dose.format(5)),
        row("What is the dose?", dose.format(50)),
    ]
    assert duplicates.near(rows, 0.8) == {}


def test_rows_that_share_a_question_or_half_a_text_are_one_cluster():
    rows = [row("A?", "one"), row("a", "another thing"), row("B?", LONG), row("C?", f"{LONG} It is rare."), row("D?", "yes"),
            row("E?", "yes")]  # fmt: skip
    found = duplicates.clusters(rows)
    assert found == [0, 0, 2, 2, 4, 5]


def test_conflicting_answers_are_reported():
    assert duplicates.conflicts([row("A?", "one"), row("B?", "x"), row("a?", "two"), row("A?", "One")]) == [
        (0, 2)
    ]


def test_no_group_stands_on_both_sides():
    rows = [row(*pair(n).values(), group=f"g{n % 20}") for n in range(100)]
    units = [r.group for r in rows]
    found = split.split(rows, units, holdout=0.2, seed=3)
    assert len(found.heldout) == 20 and found.heldout_units == 4
    assert not {units[i] for i in found.train} & {units[i] for i in found.heldout}
    assert sorted([*found.train, *found.heldout]) == list(range(100))


def test_a_split_depends_on_the_seed_and_hardly_on_added_rows():
    rows = unrelated(200)
    units = [str(i) for i in range(200)]

    def held(count, seed=0):
        found = split.split(rows[:count], units[:count], holdout=0.1, seed=seed)
        return {rows[i].question for i in found.heldout}

    assert held(190) == held(190) != held(190, seed=1)
    assert len(held(190) - held(200)) <= 3


def test_boilerplate_that_joins_rows_is_trained_on_and_not_held_out():
    rows = [
        *unrelated(60),
        *(row(f"Is disease {n} inherited?", f"{pair(n)['answer'][:20]} {LONG}") for n in range(20)),
    ]
    units = [str(i) for i in range(len(rows))]
    tied = split.entangled(rows, units, 0.5)
    assert tied == set(units[60:])
    found = split.split(rows, units, holdout=30, seed=0, entangled=tied)
    assert len(found.heldout) == 30 and max(found.heldout) < 60


def test_a_planted_leak_is_measured():
    train = unrelated(20)
    copied = row("Other words?", train[4].answer)
    half = row("Other words?", f"{train[5].answer} {LONG}")
    fresh, short = row("Why?", LONG), row(*("What is it?", "yes"))
    measured = split.overlaps([*train, row("What is it?", "yes")], [copied, half, fresh, short])
    assert measured[0] == 1 and 0.2 < measured[1] < 0.6 and measured[2] == 0 and measured[3] == 1


def test_rows_that_all_hang_together_cannot_be_split():
    rows = unrelated(10)
    with pytest.raises(DataError, match="without a leak"):
        split.split(rows, ["one"] * 10, holdout=2, seed=0)
    with pytest.raises(DataError, match="cannot hold out 10 of 10"):
        split.split(rows, list("abcdefghij"), holdout=10, seed=0)


@pytest.mark.parametrize(
    ("sizes", "weights", "repeat", "expected"),
    [
        ([900, 50], [0.9, 0.1], 1, [450, 50]),
        ([900, 50], [0.9, 0.1], 2, [900, 100]),
        ([100, 100, 100], [1, 2, 1], 1, [50, 100, 50]),
        ([30, 10], [3, 1], 1, [30, 10]),
    ],
)
def test_a_mixture_has_the_ratio_of_the_weights_and_repeats_no_more_than_allowed(
    sizes, weights, repeat, expected
):
    members = {n: list(range(s)) for n, s in enumerate(sizes)}
    repeats = {n: repeat if n == 1 else 1 for n in members}
    found = split.mixture(members, dict(enumerate(map(float, weights))), repeats)
    assert list(found.values()) == expected
