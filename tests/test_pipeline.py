"""The whole pipeline, real in every part but the size of the model: recipe to packed, answering file."""

from __future__ import annotations

import hashlib
import json
import math
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

from edgeft.stages import STAGES
from tests.conftest import PYTHONPATH, ROOT

pytestmark = pytest.mark.slow

RECIPE = """
target = "laptop"
[base]
path = "base"
licence = "CC0-1.0"
[data]
source = "rows.jsonl"
holdout = 12
[train]
method = "qlora"
max_steps = 8
batch_size = 4
learning_rate = 5e-3
checkpoint_every = 2
[imatrix]
chunks = 2
[[quantize]]
kind = "gguf"
type = "Q8_0"
[[quantize]]
kind = "gguf"
type = "Q4_0"
[reference]
windows = 3
n_ctx = 64
general_windows = 2
questions = 1
answer_tokens = 8
[verify]
floor_windows = 1
[gate]
max_kld = 5
max_ppl_ratio = 5
min_same_top = 0
min_retention = -5
"""


def edgeft(*args, cwd, **env):
    return subprocess.run(
        [sys.executable, "-m", "edgeft", *map(str, args)], cwd=cwd, text=True, capture_output=True, check=False, timeout=900,
        env={**os.environ, "PYTHONPATH": PYTHONPATH, **env},
    )  # fmt: skip


@pytest.fixture(scope="session")
def project(library, tiny_checkpoint, tmp_path_factory) -> Path:
    """A folder as a user has it: a recipe, a data file, a base."""
    folder = tmp_path_factory.mktemp("a project")
    (folder / "base").symlink_to(tiny_checkpoint)
    lines = (ROOT / "recipes/data/wordnet_medical_qa.jsonl").read_text().splitlines()
    (folder / "rows.jsonl").write_text("\n".join(lines[::50]) + "\n")
    (folder / "tiny.toml").write_text(RECIPE)
    return folder


@pytest.fixture(scope="session")
def built(project) -> Path:
    """The project, built in one go; its store."""
    done = edgeft("build", "tiny.toml", cwd=project)
    assert done.returncode == 0, done.stdout + done.stderr
    return project / ".edgeft"


def results(store: Path) -> dict[str, dict[str, str]]:
    """For each step its files' sha256, but for what holds times of day or durations."""
    found = {}
    for manifest in store.glob("done/*/edgeft.json"):
        known = json.loads(manifest.read_text())
        varying = ("tensorboard", "curve.jsonl") if known["stage"] == "train" else ()
        found[manifest.parent.name] = {
            n: f["sha256"] for n, f in known["files"].items() if not n.startswith(varying or "\0")
        }
    return found


def facts(store: Path, stage: str) -> list[dict]:
    manifests = [json.loads(p.read_text()) for p in store.glob("done/*/edgeft.json")]
    return [m["facts"] for m in manifests if m["stage"] == stage]


def test_a_second_build_takes_everything_from_the_store(project, built):
    done = edgeft("build", "tiny.toml", cwd=project)
    assert done.returncode == 0 and "0 steps ran" in done.stdout


def test_training_lowers_the_held_out_loss_and_the_report_says_so(built):
    train = facts(built, "train")[0]
    assert train["heldout_loss"] < train["heldout_loss_base"] - 0.05
    report = (built / "reports/tiny/report.md").read_text()
    assert (
        f"**{train['heldout_loss_base']:.3f}** (base) → **{train['heldout_loss']:.3f}** (trained)" in report
    )
    assert "| expected |" in report and "| base |" in report and "| shipped (q8_0) |" in report


def test_files_are_measured_against_the_trained_model_and_eight_bits_lose_less_than_four(built):
    by_bits = sorted((f["comparisons"]["domain"] for f in facts(built, "verify")), key=lambda f: f["kld"])
    assert len(by_bits) == 2 and by_bits[0]["kld"] < by_bits[1]["kld"] < by_bits[1]["kld_bound"]
    types = {f["type"]: f["types"] for f in facts(built, "quantize/gguf")}
    assert "Q8_0" in types["Q8_0"] and "Q4_0" in types["Q4_0"]


def test_both_merges_were_measured_and_the_one_into_what_was_trained_on_is_the_trained_model(built):
    (merge,) = facts(built, "merge")
    candidates = merge["candidates"]
    assert candidates.keys() == {"original", "dequantized"} and merge["merge_base"] in candidates
    assert candidates["dequantized"]["kld"] < candidates["original"]["kld"]


