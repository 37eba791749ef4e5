"""One recipe, four formats: GGUF, AWQ and ONNX files of one tiny model, built, measured by what serves them, in one table."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.test_pipeline import RECIPE, edgeft

pytest.importorskip(
    "onnxruntime_genai", reason="the ONNX folder needs ONNX Runtime GenAI: pip install 'edgeft[onnx]'"
)
pytestmark = pytest.mark.slow

FORMATS = (
    RECIPE
    + """
[[quantize]]
kind = "awq"
group = 32
[[quantize]]
kind = "onnx"
"""
)
STRICT = FORMATS.replace("max_kld = 5\n", "max_kld = 1e-9\n")


@pytest.fixture(scope="module")
def formats(library, tiny_checkpoint, tmp_path_factory) -> Path:
    """A folder with the recipe, built."""
    folder = tmp_path_factory.mktemp("formats")
    (folder / "base").symlink_to(tiny_checkpoint)
    lines = (ROOT / "recipes/data/wordnet_medical_qa.jsonl").read_text().splitlines()
    (folder / "rows.jsonl").write_text("\n".join(lines[::50]) + "\n")
    (folder / "tiny.toml").write_text(FORMATS)
    done = edgeft("build", "tiny.toml", cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    (folder / "said.txt").write_text(done.stdout)
    return folder


def certificate(folder: Path, name: str = "tiny"):
    return json.loads((folder / f".edgeft/reports/{name}/certificate.json").read_text())


def test_four_formats_stand_in_one_table_one_report_and_one_certificate(formats):
    files = {f["title"]: f for f in certificate(formats)["files"]}
    assert len(files) == 4 and {"Q8_0", "Q4_0"} < files.keys()
    (awq,) = (f for title, f in files.items() if title.startswith("AWQ"))
    (onnx,) = (f for title, f in files.items() if title.startswith("ONNX"))
    assert awq["runtime"].startswith(("vLLM ", "transformers ")) and onnx["runtime"].startswith("ONNX Runtime GenAI ")  # fmt: skip
    for file in (awq, onnx):
        assert file["verdict"] == "PASS" and file["domain"]["tokens"] == files["Q8_0"]["domain"]["tokens"]
        assert [s["step"] for s in file["steps"]] == ["base", "trained", "merged", "quantized"]
        assert all(c["ok"] is not False for c in file["checks"]), [c for c in file["checks"] if c["ok"] is False]  # fmt: skip
        names = {c["name"] for c in file["checks"]}
        assert {"packed weights", "training in the weights", "served tokens", "served prompts", "BOS"} <= names  # fmt: skip
        assert len(file["answers"]) == 1 and file["retention"] is not None and file["bins"] and file["worst"]
    assert onnx["floor"]["pairs"][0]["what"] == "inputs of products in 8 bits / in float32"
    assert onnx["floor"]["largest"] > 0
    said, report = (
        (formats / "said.txt").read_text(),
        (formats / ".edgeft/reports/tiny/report.md").read_text(),
    )
    assert f"{awq['title']}: scored by what serves it" in said
    rows = [line for line in report.splitlines() if line.startswith(("| q8_0 |", "| q4_0 |", "| awq", "| onnx-"))]  # fmt: skip
    assert len(rows) >= 4 and all(line.endswith("PASS |") for line in rows[:4])
    assert f"{awq['runtime']}" in (formats / ".edgeft/reports/tiny/certificate.html").read_text()


def test_everything_of_it_is_in_the_store_afterwards(formats):
    done = edgeft("build", "tiny.toml", cwd=formats)
    assert done.returncode == 0 and "0 steps ran" in done.stdout


def test_a_folder_that_fails_its_gate_ends_the_build_as_a_file_does_and_nothing_is_left_out(formats):
    (formats / "strict.toml").write_text(STRICT)
    done = edgeft("build", "strict.toml", cwd=formats)
    assert done.returncode == 5, done.stdout + done.stderr
    found = certificate(formats, "strict")
    assert [f["verdict"] for f in found["files"]] == ["FAIL"] * 4 and found["verdict"] == "FAIL"
    assert {f["culprit"] for f in found["files"]} <= {"merged", "gguf", "quantized"}


def test_boards_are_told_apart_from_servers(formats):
    done = edgeft("verify", "tiny.toml", "--variant", "awq-g32", cwd=formats)
    assert done.returncode == 2 and "boards are asked about GGUF files" in done.stderr


def test_a_folder_can_be_certified_without_its_recipe_and_a_fault_in_it_is_found(formats, tmp_path):
    """The ONNX folder as it was built; and with the template of another model."""
    (store,) = (formats / ".edgeft/done").glob("quantize-onnx-*/model")
    (merged,) = (formats / ".edgeft/done").glob("merge-*/model")
    asked = ["--text", formats / "rows.jsonl", "--windows", 4, "--general-windows", 0, "--n-ctx", 64, "--questions", 1,
             "--max-kld", 5, "--max-ppl-ratio", 5, "--min-same-top", 0]  # fmt: skip
    done = edgeft("certify", merged, store, *asked, "--out", tmp_path / "fine", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "fine/certificate.json").read_text())
    assert found["files"][0]["runtime"] in found["provenance"].values()
    assert found["files"][0]["types"].keys() >= {"int4"}

    broken = shutil.copytree(store, tmp_path / "broken")
    path = broken / "chat_template.jinja"
    path.chmod(0o644)
    path.write_text(path.read_text().replace("assistant", "helper"))
    done = edgeft("certify", merged, broken, *asked, "--out", tmp_path / "bad", cwd=tmp_path)
    assert done.returncode == 5 and "another chat template" in done.stdout + done.stderr
