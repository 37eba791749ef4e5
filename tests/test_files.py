"""Every recipe and target that ships can be loaded and planned."""

from __future__ import annotations

import pytest

from edgeft.build import check
from edgeft.errors import FitError
from edgeft.plan import plan
from edgeft.recipe import load
from tests.conftest import ROOT

RECIPES = sorted((ROOT / "recipes").glob("*.toml"))
TARGETS = sorted((ROOT / "targets").glob("*.toml"))


@pytest.mark.parametrize("target", TARGETS, ids=lambda p: p.stem)
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda p: p.stem)
def test_it_plans(recipe, target):
    steps = plan(load(recipe), load(target, per_target=True))
    assert any(s.stage.id == "export/bundle" for s in steps)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda p: p.stem)
def test_it_fits_the_target_it_names(recipe):
    tables = load(recipe)
    assert tables.description
    check(plan(tables, load(ROOT / "targets" / f"{tables.target}.toml", per_target=True)), {})


def test_an_8b_model_is_refused_for_the_smallest_board(tmp_path, monkeypatch):
    """With its config.json known, as it is on a machine that reached the hub once."""
    import json

    from edgeft import estimates

    monkeypatch.setenv("EDGEFT_CACHE", str(tmp_path))
    steps = plan(
        load(ROOT / "recipes/medical-qa-8b.toml"), load(ROOT / "targets/pi-4-4gb.toml", per_target=True)
    )
    folder = estimates.glimpse(next(s for s in steps if s.stage.name == "base"))
    folder.mkdir(parents=True)
    config = {"model_type": "qwen3", "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "head_dim": 128,
              "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 151936, "max_position_embeddings": 40960}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(FitError, match=r"pi-4-4gb leaves 3\.4 GB"):
        check(steps, {})
