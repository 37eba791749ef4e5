"""One build of a tiny model for all tests of boards, and one board made of namespaces for each file that asks for it."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from edgeft import runtimes
from tests.boards import namespace
from tests.conftest import PYTHONPATH, ROOT
from tests.llamacpp.conftest import tiny

__all__ = ["tiny"]

RECIPE = """
target = "board.toml"
[base]
path = "base"
licence = "CC0-1.0"
[data]
source = "rows.jsonl"
holdout = 12
[train]
method = "lora"
max_steps = 2
batch_size = 4
[serve]
context = 512
[[quantize]]
kind = "gguf"
type = "Q8_0"
[[quantize]]
kind = "gguf"
type = "Q4_0"
[reference]
windows = 5
n_ctx = 64
general_windows = 5
questions = 1
answer_tokens = 4
[verify]
floor_windows = 2
[gate]
max_kld = 5
max_ppl_ratio = 5
min_same_top = 0
min_retention = -5
"""
TARGET = """
[device]
name = "board"
arch = "arm64"
isa = "armv8.2-a+dotprod+fp16"
ram_mb = 8590
os_reserve_mb = 1000
threads = 1
bandwidth_gb_s = 17.1
effective_gb_s = [9.3, 11.6]
[[export]]
kind = "{kind}"
"""
"""A package where llama-server for that board is compiled: nothing here waits for a compiler."""


def edgeft(*args, cwd):
    """A command of edgeft's, as a user gives it."""
    return subprocess.run(
        [sys.executable, "-m", "edgeft", *map(str, args)], cwd=cwd, text=True, capture_output=True, check=False, timeout=600,
        env={**os.environ, "PYTHONPATH": PYTHONPATH, "COLUMNS": "300"},
    )  # fmt: skip


@pytest.fixture(scope="module")
def project(library, tiny_checkpoint, tmp_path_factory) -> Path:
    """A folder with tiny.toml and its finished build for an arm64 board; built once, by the first worker that needs it."""
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    with (shared / "tiny.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        made = shared / "a tiny build"
        if not made.is_dir():
            shutil.rmtree(aside := made.with_suffix(".aside"), ignore_errors=True)  # of a build that failed
            _build(tiny_checkpoint, aside)
            aside.rename(made)
    folder = tmp_path_factory.mktemp("a board")
    own = shutil.ignore_patterns("locks")  # a lock that is linked would be one for both
    shutil.copytree(made, folder, copy_function=os.link, dirs_exist_ok=True, ignore=own)
    return folder


@pytest.fixture(scope="module")
def board(tmp_path_factory):
    """A running arm64 Debian with nothing of edgeft on it."""
    with namespace.running(tmp_path_factory.mktemp("namespaces")) as found:
        yield found


def _build(checkpoint: Path, folder: Path) -> None:
    folder.mkdir()
    _speaking(checkpoint, folder / "base")
    lines = (ROOT / "recipes/data/wordnet_medical_qa.jsonl").read_text().splitlines()
    (folder / "rows.jsonl").write_text("\n".join(lines[::50]) + "\n")
    (folder / "tiny.toml").write_text(RECIPE)
    compiled = runtimes.for_device("arm64", "armv8.2-a+dotprod+fp16").built()
    (folder / "board.toml").write_text(TARGET.format(kind="deb" if compiled else "bundle"))
    refused = edgeft("verify", "tiny.toml", cwd=folder)
    assert refused.returncode == 1 and "is not built in" in refused.stderr
    done = edgeft("build", "tiny.toml", cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr


def _speaking(checkpoint: Path, out: Path) -> None:
    """The tiny model with an output layer of its own: with its embedding there, it says the last token again and again,
    and a device that asks whether it answers is right to say no."""
    import torch
    from transformers import AutoModelForCausalLM

    shutil.copytree(checkpoint, out)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float16)
    model.config.tie_word_embeddings = False
    torch.manual_seed(1)
    model.lm_head.weight = torch.nn.Parameter((torch.randn(model.lm_head.weight.shape) * 0.02).half())
    model.save_pretrained(out)
