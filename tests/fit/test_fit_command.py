"""`edgeft fit`: what a user types about a model and a board, and what is answered."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import pytest

from edgeft.commands import fitting
from edgeft.errors import DataError, RecipeError
from edgeft.fit.advice import READING, advise
from edgeft.fit.base_shape import cached_model
from edgeft.fit.memory import Serving, fits
from edgeft.fit.shape import from_config
from edgeft.recipe import load
from tests.conftest import ROOT
from tests.fit.models import CARD, LLAMA_3B, LLAMA_8B, PC, PI_4, PI_5, SMOLLM2, config_file, tiny_gguf


def ask(model, *targets, context=0, kv_type="", parallel=0, adapter_rank=-1):
    fitting.fit(
        str(model), targets, context=context, kv_type=kv_type, parallel=parallel, adapter_rank=adapter_rank, as_json=True
    )  # fmt: skip


@pytest.fixture
def llama(tmp_path):
    return config_file(tmp_path / "llama", LLAMA_3B)


def test_the_largest_that_reads_along_is_recommended():
    best = advise(from_config(SMOLLM2), PI_5, Serving(context=2048))
    assert best.take is not None
    assert best.take.label == "Q8_0"
    assert "at least as fast as one reads" in best.reason


def test_a_slow_board_gets_four_bits_and_not_less():
    best = advise(from_config(LLAMA_8B), PC, Serving(context=2048))
    assert best.take is not None
    assert best.take.label == "Q4_K_M"
    assert all(c.answering.low < READING for c in best.choices if c.need.weights >= best.take.need.weights)
    smaller = [c for c in best.choices if c.need.weights < best.take.need.weights]
    assert smaller and all(c.fits for c in smaller)


def test_a_fast_card_gets_what_fits_it():
    best = advise(from_config(LLAMA_8B), CARD, Serving(context=2048))
    assert best.take is not None
    assert best.take.label == "Q8_0"
    assert not best.choices[0].fits


def test_where_nothing_fits_the_sentence_says_what_would():
    shape = from_config(LLAMA_8B)
    best = advise(shape, PI_4, Serving(context=8192))
    assert best.take is None
    assert best.reason.startswith("nothing fits: Q3_K_M alone needs")
    roomy = replace(PI_4, ram_mb=5600)
    best = advise(shape, roomy, Serving(context=8192))
    assert best.take is None
    label, context = best.reason.removeprefix("nothing fits with a context of 8192; ").split(" would with ")
    assert fits(shape, label, Serving(context=int(context)), roomy).fits


def test_an_adapter_costs_memory_and_speed():
    shape, serving = from_config(LLAMA_3B), Serving(context=2048)
    plain, beside = (advise(shape, PI_5, serving, adapter_rank=r).choices[-1] for r in (0, 64))
    maps = (
        2 * (3072 + 3072) + 2 * (3072 + 1024) + 3 * (3072 + 8192)
    )  # rows and columns of a layer's linear maps
    assert beside.need.adapter == pytest.approx(2 * 64 * 28 * maps / 1e6)
    assert beside.answering.high < plain.answering.high
    assert beside.longest <= plain.longest


def test_the_answer_as_json_holds_every_target_and_part(llama, capsys):
    ask(llama, context=2048)
    said = json.loads(capsys.readouterr().out)
    assert said["predicted"] is True
    assert {t["name"] for t in said["targets"]} == {p.stem for p in (ROOT / "targets").glob("*.toml")}
    for target in said["targets"]:
        for one in target["quantizations"]:
            memory = one["memory_mb"]
            assert memory["total"] == pytest.approx(sum(v for k, v in memory.items() if k != "total"), abs=1)
            assert one["fits"] == (memory["total"] <= target["available_mb"])
            assert one["fits"] == (one["longest_context"] >= 2048)


def test_the_table_names_the_board_the_choice_and_that_it_is_a_prediction(llama, capsys):
    fitting.fit(
        str(llama), ["pi-5-8gb"], context=2048, kv_type="q8_0", parallel=0, adapter_rank=16, as_json=False
    )
    text = " ".join(capsys.readouterr().out.split())
    for piece in ("pi-5-8gb 7,590 MB of RAM", "KV cache q8_0, adapter of rank 16", "take Q4_K_M", "none was measured on a board",
                  "emulation says nothing"):  # fmt: skip
        assert piece in text


def test_a_recipe_brings_its_base_serving_quantizations_and_adapter(tmp_path):
    tiny_gguf(tmp_path / "base.gguf")
    (tmp_path / "r.toml").write_text(
        '[base]\npath = "base.gguf"\nlicence = "MIT"\n[data]\nsource = "rows.jsonl"\n[train]\nmethod = "grid-adapter"\nrank = 4\n'
        '[serve]\ncontext = 512\nkv_type = "q8_0"\n[[quantize]]\nkind = "gguf"\ntype = "Q5_0"\n'
    )
    (tmp_path / "rows.jsonl").write_text("")
    assert load(tmp_path / "r.toml")
    asked = fitting.question(str(tmp_path / "r.toml"))
    assert asked.serving == Serving(context=512, kv_type="q8_0")
    assert asked.labels[-1] == "Q5_0"
    assert (asked.adapter_rank, asked.shape.layers) == (4, 2)


def test_a_cached_hub_model_is_found_by_its_name(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("EDGEFT_CACHE", str(tmp_path / "ours"))
    owner = tmp_path / "models--some--model"
    for revision, config in (("a" * 40, LLAMA_8B), ("b" * 40, LLAMA_3B)):
        config_file(owner / "snapshots" / revision, config)
    (owner / "refs").mkdir()
    (owner / "refs" / "main").write_text("b" * 40)
    assert fitting.question("some/model").shape.hidden == 3072
    assert fitting.question(f"some/model@{'a' * 40}").shape.hidden == 4096
    assert cached_model("../model") is None
    with pytest.raises(DataError, match="neither a file here nor a hub model") as e:
        fitting.question("some/other")
    assert "hf download" in e.value.hint


def test_mistakes_are_sentences(llama, tmp_path):
    with pytest.raises(RecipeError, match="no target 'pi-5-8bg'; did you mean 'pi-5-8gb'"):
        ask(llama, "pi-5-8bg")
    with pytest.raises(RecipeError, match="'q5_0' is not known"):
        ask(llama, kv_type="q5_0")
    with pytest.raises(RecipeError, match=r"longer than the 131072 tokens that llama was trained for"):
        ask(llama, context=200_000)
    with pytest.raises(DataError, match=r"neither a config\.json nor a GGUF file"):
        ask(tmp_path)


def test_its_help_loads_nothing_heavy():
    code = (
        "import sys; sys.argv = ['edgeft', 'fit', '--help']\nfrom edgeft.cli import main\n"
        "try: main()\nexcept SystemExit: pass\nprint('heavy:', {'torch', 'numpy', 'transformers', 'gguf'} & set(sys.modules))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "--kv-type" in out
    assert out.rstrip().endswith("heavy: set()")
