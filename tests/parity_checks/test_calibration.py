from __future__ import annotations

import json
from collections import defaultdict

import pytest

from edgeft.parity.checks.calibration import overlap
from tests.conftest import ROOT


@pytest.fixture(scope="module")
def sides():
    """The shipped medical rows, every tenth term held out; questions share a template, answers share phrases."""
    terms = defaultdict(list)
    for line in (ROOT / "recipes" / "data" / "wordnet_medical_qa.jsonl").read_text().splitlines():
        row = json.loads(line)
        terms[row["focus"]].append(f"{row['instruction']}\n{row['output']}")
    train, test = [], []
    for number, texts in enumerate(terms.values()):
        (train if number % 10 else test).extend(texts)
    return train, test


def test_calibration_on_the_test_text_itself_is_refused_and_blamed_on_the_text(sides):
    _, test = sides
    check = overlap(test, test)
    assert check.ok is False and check.step == "text"
    assert check.said.startswith(
        f"{len(test)} of {len(test)} passages of the test text stand in the calibration text"
    )
    assert overlap([" ".join(test).upper()], ["\n".join(test)]).ok is False


def test_a_disjoint_split_passes_with_a_wide_margin(sides):
    train, test = sides
    check = overlap(train, test)
    assert check.ok
    share, most = (float(word.rstrip("%")) for word in check.said.split() if word.endswith("%"))
    assert share < 0.5 and most <= 60


@pytest.mark.parametrize("at", [0, 99, -1])
def test_one_leaked_row_is_found_and_shown(sides, at):
    train, test = sides
    check = overlap([*train, f"Before it. {test[at]} After it."], test)
    assert check.ok is False and check.said.startswith(f"1 of {len(test)} passages")


def test_a_passage_copied_out_of_a_long_text_is_found():
    long = " ".join(f"word{i}" for i in range(5000))
    copied = " ".join(f"word{i}" for i in range(1000, 1400))
    assert "passages of the test text stand in" in overlap([f"and then {copied} and so on"], [long]).said
    assert overlap(["and so on"], [long]).ok


def test_a_text_that_was_copied_in_pieces_is_found():
    sentences = [" ".join(f"w{n}x{i}" for i in range(20)) for n in range(100)]
    every_other = [s for n, s in enumerate(sentences) if n % 2]
    check = overlap(every_other, [" ".join(sentences)])
    assert check.ok is False and check.said.endswith("the limit is 10%")


def test_short_texts_are_compared_whole_and_nothing_cannot_be_compared():
    assert overlap(["Yes."], ["yes"]).ok is False
    assert overlap(["Yes, I think so."], ["yes"]).ok
    assert overlap(["Yes."], ["", " …"]).ok is None
