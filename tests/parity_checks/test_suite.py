"""Texts as windows: what is cut where, and what counts."""

from __future__ import annotations

import numpy as np
import pytest

from edgeft.errors import DataError
from edgeft.parity import suite
from edgeft.parity.suite import Text


def test_windows_mark_the_answers_of_the_scored_half():
    rows = [(list(range(10)), [-100] * 6 + [6, 7, 8, 9])] * 40
    cut = suite.domain(rows, 32, 9, bos=None)
    stream = [label for _, labels in rows for label in labels]
    assert len(cut.ids) == 9 and cut.counted.shape == (9, 15)
    assert cut.counted.tolist() == [[stream[w * 32 + t] != -100 for t in range(17, 32)] for w in range(9)]


def test_a_short_text_is_cut_into_shorter_windows_rather_than_into_few():
    cut = suite.plain(list(range(1000)), 512, 32, bos=None)
    assert len(cut.ids) >= 8 and cut.n_ctx == 124
    assert suite.plain(list(range(1000)), 512, 2, bos=None).n_ctx == 500


def test_bos_replaces_the_first_token_as_llama_cpp_does():
    cut = suite.plain(list(range(100, 400)), 32, 4, bos=7)
    assert [w[0] for w in cut.ids] == [7] * 4 and cut.ids[1][1] == 133


def test_too_little_text_and_text_without_an_answer_are_refused():
    with pytest.raises(DataError, match="has 10 tokens"):
        suite.domain([(list(range(10)), [-100] * 10)], 512, 4, bos=None)
    with pytest.raises(DataError, match="none of the"):
        suite.domain([(list(range(500)), [-100] * 500)], 512, 4, bos=None)


def test_a_text_survives_its_file_and_is_known_by_its_tokens(tmp_path):
    cut = suite.plain(list(range(300)), 32, 4, bos=None)
    np.savez(tmp_path / "x.npz", **cut.arrays())
    again = Text.of("general", dict(np.load(tmp_path / "x.npz")))
    assert again.ids == cut.ids and again.sha256 == cut.sha256 and again.facts() == cut.facts()
    assert suite.plain(list(range(1, 301)), 32, 4, bos=None).sha256 != cut.sha256


def test_the_general_text_is_long_enough_for_its_windows():
    assert len(suite.GENERAL.read_text(encoding="utf-8")) > 16 * 512 * 4
