"""Predicted speed against published tokens a second, for every board that has such numbers."""

from __future__ import annotations

import os
import sys

import pytest

from edgeft.fit.shape import from_config
from edgeft.fit.speed import decode, prefill, read_bytes
from tests.conftest import ROOT
from tests.fit.models import LLAMA_3B, LLAMA_8B, SMOLLM2

sys.path.append(os.fspath(ROOT / "benchmarks"))
from published_speed import MODELS, POINTS, board, errors


@pytest.mark.parametrize("point", POINTS, ids=lambda p: f"{p.target} {p.model} {p.speed}")
def test_a_published_speed_lies_in_the_predicted_range(point):
    found = decode(from_config(MODELS[point.model]), point.label, board(point.target))
    assert found.low * 0.95 <= point.speed <= found.high * 1.05, found
    assert str(found).endswith("tokens/s (predicted)")


def test_a_speed_is_predicted_from_other_points_of_the_same_kind_of_board_alone():
    blind = {p: errors(p)[3] for p in POINTS}
    assert all(abs(e) <= 13 for p, e in blind.items() if p.kind in ("Pi 4", "Pi 5"))
    assert sum(e is not None for e in blind.values()) == 12


def test_an_adapter_is_read_for_every_token_too():
    shape, pi = from_config(LLAMA_3B), board("pi-5-8gb")
    with_it = decode(shape, "Q4_K_M", pi, beside=read_bytes(shape, "Q4_K_M"))
    assert with_it.high == pytest.approx(decode(shape, "Q4_K_M", pi).high / 2)


def test_a_fuller_context_is_slower():
    shape, pi = from_config(LLAMA_3B), board("pi-5-8gb")
    assert decode(shape, "Q4_K_M", pi, used=4096).high < decode(shape, "Q4_K_M", pi).high


def test_an_untied_embedding_is_not_read_for_every_token_but_a_tied_one_is():
    big = from_config(LLAMA_8B)
    assert (
        read_bytes(big, "F16")
        == 2 * (sum(m.elements for m in big.matrices) - 128256 * 4096) + 4 * big.vectors
    )
    small = from_config(SMOLLM2)
    assert read_bytes(small, "F16") == 2 * sum(m.elements for m in small.matrices) + 4 * small.vectors


def test_a_token_reads_only_the_experts_it_visits():
    config = {**SMOLLM2, "model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2}
    two, all_of_them = from_config(config), from_config({**config, "num_experts_per_tok": 8})
    assert read_bytes(two, "Q4_0") < 0.5 * read_bytes(all_of_them, "Q4_0")


def test_prompt_speed_is_predicted_only_where_it_was_published():
    shape = from_config(LLAMA_8B)
    found = prefill(shape, board("n100-mini-pc"))
    assert found is not None
    assert found.low < 6.5 * 1.2
    assert found.high > 6.5 * 0.8
    assert prefill(shape, board("laptop")) is None
