"""Predicted speed against published tokens a second, for every board that has such numbers."""

from __future__ import annotations

import pytest

from edgeft.fit.shape import from_config
from edgeft.fit.speed import decode, prefill, read_bytes
from edgeft.recipe import load
from edgeft.resources import folder
from edgeft.stages.device import STAGE
from tests.fit.models import LLAMA_3B, LLAMA_8B, SMOLLM2

PUBLISHED = [
    ("pi-5-16gb", LLAMA_3B, "Q4_K_M", 4.88),
    ("pi-5-16gb", LLAMA_8B, "Q4_K_M", 2.17),
    ("pi-4-8gb", LLAMA_3B, "Q4_K_M", 1.60),
    ("n100-mini-pc", LLAMA_8B, "Q4_K_M", 3.0),
    ("n100-mini-pc", LLAMA_3B, "Q4_K_M", 9.06),
    ("rtx-3060-box", LLAMA_3B, "Q4_K_M", 122.9),
    ("jetson-orin-nano-8gb", SMOLLM2, "Q4_K_S", 165),
]


def board(name):
    tables = load(folder("targets") / f"{name}.toml", per_target=True)
    return next(p for s, p in tables.rows if s is STAGE).board()


@pytest.mark.parametrize(("target", "config", "label", "measured"), PUBLISHED)
def test_a_published_speed_lies_in_the_predicted_range(target, config, label, measured):
    found = decode(from_config(config), label, board(target))
    assert found.low * 0.95 <= measured <= found.high * 1.05, found
    assert str(found).endswith("tokens/s (predicted)")


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