def test_the_certificate_follows_the_model_from_training_to_each_file(built):
    document = json.loads((built / "reports/tiny/certificate.json").read_text())
    assert document["verdict"] == "PASS" and [f["name"] for f in document["files"]] == ["q8_0", "q4_0"]
    for file in document["files"]:
        assert [s["step"] for s in file["steps"]] == ["base", "trained", "merged", "gguf", "quantized"]
        assert {c["step"] for c in file["checks"]} == {"text", "merged", "gguf", "quantized", "served"}
        assert all(c["ok"] for c in file["checks"]), [c for c in file["checks"] if not c["ok"]]
        assert file["general"]["tokens"] > 0 and file["memory_mb"] > 0
    assert document["files"][1]["floor"] and document["merges"]["chosen"]
    page = (built / "reports/tiny/certificate.html").read_text()
    assert "PASS" in page and "http-equiv" in page and document["files"][0]["sha256"] in page


def test_the_bundle_holds_the_model_and_where_everything_came_from(built):
    import zstandard

    bundle = next(built.glob("done/export-bundle-*/bundle.tar.zst"))
    with bundle.open("rb") as f, zstandard.ZstdDecompressor().stream_reader(f) as raw, \
            tarfile.open(fileobj=raw, mode="r|") as archive:  # fmt: skip
        names = [Path(m.name).name for m in archive]
    assert {"model.gguf", "manifest.json", "Modelfile", "certificate.html", "certificate.json"} <= set(names)


def test_chat_answers_from_the_built_model(project, built):
    done = edgeft("chat", "tiny.toml", "What is anemia?", "--max-tokens", "8", cwd=project)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_a_gate_that_is_not_met_ends_with_5_and_keeps_the_numbers(project, built):
    (project / "strict.toml").write_text(RECIPE.replace("max_kld = 5", "max_kld = 1e-9"))
    done = edgeft("build", "strict.toml", cwd=project)
    assert done.returncode == 5, done.stdout + done.stderr
    assert "KL divergence" in done.stderr and "is beyond the limit of 1.0e-09" in done.stderr
    assert "FAIL" in done.stdout and "FAIL" in (built / "reports/strict/report.md").read_text()
    assert "FAIL" in (built / "reports/strict/certificate.html").read_text()
    refused = edgeft("chat", "strict.toml", "Hi", cwd=project)
    assert refused.returncode == 1 and "has no finished model" in refused.stderr


def test_a_limit_within_the_error_of_measurement_ends_with_6_and_says_what_would_decide(project, built):
    least = min(facts(built, "verify"), key=lambda f: f["comparisons"]["domain"]["kld"])["comparisons"]
    value = 1.2 * max(text["kld"] for text in least.values())
    four_bits = '[[quantize]]\nkind = "gguf"\ntype = "Q4_0"\n'
    (project / "open.toml").write_text(
        RECIPE.replace(four_bits, "").replace("max_kld = 5", f"max_kld = {value}")
    )
    done = edgeft("build", "open.toml", cwd=project)
    assert done.returncode == 6, done.stdout + done.stderr
    assert "is UNDECIDED" in done.stderr and "more windows would decide" in done.stderr


ONE = RECIPE.replace('[[quantize]]\nkind = "gguf"\ntype = "Q8_0"\n', "")
"""The recipe with its four-bit file only."""


@pytest.fixture(scope="session")
def adapted(project) -> Path:
    """The project built with mode B; its store."""
    (project / "adapted.toml").write_text(ONE.replace('"qlora"', '"grid-adapter"'))
    done = edgeft("build", "adapted.toml", "--store", "grid", cwd=project)
    assert done.returncode == 0, done.stdout + done.stderr
    return project / "grid"


def test_with_grid_adapter_base_and_adapter_ship_and_say_what_training_said(project, adapted):
    (verified,) = facts(adapted, "verify")
    assert verified["comparisons"]["domain"]["kld"] < 1e-4 and verified["floor"]["largest"] >= 0
    (packed,), (trained,) = facts(adapted, "pack"), facts(adapted, "train")
    assert (
        trained["started_from"] == "base in Q4_0" and packed["adapter"]["layers"] == trained["adapted_layers"]
    )
    assert trained["heldout_loss"] < trained["heldout_loss_base"] - 0.05
    bundle = next(adapted.glob("done/export-bundle-*"))
    assert {"model.gguf", "adapter.gguf"} <= {
        Path(name).name for name in facts(adapted, "export/bundle")[0]["files"]
    }
    assert json.loads((bundle / "manifest.json").read_text())["adapter"]
    document = json.loads((adapted / "reports/adapted/certificate.json").read_text())
    (file,) = document["files"]
    assert [s["step"] for s in file["steps"]] == ["base", "trained", "quantized"]
    assert {c["step"] for c in file["checks"]} == {"text", "gguf", "quantized", "served"}
    assert all(c["ok"] for c in file["checks"]) and packed["adapter"]["base_sha256"]


