import json
import logging
import math
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from edgeft import progress
from edgeft.errors import StageError
from edgeft.training import Settings, heldout, load_base, load_trained, loop, nf4, resolve
from edgeft.training import model as models
from edgeft.training.watch import Watch
from tests.training import tiny

ROOT = Path(__file__).parents[2]

SETTINGS = Settings(
    learning_rate=2e-2, epochs=3, max_steps=0, batch_size=4, accumulation=2, warmup=0.1, weight_decay=0.01, clip=1.0,
    eval_every=3, patience=0, checkpoint_every=4, seed=0, gradient_checkpointing=False, optimizer="auto", device="cpu",
)  # fmt: skip


def run(base: Path, out: Path, settings: Settings = SETTINGS, rows=None, *, dropout: float = 0.1):
    bare = load_base(base, method="qlora", device="cpu")
    tuned = models.attach(bare, resolve(bare), rank=4, alpha=8, dropout=dropout, rslora=False, seed=0)
    out.mkdir(exist_ok=True)
    return loop.train(
        tuned, rows or tiny.rows(38), tiny.rows(10, seed=1), settings=settings, end_of_turn=tiny.END, out=out
    )


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny.checkpoint(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def done(base, tmp_path_factory):
    """One uninterrupted run, and all it reported."""
    out, told = tmp_path_factory.mktemp("done"), []
    with progress.listen(told.append):
        outcome = run(base, out)
    return outcome, out, told


def test_training_lowers_the_heldout_loss_and_keeps_the_best_adapter(base, done):
    outcome, out, _ = done
    assert outcome.steps == math.ceil(38 * 3 / 8)
    assert outcome.heldout_loss < outcome.heldout_loss_base - 0.1
    measured = {int(p["step"]): p["heldout_loss"] for p in outcome.curve if "heldout_loss" in p}
    assert set(measured) == {0, 3, 6, 9, 12, 15}
    assert outcome.heldout_loss == min(loss for step, loss in measured.items() if step)
    assert outcome.heldout_loss_base == measured[0]
    again = load_trained(base, out / "adapter", method="qlora", device="cpu")
    found = heldout.measure(again, tiny.rows(10, seed=1), end_of_turn=tiny.END, batch_size=8)
    assert found.loss == outcome.heldout_loss
    assert found.end_of_turn_probability == outcome.end_of_turn_probability
    with again.disable_adapter():
        before = heldout.measure(again, tiny.rows(10, seed=1), end_of_turn=tiny.END, batch_size=8)
    assert before.loss == outcome.heldout_loss_base


def test_a_run_tells_its_steps_and_leaves_a_curve_tensorboard_and_no_checkpoints(done):
    outcome, out, told = done
    steps = [report for report in told if report.what == "train"]
    assert [int(report.done) for report in steps] == list(range(outcome.steps + 1))
    assert {"loss", "learning_rate", "heldout_loss"} <= steps[3].numbers.keys()
    lines = [json.loads(line) for line in (out / "curve.jsonl").read_text().splitlines()]
    assert lines == outcome.curve
    assert sorted(p.name for p in out.iterdir()) == ["adapter", "curve.jsonl", "tensorboard"]
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    assert len(events.Scalars("train/loss")) == outcome.steps
    assert len(events.Scalars("train/heldout_loss")) == 6


@pytest.mark.slow
def test_a_run_killed_with_kill_9_ends_with_the_same_adapter_bit_for_bit(base, done, tmp_path):
    expected, finished, _ = done
    code = (
        "import os, pathlib, signal, sys\n"
        "from edgeft import progress; from tests.training import test_loop\n"
        "def sink(report):\n"
        "    if report.what == 'train' and report.done == 10: os.kill(os.getpid(), signal.SIGKILL)\n"
        "with progress.listen(sink): test_loop.run(pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]))\n"
    )
    out = tmp_path / "out"
    killed = subprocess.run(
        [sys.executable, "-c", code, base, out], cwd=ROOT, capture_output=True, check=False
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert not (out / "adapter").exists()
    left = sorted(p.name for p in (out / "checkpoints").iterdir())
    assert left == ["checkpoint-4", "checkpoint-8"]
    # A checkpoint the kill caught half-written: all its files, but no marker.
    shutil.copytree(out / "checkpoints" / "checkpoint-8", out / "checkpoints" / "checkpoint-9")
    (out / "checkpoints" / "checkpoint-9" / "edgeft.json").unlink()
    (out / "checkpoints" / "checkpoint-9" / "optimizer.pt").write_bytes(b"")

    outcome = run(base, out)
    assert outcome.resumed_from == 8
    assert replace(outcome, resumed_from=0, seconds=0) == replace(expected, seconds=0)
    name = "adapter/adapter_model.safetensors"
    assert (out / name).read_bytes() == (finished / name).read_bytes()


@pytest.mark.slow
def test_two_runs_with_one_seed_are_equal_and_another_seed_is_not(base, done, tmp_path):
    expected, finished, _ = done
    name = "adapter/adapter_model.safetensors"
    run(base, tmp_path / "same")
    assert (tmp_path / "same" / name).read_bytes() == (finished / name).read_bytes()
    other = run(base, tmp_path / "other", replace(SETTINGS, seed=1))
    assert other.train_loss != expected.train_loss


@pytest.mark.slow
def test_weights_that_stay_in_nf4_train_to_the_same_adapter(base, tmp_path, monkeypatch):
    short = replace(SETTINGS, max_steps=4)
    run(base, tmp_path / "plain", short)
    monkeypatch.setattr(nf4, "_fits", lambda *_: False)
    run(base, tmp_path / "packed", short)
    name = "adapter/adapter_model.safetensors"
    assert (tmp_path / "packed" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()


@pytest.mark.slow
def test_gradient_checkpointing_changes_nothing_but_the_memory(base, tmp_path):
    short = replace(SETTINGS, max_steps=4)
    plain = run(base, tmp_path / "plain", short, dropout=0)
    spare = run(base, tmp_path / "spare", replace(short, gradient_checkpointing=True), dropout=0)
    assert spare.heldout_loss == pytest.approx(plain.heldout_loss, rel=1e-5)


@pytest.mark.slow
def test_accumulated_batches_make_the_step_of_one_large_batch(base, tmp_path):
    rows = tiny.rows(16)
    large = run(
        base, tmp_path / "large", replace(SETTINGS, epochs=1, batch_size=16, accumulation=1), rows, dropout=0
    )
    small = run(
        base, tmp_path / "small", replace(SETTINGS, epochs=1, batch_size=4, accumulation=4), rows, dropout=0
    )
    assert large.steps == small.steps == 1
    assert small.train_loss == pytest.approx(large.train_loss, rel=1e-5)
    assert small.heldout_loss == pytest.approx(large.heldout_loss, rel=1e-4)


@pytest.mark.slow
def test_training_stops_when_the_heldout_loss_does_not_fall_and_says_so(base, tmp_path, caplog):
    settings = replace(SETTINGS, learning_rate=0.9, epochs=30, eval_every=1, patience=2, warmup=0.0)
    with caplog.at_level(logging.INFO):
        outcome = run(base, tmp_path / "out", settings)
    assert outcome.stopped_early
    assert outcome.steps == outcome.best_step + 2 < settings.steps(38)
    assert "stopped at step" in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit"])
def test_optimizers_for_a_cpu_learn(base, tmp_path, optimizer):
    outcome = run(base, tmp_path / "out", replace(SETTINGS, optimizer=optimizer))
    assert outcome.heldout_loss < outcome.heldout_loss_base - 0.1


def test_a_loss_that_is_no_number_stops_the_run_and_names_the_step(base, tmp_path):
    from safetensors.torch import load_file, save_file

    poisoned = tmp_path / "base"
    shutil.copytree(base, poisoned)
    weights = load_file(poisoned / "model.safetensors")
    weights["model.embed_tokens.weight"][10:12] = float("inf")
    save_file(weights, poisoned / "model.safetensors", metadata={"format": "pt"})
    clean = [row for row in tiny.rows(200, seed=1) if not {10, 11} & set(row.ids)][:6]
    bare = load_base(poisoned, method="lora", device="cpu")
    bare.lm_head.weight = torch.nn.Parameter(
        torch.randn(64, 32), requires_grad=False
    )  # untie: only inputs are bad
    tuned = models.attach(bare, resolve(bare), rank=4, alpha=8, dropout=0, rslora=False, seed=0)
    with pytest.raises(StageError, match=r"training broke at step \d+: loss nan"):
        loop.train(tuned, tiny.rows(38), clean, settings=SETTINGS, end_of_turn=tiny.END, out=tmp_path)


@pytest.fixture
def watch(tmp_path):
    """The watcher of a run of which nothing but the numbers is shown to it."""
    rows, model = tiny.rows(4), tiny.model("llama")
    watch = Watch(
        model, settings=replace(SETTINGS, eval_every=1000), steps=2000, tensorboard=tmp_path,
        measure=lambda: heldout.measure(model, rows, end_of_turn=tiny.END, batch_size=4),
    )  # fmt: skip
    watch.begin(0)
    return watch


def test_a_loss_that_does_not_move_stops_the_run(watch):
    for step in range(1, 20):
        watch.step_logged(step, 2.5, 1e-4, 1.0)
    with pytest.raises(StageError, match=r"the loss has been 2\.500000 for 20 steps, up to step 20"):
        watch.step_logged(20, 2.5, 1e-4, 1.0)


def test_a_loss_that_moves_a_little_goes_on(watch):
    for step in range(1, 60):
        watch.step_logged(step, 2.5 + step % 2 * 1e-6, 1e-4, 1.0)


def test_a_loss_that_vanishes_stops_the_run(watch):
    watch.step_logged(1, 2e-4, 1e-4, 1.0)
    with pytest.raises(StageError, match=r"fell to 5.0e-05 at step 2"):
        watch.step_logged(2, 5e-5, 1e-4, 1.0)


def test_a_gradient_that_overflows_stops_the_run(watch):
    with pytest.raises(StageError, match=r"step 1: loss 2.5, gradient norm inf"):
        watch.step_logged(1, 2.5, 1e-4, float("inf"))
