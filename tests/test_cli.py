"""The installed command in a subprocess: what a user types, and what a user reads."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from edgeft.store import Store
from tests.conftest import PYTHONPATH, SMOLLM2

BASE = "\n".join(f'{name} = "{value}"' for name, value in SMOLLM2.items())
RECIPE = f"""
target = "laptop"
[base]
{BASE}
[data]
source = "rows.jsonl"
[[quantize]]
kind = "gguf"
type = "Q8_0"
"""


@pytest.fixture
def edgeft(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"question": "What is a?", "answer": "A letter."}\n')
    (tmp_path / "r.toml").write_text(RECIPE)

    def run(*args, **env):
        return subprocess.run(
            [sys.executable, "-m", "edgeft", *map(str, args)], cwd=tmp_path, text=True, capture_output=True, check=False, timeout=120,
            env={**os.environ, "PYTHONPATH": PYTHONPATH, "COLUMNS": "200", **env},
        )  # fmt: skip

    run.folder = tmp_path
    return run


def change(edgeft, old, new):
    text = (edgeft.folder / "r.toml").read_text()
    assert old in text
    (edgeft.folder / "r.toml").write_text(text.replace(old, new))


def says(done, code, *pieces):
    text = " ".join(done.stderr.split())
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in text
    for piece in pieces:
        assert piece in text, text


def test_help_lists_the_commands(edgeft):
    text = edgeft("--help").stdout
    for command in ("build", "plan", "show", "chat", "serve", "doctor", "clean", "targets", "init"):
        assert command in text


def test_an_unknown_table_and_key_are_named_with_the_nearest_word(edgeft):
    change(edgeft, "[data]", "[train]\nrnak = 8\n[dta]\nx = 1\n[data]")
    says(edgeft("build", "r.toml"), 2, "[dta]: no such table; did you mean 'data'?",
         "train.rnak: there is no such key; did you mean 'rank'?")  # fmt: skip


def test_a_missing_data_file_is_named(edgeft):
    change(edgeft, "rows.jsonl", "nothere.jsonl")
    says(edgeft("build", "r.toml"), 2, "nothere.jsonl does not exist")


def test_an_unknown_target_is_named_with_the_nearest(edgeft):
    says(
        edgeft("build", "r.toml", "--target", "lapptop"),
        2,
        "there is no target 'lapptop'; did you mean 'laptop'?",
    )


def test_an_unknown_file_type_is_named_with_the_known_ones(edgeft):
    change(edgeft, '"Q8_0"', '"Q9_0"')
    says(edgeft("build", "r.toml"), 2, "'Q9_0' is no llama.cpp type; choose from", "Q4_K_M")


def test_a_branch_is_no_revision(edgeft):
    change(edgeft, BASE, 'repo = "owner/name"\nrevision = "main"')
    says(edgeft("plan", "r.toml"), 2, "base.revision", "[0-9a-f]{40}")


def test_two_bases_are_refused(edgeft):
    change(edgeft, BASE, BASE + '\nrepo = "owner/name"')
    says(edgeft("plan", "r.toml"), 2, "give exactly one of package, path and repo, not package and repo")


def test_a_model_too_large_for_its_target_is_refused_before_anything_runs(edgeft):
    import json

    (edgeft.folder / "big").mkdir()
    config = {"model_type": "llama", "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
              "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 131072}  # fmt: skip
    (edgeft.folder / "big" / "config.json").write_text(json.dumps(config))
    change(edgeft, BASE, 'path = "big"')
    done = edgeft("build", "r.toml", "--target", "pi-5-8gb")
    says(done, 9, "Q8_0 with a context of 2048", "pi-5-8gb leaves", "hint:")
    assert not list((edgeft.folder / ".edgeft" / "done").glob("*"))


def test_a_missing_compiler_is_named_with_what_installs_it(edgeft):
    (edgeft.folder / "empty").mkdir()
    done = edgeft(
        "build", "r.toml", PATH=str(edgeft.folder / "empty"), EDGEFT_CACHE=str(edgeft.folder / "cache")
    )
    says(done, 3, "compiler", "apt install g++")


def test_two_builds_of_one_recipe_at_once_are_refused(edgeft):
    with Store(edgeft.folder / ".edgeft").building("r"):
        says(edgeft("build", "r.toml"), 10, "another edgeft process (pid", "is already doing r")


def test_a_plan_leaves_no_trace_and_why_says_that_nothing_was_made(edgeft):
    done = edgeft("plan", "r.toml", "--why")
    assert done.returncode == 0, done.stderr
    assert (
        "train" in done.stdout
        and "to run" in done.stdout
        and "nothing like it was made here before" in done.stdout
    )
    assert not (edgeft.folder / ".edgeft").exists()


def test_what_was_not_built_cannot_be_shown_or_asked(edgeft):
    says(edgeft("show", "r.toml"), 1, "was not built yet", "edgeft build r.toml")
    says(edgeft("chat", "r.toml", "Hi"), 1, "has no finished model")
    says(edgeft("chat", "nothere.gguf", "Hi"), 1, "nothere.gguf does not exist")


def test_serving_to_the_network_needs_a_key(edgeft):
    says(edgeft("serve", "r.toml", "--host", "0.0.0.0"), 3, "would answer anybody", "--api-key")


def test_init_writes_a_recipe_that_can_be_planned_and_overwrites_none(edgeft):
    done = edgeft("init", "rows.jsonl")
    assert done.returncode == 0, done.stderr
    planned = edgeft("plan", "rows.toml")
    assert planned.returncode == 0, planned.stderr
    says(edgeft("init", "rows.jsonl"), 1, "rows.toml exists already")


def test_targets_are_listed(edgeft):
    assert "pi-4-4gb" in edgeft("targets").stdout


def test_clean_without_a_store_says_so(edgeft):
    says(edgeft("clean"), 1, "no recipe was built in")


@pytest.mark.slow
def test_a_malformed_row_is_named_by_file_and_line_and_an_empty_split_by_its_rules(edgeft, tiny_checkpoint):
    (edgeft.folder / "rows.jsonl").write_text('{"question": "a", "answer": "b c d"}\n{"question": \n')
    change(edgeft, BASE, f'path = "{tiny_checkpoint}"')
    says(edgeft("build", "r.toml", "--upto", "data"), 8, "rows.jsonl:2")
    (edgeft.folder / "rows.jsonl").write_text(
        '{"question": "a", "answer": "ok"}\n{"question": "b", "answer": "ok"}\n'
    )
    says(edgeft("build", "r.toml", "--upto", "data"), 8, "junk")