def test_with_grid_adapter_the_gain_is_told_against_the_base_in_16_bits(project, adapted):
    (project / "plain.toml").write_text(ONE.replace('"qlora"', '"lora"'))
    done = edgeft("build", "plain.toml", "--store", "grid", "--upto", "reference", cwd=project)
    assert done.returncode == 0, done.stdout + done.stderr
    one, other = (f["ppl_base"] for f in facts(adapted, "reference"))
    assert one == pytest.approx(other, rel=1e-6)


def test_chat_loads_the_adapter_that_lies_beside_the_model(project, adapted):
    question = ("What is anemia?", "--max-tokens", "8", "--store", "grid")
    tuned = edgeft("chat", "adapted.toml", *question, cwd=project)
    bare = edgeft("chat", next(adapted.glob("done/quantize-grid-*/model.gguf")), *question, cwd=project)
    assert tuned.returncode == bare.returncode == 0, tuned.stderr + bare.stderr
    assert tuned.stdout != bare.stdout


@pytest.fixture(scope="session")
def tuned(project) -> Path:
    """The project built with mode C; its store."""
    more = ONE.replace('"qlora"', '"grid-merged"').replace("max_steps = 8", "max_steps = 16")
    (project / "tuned.toml").write_text(more)
    done = edgeft("build", "tuned.toml", "--store", "tuned", cwd=project)
    assert done.returncode == 0, done.stdout + done.stderr
    return project / "tuned"


def test_with_grid_merged_the_same_file_with_other_codes_says_more_of_what_was_taught(project, tuned):
    (tune,), (start,) = facts(tuned, "tune"), facts(tuned, "quantize/gguf")
    (verified,) = facts(tuned, "verify")
    assert (tune["bytes"], tune["types"]) == (start["bytes"], start["types"])
    assert tune["training"]["steps"] == 12  # grid_share is three quarters
    assert all(c["ok"] for c in tune["checks"]) and "trained tensors" in {c["name"] for c in tune["checks"]}
    moved = verified["over_start"]["domain"]
    assert moved["loss"] < moved["start"] - 0.02 and moved["low"] <= moved["change"] <= moved["high"]
    assert verified["comparisons"]["domain"]["kld"] < 1e-4
    (before,) = facts(tuned, "start")
    assert before["comparisons"]["domain"]["ppl"] == pytest.approx(math.exp(moved["start"]))


def test_with_grid_merged_the_report_has_both_files_and_the_certificate_the_tuned_one(project, tuned):
    report = (tuned / "reports/tuned/report.md").read_text()
    assert "| q4_0, before the rounding was trained |" in report and "\n| q4_0 | " in report
    assert "## What training through the rounding changed" in report
    (file,) = json.loads((tuned / "reports/tuned/certificate.json").read_text())["files"]
    assert [s["step"] for s in file["steps"]] == ["base", "trained", "quantized"]
    assert any("training through the rounding changed the loss" in note for note in file["notes"])
    assert all(c["ok"] for c in file["checks"])
    (made,) = tuned.glob("done/tune-*/model.gguf")
    assert file["sha256"] == hashlib.sha256(made.read_bytes()).hexdigest()
    shown = edgeft("show", "tuned.toml", "tune", "--store", "tuned", cwd=project)
    assert '"learn_scales": false' in shown.stdout


def test_kill_9_in_every_stage_and_the_same_command_ends_with_the_same_bytes(project, built):
    """Kills the build the first time it starts each stage; training also in the middle."""
    killed: set[str] = set()
    command = [sys.executable, "-u", "-m", "edgeft", "build", "tiny.toml", "--store", "killed"]
    for _ in range(3 * len(STAGES)):
        victim = kill_in_a_new_stage(command, project, killed)
        if victim is None:
            break
        killed.add(victim)
    ran = {json.loads(m.read_text())["stage"] for m in built.glob("done/*/edgeft.json")}
    assert {name.split(" ")[0] for name in killed} >= {s.id for s in STAGES if s.extra and s.id in ran}
    done = edgeft("build", "tiny.toml", "--store", "killed", cwd=project)
    assert done.returncode == 0, done.stdout + done.stderr
    assert results(project / "killed") == results(built)
    assert any(f["resumed_from"] > 0 for f in facts(project / "killed", "train"))


