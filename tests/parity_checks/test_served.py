"""A folder that another runtime serves, beside GGUF files: one certificate, one table, one report; boards are not asked."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from edgeft.errors import RecipeError
from edgeft.parity import collected, evidence, page
from edgeft.parity.certificate import load
from edgeft.parity.evidence import Reference
from edgeft.parity.gates import Limits
from edgeft.parity.page.table import table
from edgeft.parity.suite import Text
from tests.parity_checks import sample
from tests.parity_checks.made_up import all_of, scores

VLLM = "vLLM 0.32.0, CPU, float16"


@dataclass
class Made:
    path: Path
    facts: dict[str, Any] = field(default_factory=dict)


@pytest.fixture
def made(tmp_path):
    """What the steps of an AWQ folder leave, with made-up scores."""
    found = scores(kld=0.01, agree=0.97)
    text = Text(name="domain", n_ctx=129, ids=[[100 + w] * 129 for w in range(24)], counted=all_of(found))
    said = Reference(texts={"domain": text}, nll={"domain": found.nll_base}, base=found.nll_base + 1)
    steps = {name: tmp_path / name for name in ("reference", "merge", "verify")}
    for path in steps.values():
        path.mkdir()
    np.savez(steps["reference"] / "reference.npz", **said.arrays())
    np.savez(steps["merge"] / "scores.npz", **evidence.as_arrays({"domain": found}))
    np.savez(steps["verify"] / "scores.npz", **evidence.as_arrays({"domain": found}))
    checks = [{"step": "quantized", "name": "packed weights", "codes": ("C-36",), "ok": True, "said": "all"}]
    verified = {
        "comparisons": {"domain": said.compare({"domain": found})["domain"].facts()}, "worst": [], "answers": [],
        "retention": said.retention(found).facts(), "manners": [], "floor": None, "sha256": "ab" * 32, "runtime": VLLM,
        "checks": [{**checks[0], "name": "served tokens", "step": "served"}],
    }  # fmt: skip
    awq = {"type": "AWQ g64", "format": "awq", "bytes": 10**8, "bits_per_weight": 6.8, "types": {"int4": 2}, "checks": checks}  # fmt: skip
    return {
        "reference": Made(steps["reference"], {"title": "the model", "texts": [text.facts()]}),
        "merge": Made(steps["merge"], {"merge_base": "original"}), "quantize/served": Made(tmp_path, awq),
        "verify/served": Made(steps["verify"], verified),
    }  # fmt: skip


def test_a_folders_part_says_by_what_it_was_scored_and_has_no_step_of_gguf(made):
    file = collected.file(made, Limits.of("parity"))
    assert (file.title, file.runtime, file.verdict) == ("AWQ g64", VLLM, "PASS")
    assert [s.step for s in file.steps] == ["base", "trained", "merged", "quantized"]
    assert file.steps[-1].title == f"AWQ g64, served by {VLLM}"
    assert [c.name for c in file.checks] == ["packed weights", "served tokens"], "what was proven on the bytes counts too"  # fmt: skip
    assert "was not measured here" in file.notes[0] and VLLM in file.notes[0]
    found = collected.certificate(
        [file], made, name="x", command="", target={}, when="", versions={}, keys={"gate": "1"}
    )
    assert found.provenance["runtime of AWQ g64"] == VLLM and load(found.as_json()).files[0].runtime == VLLM


def test_a_failed_check_of_the_runtime_fails_the_folder_at_serving(made):
    made["verify/served"].facts["checks"][0]["ok"] = False
    file = collected.file(made, Limits.of("parity"))
    assert (file.verdict, file.culprit) == ("FAIL", "served")


def test_another_kind_of_processor_is_told_without_llama_cpps_tools(made, monkeypatch):
    import platform

    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    file = collected.file(made, Limits.of("parity"))
    found = replace(sample.bare(), files=[file])
    there = collected.aimed(found, {"name": "pi-5-8gb", "arch": "arm64", "memory_mb": 6000})
    assert there.files[0].notes[-1].startswith("scored on amd64; pi-5-8gb is arm64")
    assert "llama-perplexity" not in there.files[0].notes[-1]


@pytest.fixture
def mixed():
    """A certificate of which one file is a folder."""
    found = sample.certificate()
    awq = replace(found.files[1], title="AWQ g64", runtime=VLLM, memory_mb=None)
    return replace(found, files=[found.files[0], awq])


def test_one_table_holds_both_and_says_who_scored_the_folder(mixed):
    out = Console(file=io.StringIO(), width=80)
    out.print(table(mixed))
    said = out.file.getvalue()
    assert f"AWQ g64: scored by what serves it, {VLLM}" in said and "Q8_0:" not in said
    rows = [line.split()[0] for line in said.splitlines() if "PASS" in line or "UNDECIDED" in line]
    assert "Q8_0" in rows and "AWQ" in rows


def test_the_page_says_it_too_and_does_not_count_memory_that_nobody_predicted(mixed):
    html = page.render(mixed)
    assert f"Scored by what serves it, {VLLM}." in html
    assert "what AWQ g64 would need there was not predicted" in html


def test_certificates_from_before_other_runtimes_still_load():
    document = json.loads(json.dumps(sample.certificate().as_json()))
    assert not any("runtime" in file for file in document["files"]), "their part stays as it was, to the byte"
    assert {f.runtime for f in load(document).files} == {"llama.cpp"}


def step(stage, variant, state="made", error=None, **facts):
    return {"step": f"{stage} [{variant}]", "stage": stage, "variant": variant, "key": "0", "state": state,
            "seconds": 1.0, "error": error, "path": None, "facts": facts}  # fmt: skip


def test_the_report_has_one_table_for_all_formats_and_the_siblings_of_a_failed_one():
    from edgeft.report import as_markdown

    made = {"bytes": 10**8, "bits_per_weight": 5.0, "types": {"int4": 210}}
    number = {"comparisons": {"domain": {"ppl_ratio": 1.1, "ppl_ratio_bound": 1.2, "kld": 0.1, "kld_bound": 0.2, "same_top": 0.9}},
              "retention": {"retention": 0.8}}  # fmt: skip
    steps = [
        step("quantize/gguf", "q4_0", type="Q4_0", **made), step("quantize/awq", "awq-g64", type="AWQ g64", format="awq", **made),
        step("quantize/onnx", "onnx-int4", type="ONNX int4", format="onnx", **made),
        step("verify", "q4_0", **number), step("verify/served", "awq-g64", runtime=VLLM, **number),
        step("verify/served", "onnx-int4", state="failed", error="ONNX Runtime stopped"), step("gate", "q4_0"),
        step("gate/served", "awq-g64", state="failed", error="AWQ g64 is UNDECIDED: …"), step("gate/served", "onnx-int4", state="not tried"),
    ]  # fmt: skip
    said = as_markdown(
        {"recipe": "r", "target": "", "ok": False, "error": "x", "machine": "m", "steps": steps}
    )
    lines = [line for line in said.splitlines() if line.startswith(("| q4_0 |", "| awq-g64 |", "| onnx-int4 |"))]  # fmt: skip
    assert [line.rsplit("|", 2)[1].strip() for line in lines] == ["PASS", "UNDECIDED", "—"]
    assert "80%" in lines[1] and "—" in lines[2] and f"awq-g64 by {VLLM}; the others by llama.cpp" in said


def test_a_board_is_not_asked_about_a_folder_and_the_reason_is_said(tmp_path, store):
    from edgeft.commands.verifying import shipped
    from edgeft.plan import plan
    from edgeft.recipe import load as read
    from tests.test_plan import OTHER, RECIPE
    from tests.test_plan import served_stages as stages

    assert OTHER in stages()
    (tmp_path / "base").mkdir()
    (tmp_path / "rows.jsonl").write_text("{}\n")
    recipe = tmp_path / "r.toml"
    recipe.write_text(RECIPE.format(method="lora") + '[[quantize]]\nkind = "other"\n')
    steps = plan(read(recipe, stages=stages()), stages=stages())
    with pytest.raises(RecipeError, match="other-g64: this folder was scored by its own runtime") as caught:
        shipped(recipe, steps, store, "other-g64")
    assert caught.value.hint == "choose from q4_0, q8_0"
    alone = [s for s in steps if s.variant not in ("q4_0", "q8_0")]
    with pytest.raises(RecipeError, match="no GGUF file that could be verified") as caught:
        shipped(recipe, alone, store, "")
    assert "boards are asked about GGUF files" in caught.value.hint


def test_noise_that_cannot_be_measured_is_none_and_leaves_nothing_behind(tmp_path, monkeypatch):
    from edgeft.errors import SetupError
    from edgeft.parity import noise, served

    native = tmp_path / "native.f32"
    native.write_bytes(b"")
    asked = ([[1] * 32], native, "transformers 5.23.0, CPU", tmp_path)
    assert noise.floor("awq", tmp_path, *asked) is None and not native.exists()

    def refuses(folder, n_ctx):
        raise SetupError("no such kernel")

    monkeypatch.setitem(served.RUNTIMES, "awq", {"transformers": refuses})
    monkeypatch.setitem(served.MISSING, "transformers", lambda: "")
    assert noise.floor("awq", tmp_path, [[1] * 32], native, VLLM, tmp_path) is None


def test_an_onnx_folder_that_cuda_computed_is_held_against_the_cpu_and_not_against_another_accuracy(
    tmp_path, monkeypatch
):
    from edgeft.llamacpp import kernels
    from edgeft.onnx import session as onnx
    from edgeft.parity import noise, served

    def logits(ids):
        return np.random.default_rng(sum(ids)).standard_normal((len(ids), 40)).astype(np.float32)

    class Opened:
        said, n_vocab = "ONNX Runtime GenAI 0.18.0, CPU (the folder is made for cuda)", 40

        def __init__(self, folder, device):
            assert device == "cpu"

        def logits(self, ids):
            return logits(ids) * np.float32(1.01)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(onnx, "Session", Opened)
    window, native = list(range(32)), tmp_path / "native.f32"
    speaker = served.Served(type("Cuda", (), {"n_vocab": 40, "logits": staticmethod(logits)})())
    kernels.remembered(speaker.logits, 1, native)(window)
    found = noise.floor("onnx", tmp_path, [window], native, "ONNX Runtime GenAI 0.18.0, CUDA", tmp_path)
    (pair,) = found["pairs"]
    assert (
        pair["what"] == "CUDA / CPU"
        and pair["kernels"] == Opened.said
        and found["kernels"].endswith(", CUDA")
    )
    assert pair["kld"] > 0 and list(tmp_path.iterdir()) == []


def test_noise_is_what_two_computations_of_the_same_windows_differ_by(tmp_path, monkeypatch):
    from edgeft.llamacpp import kernels
    from edgeft.parity import noise, served

    class Second:
        said, n_vocab = "transformers 5.23.0, CPU", 40

        def logits(self, ids):
            return first(ids) + np.float32(0.01) * np.cos(np.arange(40, dtype=np.float32))

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

    def first(ids):
        return np.random.default_rng(sum(ids)).standard_normal((len(ids), 40)).astype(np.float32)

    monkeypatch.setitem(served.RUNTIMES, "awq", {"transformers": lambda folder, n_ctx: Second()})
    monkeypatch.setitem(served.MISSING, "transformers", lambda: "")
    windows, native = [list(range(32)), list(range(5, 37))], tmp_path / "native.f32"
    speaker = served.Served(type("First", (Second,), {"logits": staticmethod(first)})())
    speak = kernels.remembered(speaker.logits, 2, native)
    for window in windows:
        speak(window)
    found = noise.floor("awq", tmp_path, windows, native, VLLM, tmp_path)
    assert found["pairs"][0]["what"] == "vLLM / torch" and found["tokens"] == 30 and found["kernels"] == VLLM
    assert 1e-5 < found["largest"] < 1e-4 and not native.exists()
