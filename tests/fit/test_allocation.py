"""Predicted memory against what the pinned llama.cpp says it allocates: nothing here is a number somebody wrote down."""

from __future__ import annotations

import os
import sys
from dataclasses import replace

import pytest

from edgeft.bundle.launch import Settings, server_arguments
from edgeft.fit.memory import Serving, predict
from edgeft.fit.shape import from_config, from_gguf
from tests.conftest import ROOT

sys.path.append(os.fspath(ROOT / "benchmarks"))
from memory_prediction import (
    MIB,
    SERVINGS,
    SHAPES,
    SMALL,
    asked,
    blank,
    compared,
    config,
    reported,
    this_machine,
    trials,
)


@pytest.mark.parametrize("name", ["SmolLM2-135M", "Qwen3-0.6B", "Gemma-3-1B", "Phi-3-mini"])
def test_cache_and_buffers_are_what_llama_cpp_would_allocate(library, name, tmp_path):
    shape = blank(tmp_path / "m.gguf", SHAPES[name], "Q4_0")
    for serving in SERVINGS[1:6:2] if name != "SmolLM2-135M" else SERVINGS:
        theirs, need = reported(tmp_path / "m.gguf", serving), predict(shape, "Q4_0", serving, this_machine())
        assert need.kv_cache * 1e6 / MIB == pytest.approx(theirs["kv"], abs=0.01), serving
        assert need.compute * 1e6 / MIB == pytest.approx(theirs["compute"] + theirs["output"], rel=0.005), (
            serving
        )


@pytest.mark.slow
@pytest.mark.parametrize("name", SHAPES)
def test_every_family_is_predicted_for_every_way_of_serving(library, name, tmp_path):
    shape = blank(tmp_path / "m.gguf", SHAPES[name], "Q4_0")
    for serving in SERVINGS:
        theirs, need = reported(tmp_path / "m.gguf", serving), predict(shape, "Q4_0", serving, this_machine())
        assert need.kv_cache * 1e6 / MIB == pytest.approx(theirs["kv"], abs=0.01), serving
        assert need.compute * 1e6 / MIB == pytest.approx(theirs["compute"] + theirs["output"], rel=0.005), (
            serving
        )


@pytest.mark.slow
def test_odd_widths_leave_the_gaps_that_ggml_leaves(library, tmp_path):
    # wide heads, few or many keys, a narrow feed-forward: what a formula of the widths gets wrong by a tenth and more
    for heads, kv_heads, ffn in ((16, 4, 256), (32, 4, 1024), (8, 2, 256), (32, 32, 2048), (64, 8, 1024)):
        shape_config = config("llama", 4, 1024, heads, kv_heads, ffn, 1000, head_dim=64)
        for family in ("llama", "gemma2"):
            more = {"sliding_window": 512, "tie_word_embeddings": True} if family == "gemma2" else {}
            shape = blank(tmp_path / "m.gguf", {**shape_config, "model_type": family, **more}, "Q4_0")
            for serving in (Serving(context=512), Serving(context=512, kv_type="q8_0")):
                theirs = reported(tmp_path / "m.gguf", serving)
                need = predict(shape, "Q4_0", serving, this_machine())
                assert need.compute * 1e6 / MIB == pytest.approx(
                    theirs["compute"] + theirs["output"], rel=0.005
                )


@pytest.mark.slow
def test_a_served_file_takes_what_was_predicted_for_it(library, tmp_path):
    wanted = {("SmolLM2-135M", "Q4_1"), ("SmolLM2-135M", "Q4_0")}
    seen = set()
    for title, file, label, serving in trials(tmp_path):
        if (title, label) not in wanted:
            break
        seen.add((title, label))
        need = predict(from_gguf(file), label, serving, this_machine())
        theirs, peak = asked(file, serving)
        for part, (ours, said) in compared(need, theirs).items():
            assert ours == pytest.approx(said, rel=0.02), part
        assert peak <= need.total <= 1.15 * peak  # never less than the process took
    assert seen == wanted


def test_the_server_is_started_with_as_many_checkpoints_as_are_predicted():
    settings = Settings(
        name="m", context=512, parallel=1, kv_type="f16", threads=1, gpu=False, mmap=False, prompt_cache_mb=0, temperature=0,
        top_k=1, top_p=1, min_p=0, repeat_penalty=1, system="", host="127.0.0.1", port=0,
    )  # fmt: skip
    arguments = server_arguments(settings)
    assert int(arguments[arguments.index("--ctx-checkpoints") + 1]) == Serving(context=512).checkpoints


def test_windowed_layers_cost_a_copy_of_their_window_for_each_checkpoint():
    shape = from_config(SMALL["Gemma 3, windows, 131k tokens"])
    serving, board = Serving(context=4096), this_machine()
    kept = predict(shape, "Q8_0", serving, board).checkpoints
    assert kept * 1e6 / serving.checkpoints == pytest.approx(5.006 * MIB, rel=0.002)  # logged, for one
    many = predict(shape, "Q8_0", replace(serving, checkpoints=32), board).checkpoints
    assert many == pytest.approx(32 * kept / serving.checkpoints)
    assert predict(from_config(SHAPES["Qwen3-0.6B"]), "Q8_0", serving, board).checkpoints == 0
