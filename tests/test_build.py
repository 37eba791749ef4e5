"""The build loop, on toy stages with real files and processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest

from edgeft.build import build, survey
from edgeft.errors import BusyError, DataError, ParityError, SetupError, StageError
from edgeft.plan import plan, why
from edgeft.stage import Needs
from tests.toy import TOY


@pytest.fixture
def go(toy, store):
    def run(stages=TOY, **options):
        steps = plan(*toy(stages), stages=stages, **options)
        return build(steps, store)

    return run


def ran(report):
    return [r.step.title for r in report.results if not r.cached and r.artifact]


def edit(recipe, old, new):
    text = recipe.read_text()
    assert old in text
    recipe.write_text(text.replace(old, new))


def test_a_second_build_runs_nothing(go):
    assert len(ran(go())) == 9
    assert ran(go()) == []


def test_a_change_reruns_only_what_stands_below_it(go, recipe):
    go()
    recipe.write_text(recipe.read_text() + "\n[gate]\nmax_kl = 0.5\n")
    assert ran(go()) == ["gate [q4]", "gate [q8]", "export/tar [q4]", "export/tar [q8]"]


def test_the_contents_of_a_source_file_are_in_the_key_and_its_time_is_not(go, recipe):
    go()
    rows = recipe.parent / "rows.txt"
    os.utime(rows, (1, 1))
    assert ran(go()) == []
    rows.write_text("x\ny\nz\n")
    assert len(ran(go())) == 8  # all but the device


def test_why_names_the_parameter_that_changed_and_the_inputs_above_it(go, recipe, toy, store):
    go()
    edit(recipe, "lr = 1e-4", "lr = 2e-4")
    steps = {s.title: s for s in plan(*toy(), stages=TOY)}
    assert why(steps["train"], store.manifests()) == ["params.lr: 0.0001 -> 0.0002"]
    assert why(steps["quantize/gguf [q4]"], store.manifests()) == ["inputs.train changed"]


def test_a_failed_gate_blocks_only_its_own_variant(go, recipe):
    recipe.write_text(recipe.read_text() + "\n[gate]\nmax_kl = 0.01\n")
    report = go()
    assert isinstance(report.error, ParityError) and report.error.exit_code == 5
    assert "quantize/gguf [q4]" in ran(report)
    assert "export/tar [q8]" in ran(report) and "export/tar [q4]" not in ran(report)


def test_a_crashed_training_goes_on_where_it_was(go, recipe):
    edit(recipe, "lr = 1e-4", "boom = true")
    assert isinstance(go().error, StageError)
    report = go()
    assert report.error is None
    assert next(r for r in report.results if r.step.title == "train").artifact.facts["resumed_at"] == 2


def test_a_stage_that_cannot_resume_starts_from_an_empty_directory(store, toy):
    step = next(s for s in plan(*toy(), stages=TOY) if s.title == "data")
    with store.workspace(step) as out:
        (out / "leftover").touch()
    with store.workspace(step) as out:
        assert not list(out.iterdir())


def test_a_corrupted_file_is_detected_by_its_hash_and_made_again(go, store, toy):
    first = go()
    data = next(r.artifact for r in first.results if r.step.title == "data")
    file = data.path / "train.txt"
    stat = file.stat()
    good = file.read_text()
    file.write_text(good[:-1] + "X")  # same length, and below the same times: only the hash can tell
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    trained = next(r.artifact for r in first.results if r.step.title == "train")
    (trained.path / "adapter").unlink()  # so that the damaged file would be read again
    assert set(ran(go())) == {"data", "train"}
    assert file.read_text() == good


def test_a_damaged_final_product_is_made_again(go, store):
    first = go()
    bundle = next(r.artifact for r in first.results if r.step.title == "export/tar [q8]").path / "bundle"
    stat = bundle.stat()
    bundle.write_text("X" * stat.st_size)
    os.utime(bundle, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert ran(go()) == ["export/tar [q8]"]


def test_an_error_and_its_hint_cross_the_process_border(go, recipe):
    (recipe.parent / "rows.txt").write_text("")
    apart = tuple(replace(s, extra="apart") if s.name == "data" else s for s in TOY)
    error = go(stages=apart).error
    assert isinstance(error, DataError)
    assert (str(error), error.hint, error.exit_code) == ("rows.txt is empty", "add a row", 8)


def test_a_killed_stage_is_called_killed(go, recipe, tmp_path):
    from tests import toy as module

    apart = tuple(replace(s, extra="apart", run=_suicide) if s.name == "train" else s for s in module.TOY)
    error = go(stages=apart).error
    assert isinstance(error, StageError) and "was killed by SIGKILL" in str(error) and "memory" in error.hint


def _suicide(job):
    os.kill(os.getpid(), signal.SIGKILL)


def test_progress_comes_out_of_the_process(go, toy, store):
    from edgeft.build import Silent

    class Keeper(Silent):
        def progressed(self, step, progress):
            seen.append(progress)

    seen = []
    apart = tuple(replace(s, extra="apart") if s.name == "train" else s for s in TOY)
    build(plan(*toy(apart), stages=apart), store, Keeper())
    assert [p.done for p in seen] == [1, 2, 3, 4] and seen[0].numbers == {"loss": 1.0}


def test_too_little_disk_is_predicted_before_anything_runs(go, store):
    huge = tuple(
        replace(s, estimate=lambda step, have: Needs(disk_mb=10**9)) if s.name == "train" else s for s in TOY
    )
    with pytest.raises(
        SetupError, match=r"will write about 1,000,000,020 MB .* are free there \(train 1,000,000,000 MB"
    ):
        go(stages=huge)
    assert not (store.root / "done").exists()


def test_too_little_memory_is_predicted_before_anything_runs(go):
    huge = tuple(
        replace(s, estimate=lambda step, have: Needs(ram_mb=10**9)) if s.name == "train" else s for s in TOY
    )
    with pytest.raises(SetupError, match="train will need about 1,000,000,000 MB of memory"):
        go(stages=huge)


def test_a_missing_package_is_named_before_anything_runs(go, monkeypatch):
    from edgeft import build as module

    monkeypatch.setitem(module.EXTRAS, "apart", ("no_such_package_here",))
    apart = tuple(replace(s, extra="apart") if s.name == "train" else s for s in TOY)
    with pytest.raises(SetupError, match="train needs the package no_such_package_here"):
        go(stages=apart)


def test_what_a_finished_step_reveals_can_stop_the_build_before_the_next(go):
    from edgeft.errors import FitError

    def refuse(step, artifacts):
        if len(artifacts) >= 2:
            raise FitError("too large after all")

    picky = tuple(replace(s, check=refuse) if s.name == "train" else s for s in TOY)
    report = go(stages=picky)
    assert isinstance(report.error, FitError)
    assert ran(report) == ["device"] or "train" not in ran(report)


def test_two_builds_of_one_recipe_at_once_are_refused(store):
    with store.building("toy"), pytest.raises(BusyError, match=rf"another edgeft process \(pid {os.getpid()}\)"), \
            store.building("toy"):  # fmt: skip
        pass


def test_upto_a_variant_builds_only_that_branch(go):
    assert ran(go(upto="q8")) == [
        "device",
        "data",
        "train",
        "quantize/gguf [q8]",
        "gate [q8]",
        "export/tar [q8]",
    ]


KILLED = """
import sys
from pathlib import Path
from edgeft.build import build
from edgeft.plan import plan
from edgeft.recipe import load
from edgeft.store import Store
from tests.toy import TOY
recipe = Path(sys.argv[1])
tables = load(recipe, stages=TOY), load(recipe.parent / "board.toml", per_target=True, stages=TOY)
build(plan(*tables, stages=TOY), Store(recipe.parent / "store"))
"""


def test_kill_9_leaves_nothing_half_written_and_the_next_build_finishes(recipe, store, go):
    edit(recipe, "lr = 1e-4", "pause = 0.1\nsteps = 20")
    child = subprocess.Popen([sys.executable, "-c", KILLED, str(recipe)])
    deadline = time.monotonic() + 60
    while not list((store.root / "work").glob("*/step")) and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.5)
    child.kill()
    child.wait()
    finished = list((store.root / "done").glob("*"))
    assert finished and all(
        json.loads((p / "edgeft.json").read_text())["files"] is not None for p in finished
    )
    edit(recipe, "pause = 0.1\nsteps = 20", "pause = 0.1\nsteps = 20 ")  # the same recipe
    report = go()
    assert report.error is None
    assert next(r for r in report.results if r.step.title == "train").artifact.facts["resumed_at"] >= 1


def test_survey_writes_nothing(toy, store):
    assert survey(plan(*toy(), stages=TOY), store) == {}
    assert not store.root.exists()


def test_sweep_keeps_what_is_planned_and_deletes_the_rest(go, recipe, toy, store):
    go()
    edit(recipe, "lr = 1e-4", "lr = 3e-4")
    go()
    keep = {s.key for s in plan(*toy(), stages=TOY)}
    gone = {p.name.rsplit("-", 1)[0] for p, _ in store.sweep(keep)}
    assert gone >= {"train", "quantize-gguf", "gate", "export-tar"} and "data" not in gone
    assert ran(go()) == []


def test_sweep_refuses_a_folder_that_edgeft_did_not_make(store):
    from edgeft.errors import EdgeftError

    (store.root / "done" / "precious-0").mkdir(parents=True)
    with pytest.raises(EdgeftError, match=r"CACHEDIR\.TAG"):
        store.sweep(set())
    assert (store.root / "done" / "precious-0").exists()


def test_too_little_gpu_memory_is_predicted_before_anything_runs(go, tmp_path, monkeypatch):
    """A stand-in for nvidia-smi, which no machine without a GPU has, answers as the real one does."""
    (tmp_path / "bin").mkdir()
    fake = tmp_path / "bin" / "nvidia-smi"
    fake.write_text("#!/bin/sh\necho 12288\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    large = tuple(
        replace(s, estimate=lambda step, have: Needs(vram_mb=20_000)) if s.name == "train" else s for s in TOY
    )
    with pytest.raises(SetupError, match="will need about 20,000 MB of GPU memory; this GPU has 12,884 MB"):
        go(stages=large)