def kill_in_a_new_stage(command, cwd, killed) -> str | None:
    """Start a build and kill -9 it in the first stage that was not killed yet; None when there is none left."""
    with subprocess.Popen(command, cwd=cwd, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          env={**os.environ, "PYTHONPATH": PYTHONPATH}) as process:  # fmt: skip
        assert process.stdout
        for line in process.stdout:
            if line.endswith(" …\n") and (title := line.strip(" …\n")) not in killed:
                if title == "train":
                    wait_for_a_checkpoint(cwd / "killed", process)
                else:
                    time.sleep(0.1 + 0.2 * (len(killed) % 4))  # shorter than the shortest of these steps
                process.kill()
                return title
    return None


def wait_for_a_checkpoint(store: Path, process) -> None:
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and process.poll() is None:
        if list(store.glob("work/*/checkpoints/*")):
            time.sleep(0.2)
            return
        time.sleep(0.05)


def test_update_signs_what_was_built_and_sends_an_adapter_alone_where_the_base_stays(project, built, adapted):
    assert edgeft("keys", "new", "keys", cwd=project).returncode == 0
    first = edgeft("update", "tiny.toml", "--keys", "keys", "--label", "1.0", cwd=project)
    assert first.returncode == 0, first.stdout + first.stderr
    other = edgeft("update", "adapted.toml", "--store", "grid", "--keys", "keys", cwd=project)
    assert "model.gguf: whole" in first.stdout and "sequence 1, full" in first.stdout
    assert "sequence 1, full" in other.stdout, other.stderr  # of another model: its base's name
    manifests = adapted.glob("done/export-bundle-*/manifest.json")
    bundle = next(m for m in manifests if '"adapter.gguf"' in m.read_text()).with_name("bundle.tar.zst")
    more = ("--from", bundle, "--kind", "adapter")
    lone = edgeft("update", "adapted.toml", "--store", "grid", "--keys", "keys", *more, cwd=project)
    assert lone.returncode == 0, lone.stderr
    # That very adapter is on the device already; nothing of the model needs to go along.
    assert "model.gguf: stays as it is on the device" in lone.stdout and "adapter.gguf: stays" in lone.stdout
    unknown = edgeft("update", "tiny.toml", "--keys", "keys", "--variant", "q2_k", cwd=project)
    assert unknown.returncode == 2 and "q4_0" in unknown.stderr
    unbuilt = edgeft("update", "tiny.toml", "--keys", "keys", "--store", "nothing", cwd=project)
    assert unbuilt.returncode == 1 and "edgeft build tiny.toml" in unbuilt.stderr


def test_show_tells_a_step_and_clean_keeps_what_was_built(project, built):
    shown = edgeft("show", "tiny.toml", "train", cwd=project)
    assert '"heldout_loss"' in shown.stdout and '"rank": 16' in shown.stdout
    (built / "done" / "left-0123456789abcdef").mkdir()
    swept = edgeft("clean", cwd=project)
    assert swept.returncode == 0 and "left-0123456789abcdef" in swept.stdout
    assert "0 steps ran" in edgeft("build", "tiny.toml", cwd=project).stdout


def test_ctrl_c_ends_with_130_and_says_that_the_same_command_goes_on(project, built):
    with subprocess.Popen(
        [sys.executable, "-u", "-m", "edgeft", "build", "tiny.toml", "--store", "stopped"], cwd=project, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "PYTHONPATH": PYTHONPATH},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509  a job in the background ignores it
    ) as process:  # fmt: skip
        assert process.stdout and process.stderr
        for line in process.stdout:
            if line.strip() == "base …":
                time.sleep(1)
                process.send_signal(signal.SIGINT)
                break
        process.stdout.read()
        said = process.stderr.read()
    assert process.returncode == 130
    assert "stopped; the same command goes on from here" in said and "Traceback" not in said


@pytest.mark.gpu
def test_on_a_gpu_the_same_recipe_trains_in_nf4_with_a_paged_optimizer(project):
    done = edgeft("build", "tiny.toml", "--store", "gpu", cwd=project, EDGEFT_DEVICE="cuda")
    assert done.returncode == 0, done.stdout + done.stderr
    train = facts(project / "gpu", "train")[0]
    assert (train["device_kind"], train["optimizer"]) == ("cuda", "paged_adamw_8bit")
    assert train["heldout_loss"] < train["heldout_loss_base"] - 0.05
    found = [f["comparisons"]["domain"] for f in facts(project / "gpu", "verify")]
    assert all(f["kld"] < f["kld_bound"] for f in found)
