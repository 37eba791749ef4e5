"""Training on through the rounding of a file: what is learnt, what is written, and what happens when it is cut off."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from edgeft.errors import StageError
from edgeft.grid import formats, placement, rounded
from edgeft.grid.model import load, matrices
from edgeft.llamacpp import header
from edgeft.training import heldout, loop, tune
from edgeft.training.modules import resolve
from edgeft.training.settings import Settings
from tests.grid.test_grid_model import Files
from tests.training import tiny

OPTIONS = tune.TuneOptions(rank=4, alpha=8, rslora=False, learn_scales=True)
SETTINGS = Settings(
    learning_rate=5e-3, epochs=1, max_steps=0, batch_size=4, accumulation=1, warmup=0.1, weight_decay=0.0, clip=1.0,
    eval_every=4, patience=0, checkpoint_every=2, seed=0, gradient_checkpointing=False, optimizer="adamw", device="cpu",
)  # fmt: skip


@pytest.fixture(scope="module")
def files(library, tmp_path_factory) -> Files:
    return Files(tmp_path_factory.mktemp("tune"), std=0.1)


def run(files: Files, out: Path, options: tune.TuneOptions = OPTIONS, settings: Settings = SETTINGS):
    return tune.tune(
        checkpoint=files.folder, plain=files.plain, file=files.file, rows=tiny.rows(32), heldout=tiny.rows(8, seed=1),
        settings=settings, options=options, device="cpu", compute_dtype="float32", end_of_turn=2, out=out,
    )  # fmt: skip


@pytest.fixture(scope="module")
def tuned(files, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    return run(files, out), out


def test_the_file_says_what_was_measured_at_the_end_of_training(files, tuned):
    outcome, out = tuned
    assert outcome.heldout_loss < outcome.heldout_loss_base
    model = load(files.folder, out / "model.gguf", files.plain)
    again = heldout.measure(model, tiny.rows(8, seed=1), end_of_turn=2, batch_size=8)
    assert again.loss == pytest.approx(outcome.heldout_loss, abs=1e-6)


def test_training_starts_from_the_file_as_it_was_quantized(files, tuned):
    model = load(files.folder, files.file, files.plain)
    start = heldout.measure(model, tiny.rows(8, seed=1), end_of_turn=2, batch_size=8)
    # The latents are rounded afresh with the quantizer's scales: it may have chosen a code that is not the nearest.
    assert tuned[0].heldout_loss_base == pytest.approx(start.loss, abs=0.02)


def test_size_types_and_all_other_tensors_are_those_of_the_start(files, tuned):
    before, after = header.read(files.file), header.read(tuned[1] / "model.gguf")
    old, new = files.file.read_bytes(), (tuned[1] / "model.gguf").read_bytes()
    assert len(old) == len(new) and old[: before.data_offset] == new[: after.data_offset]
    changed = []
    for tensor in before.tensors:
        at = slice(before.data_offset + tensor.offset, before.data_offset + tensor.offset + tensor.bytes)
        changed += [tensor.name] * (old[at] != new[at])
    assert changed and all("attn_" in name or "ffn_" in name for name in changed)
    assert not any("norm" in name or name.endswith("bias") for name in changed)


@pytest.mark.slow
def test_without_learnt_scales_only_codes_change(files, tmp_path):
    run(files, tmp_path, dataclasses.replace(OPTIONS, learn_scales=False))
    format, known = formats.of("Q4_1"), placement.placement(files.folder, files.plain)
    before, after = header.read(files.file), header.read(tmp_path / "model.gguf")
    for old, new in zip(before.tensors, after.tensors, strict=True):
        if old.type == "Q4_1":
            pair = [
                torch.from_numpy(placement.raw(path, head, tensor).copy()).reshape(-1, format.bytes)
                for path, head, tensor in ((files.file, before, old), (tmp_path / "model.gguf", after, new))
            ]
            assert torch.equal(format.rounding.fields(pair[0]), format.rounding.fields(pair[1]))
    assert known.placed


@pytest.mark.slow
def test_a_run_that_is_cut_off_ends_with_the_same_file(files, tuned, tmp_path, monkeypatch):
    kept = loop.Watch.checkpoint_saved

    def cut(self, folder):
        kept(self, folder)
        if folder.name == "checkpoint-4":
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(loop.Watch, "checkpoint_saved", cut)
        run(files, tmp_path)
    outcome = run(files, tmp_path)
    assert outcome.resumed_from == 4
    assert (tmp_path / "model.gguf").read_bytes() == (tuned[1] / "model.gguf").read_bytes()


def test_a_finished_run_is_not_trained_again(files, tuned, monkeypatch):
    monkeypatch.setattr(loop, "train", lambda *a, **k: pytest.fail("trained again"))
    assert run(files, tuned[1]) == tuned[0]


def test_blocks_that_do_not_hold_what_was_trained_are_refused(files, monkeypatch):
    model = load(files.folder, files.file, files.plain, hold=False)
    names = resolve(model).names
    known = placement.placement(files.folder, files.plain)
    latents = dict(zip(names, matrices(files.plain, names, known, torch.float16), strict=True))
    made = rounded.attach(model, latents, rank=2, alpha=4, rslora=False, learn_scales=False, seed=0)
    assert len(rounded.packed(made)) == len(names)
    monkeypatch.setattr(rounded, "codes", lambda *args: torch.zeros_like(args[0], dtype=torch.uint8))
    with pytest.raises(StageError, match="do not hold the weights"):
        rounded.packed(made)
