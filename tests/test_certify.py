"""Certificates of files that edgeft did not build: planted faults, each found at its step, and no false alarm."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest

from edgeft.errors import DataError, ParityError, SetupError
from tests.conftest import PYTHONPATH, ROOT, ensure
from tests.llamacpp.test_imatrix import quantize_f16
from tests.parity_checks import faults


def test_the_command_can_be_repeated_as_it_stands_in_the_certificate():
    from pathlib import Path

    from edgeft.commands.certifying import command_line

    given = {
        "via": [Path("a b"), Path("c.gguf")],
        "board_logs": [Path("pi.log")],
        "adapter": None,
        "windows": 32,
        "qlora": True,
        "keep-base": False,
        "max_kld": 0.1,
    }
    said = command_line(Path("base"), Path("q4.gguf"), given)
    assert (
        said
        == "edgeft certify base q4.gguf --via 'a b' --via c.gguf --board-log pi.log --windows 32 --qlora --max-kld 0.1"
    )


def test_an_unknown_tier_is_answered_with_the_known_ones(tmp_path):
    from edgeft.commands.certifying import certify
    from edgeft.errors import RecipeError

    with pytest.raises(RecipeError, match="no tier 'perfect'"):
        certify(
            tmp_path, tmp_path, {}, {}, tier="perfect", qlora=False, out=tmp_path / "out", keep_base=False
        )
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="session")
def chain(library, tiny_checkpoint, tmp_path_factory):
    rows = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    lines = (ROOT / "recipes/data/wordnet_medical_qa.jsonl").read_text().splitlines()
    rows.write_text("\n".join(lines[::40]) + "\n")
    return faults.make(tmp_path_factory.mktemp("chain"), tiny_checkpoint, rows)


def request(chain, **other):
    from edgeft.parity.certify import Request

    given = {"reference": chain.base, "adapter": chain.adapter, "via": (chain.merged, chain.f16), "shipped": chain.q8,
             "text": chain.text, "windows": 8, "general_windows": 2, "n_ctx": 64, "questions": 2, "answer_tokens": 8,
             "floor_windows": 0}  # fmt: skip
    return Request(**{**given, **other})


def certified(chain, tmp_path, **other):
    from edgeft.parity.certify import certify
    from edgeft.parity.gates import Limits

    (tmp_path / "work").mkdir()
    (file,) = certify(
        request(chain, **other), Limits.of("parity", min_retention=0.5), tmp_path / "work"
    ).files
    return file


@pytest.mark.slow
def test_a_sound_chain_passes_and_every_check_is_answered(chain, tmp_path):
    file = certified(chain, tmp_path)
    assert (file.verdict, file.culprit) == ("PASS", ""), file.because
    assert [s.step for s in file.steps] == ["base", "trained", "merged", "gguf", "quantized"]
    assert {c.step for c in file.checks} == {"merged", "gguf", "quantized", "served"}
    assert all(c.ok for c in file.checks), [c for c in file.checks if not c.ok]
    assert file.general is not None and len(file.answers) == 2 and len(file.worst) == 10


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "step"),
    [
        ("adapter_not_applied", "merged"),
        ("rslora_scale_lost", "merged"),
        ("base_swapped", "merged"),
        ("merged_tensor_zeroed", "merged"),
        ("eos_rewritten", "gguf"),
        ("double_bos", "gguf"),
        ("shifted_tokenizer", "gguf"),
        ("wrong_template", "quantized"),
        ("tensor_zeroed", "quantized"),
        ("layers_swapped", "quantized"),
    ],
)
def test_a_planted_fault_fails_at_the_step_that_made_it(chain, tmp_path, fault, step):
    broken = chain.copy(tmp_path / "chain")
    getattr(faults, fault)(broken)
    file = certified(broken, tmp_path)
    assert (file.verdict, file.culprit) == ("FAIL", step), file.because


@pytest.mark.slow
def test_text_that_the_quantizer_was_calibrated_on_is_refused(chain, tmp_path):
    with pytest.raises(ParityError, match="calibration"):
        certified(chain, tmp_path, calibration=chain.text)


@pytest.mark.slow
def test_a_checkpoint_cannot_be_the_file_that_ships_and_an_adapter_needs_its_base(chain, tmp_path):
    with pytest.raises(DataError, match="is a checkpoint"):
        certified(chain, tmp_path, shipped=chain.merged)
    with pytest.raises(DataError, match="an adapter needs its base"):
        certified(chain, tmp_path / "work", reference=chain.f16)


@pytest.mark.slow
def test_without_a_text_of_its_own_general_text_is_taken_and_the_page_says_so(chain, tmp_path):
    file = certified(chain, tmp_path, text=None, adapter=None, reference=chain.merged, via=())
    assert file.verdict == "PASS" and file.general is None and file.retention is None
    assert any("no text" in note for note in file.notes)


@pytest.mark.slow
def test_the_command_writes_page_and_numbers_and_ends_with_the_verdict(chain, tmp_path):
    """5 for a zeroed tensor; the page and certificate.json are there whatever the verdict."""
    broken = chain.copy(tmp_path / "chain")
    faults.tensor_zeroed(broken)
    done = subprocess.run(
        [sys.executable, "-m", "edgeft", "certify", str(broken.f16), str(broken.q8), "--text", str(broken.text),
         "--windows", "8", "--general-windows", "0", "--n-ctx", "64", "--questions", "0", "--floor-windows", "0",
         "--out", str(tmp_path / "out"), "--keep-base"],
        env={**os.environ, "PYTHONPATH": PYTHONPATH}, cwd=tmp_path, text=True, capture_output=True, check=False, timeout=600,
    )  # fmt: skip
    assert done.returncode == 5, done.stdout + done.stderr
    assert (
        "FAIL" in done.stdout
        and "blk.1.ffn_up.weight" in done.stdout + done.stderr
        and "Traceback" not in done.stderr
    )
    document = json.loads((tmp_path / "out/certificate.json").read_text())
    assert document["verdict"] == "FAIL" and document["files"][0]["culprit"] == "quantized"
    assert "blk.1.ffn_up.weight" in (tmp_path / "out/certificate.html").read_text()
    assert (tmp_path / "out/domain.kld").is_file() and not list((tmp_path / "out").glob(".certify-*"))


def portable():
    """The stock llama-perplexity with the portable kernels: another processor's, as far as one machine can have them."""
    from edgeft import llamacpp

    tool = ensure("perplexity") / "llama-perplexity"
    return ["env", f"LD_LIBRARY_PATH={llamacpp.ensure('portable')}", str(tool)]


def board_log(to, base, file, program):
    from edgeft.llamacpp import stock
    from edgeft.llamacpp.base_file import read_base
    from edgeft.tool import run

    to.write_text(run(stock.command(program, base, file, n_ctx=read_base(base).n_ctx, threads=1)))
    return to


@pytest.mark.slow
def test_the_log_of_other_kernels_becomes_the_last_step_and_that_of_a_broken_file_fails_there(
    chain, tmp_path
):
    """The stock tool with portable kernels on the base file that is left; then on the file with a zeroed tensor."""
    asked = {"reference": chain.f16, "adapter": None, "via": (), "questions": 0, "floor_windows": 2}
    first = certified(chain, tmp_path, **asked)
    assert first.verdict == "PASS" and first.served == []
    base = tmp_path / "work/domain.kld"
    fine = board_log(tmp_path / "fine.log", base, chain.q8, portable())
    (tmp_path / "again").mkdir()
    file = certified(chain, tmp_path / "again", **asked, board_logs=(fine,))
    assert (file.verdict, file.culprit) == ("PASS", ""), file.because
    assert [s.step for s in file.steps] == ["trained", "quantized", "served"]
    assert file.served[0].limit == max(2 * file.floor["largest"], 1e-4) and file.checks[-1].ok
    assert file.findings[: len(first.findings)] == first.findings, (
        "a board changes nothing of what was measured here"
    )

    broken = chain.copy(tmp_path / "chain")
    faults.tensor_zeroed(broken)
    bad = board_log(tmp_path / "bad.log", base, broken.q8, portable())
    (tmp_path / "bad").mkdir()
    file = certified(chain, tmp_path / "bad", **asked, board_logs=(bad,))
    assert (file.verdict, file.culprit) == ("FAIL", "served"), file.because

    other = board_log(tmp_path / "other.log", base, chain.f16, portable())
    (tmp_path / "other").mkdir()
    file = certified(chain, tmp_path / "other", **asked, board_logs=(other,))
    assert (file.verdict, file.culprit) == ("FAIL", "served") and "of another file" in file.because[0]

    (tmp_path / "windows").mkdir()
    with pytest.raises(DataError, match="of another base file: 8 windows of 64"):
        certified(chain, tmp_path / "windows", **asked, windows=7, board_logs=(fine,))


def test_a_boards_log_needs_a_noise_floor_and_is_read_before_the_models(tmp_path):
    from edgeft.parity.certify import Request, certify
    from edgeft.parity.gates import Limits

    shipped = tmp_path / "x.gguf"
    shipped.touch()
    asked = Request(reference=tmp_path, shipped=shipped, board_logs=(tmp_path / "no.log",))
    with pytest.raises(DataError, match=r"no\.log cannot be read"):
        certify(asked, Limits.of("parity"), tmp_path)
    with pytest.raises(DataError, match="held against the noise floor"):
        certify(replace(asked, floor_windows=0), Limits.of("parity"), tmp_path)


def test_a_folder_is_refused_with_what_is_missing_before_a_model_is_read(tmp_path, monkeypatch):
    from edgeft.parity import served
    from edgeft.parity.certify import Request, certify
    from edgeft.parity.gates import Limits

    def asked(**given):
        return Request(**{"reference": tmp_path / "hf", "shipped": tmp_path / "awq", **given})

    def says(request, words):
        with pytest.raises(DataError, match=words):
            certify(request, Limits.of("parity"), tmp_path)

    for name, config in (("hf", {}), ("awq", {"quant_method": "gptq"})):
        (tmp_path / name).mkdir()
        said = {"quantization_config": config} if config else {}
        (tmp_path / name / "config.json").write_text(json.dumps(said))
    says(asked(), "quantized by gptq; folders are certified when they are AWQ or ONNX")
    (tmp_path / "awq/config.json").write_text('{"quantization_config": {"quant_method": "awq"}}')
    says(asked(board_logs=(tmp_path / "pi.log",)), "a board's log is of a GGUF file")
    (tmp_path / "x.gguf").touch()
    says(asked(reference=tmp_path / "x.gguf"), "the checkpoint that it was made from, and none is given")
    monkeypatch.setitem(served.MISSING, "vllm", lambda: "install vLLM")
    with pytest.raises(SetupError, match="nothing here can score AWQ"):
        certify(asked(runtime="vllm"), Limits.of("parity"), tmp_path)


@pytest.mark.slow
class TestOnSmolLM2:
    """Numbers need a model that says something."""

    @pytest.fixture(scope="class")
    def files(self, smollm2, library, tmp_path_factory):
        from edgeft.llamacpp import quantize

        """The package's Q4_1 as F16, by the one tool that does that, and two files made from it."""

        folder = tmp_path_factory.mktemp("smollm2")
        paths = {name: folder / f"{name}.gguf" for name in ("F16", "Q8_0", "Q2_K")}
        quantize_f16(ensure("perplexity"), smollm2, paths["F16"])
        for name in ("Q8_0", "Q2_K"):
            quantize.quantize(paths["F16"], paths[name], name)
        return paths

    def test_q2_k_sold_as_parity_fails_at_the_quantization(self, files, tmp_path):
        """And a tier that asks less of it does not change the numbers."""
        from edgeft.parity.certify import Request, certify
        from edgeft.parity.gates import Limits

        (tmp_path / "work").mkdir()
        asked = Request(
            reference=files["F16"], shipped=files["Q2_K"], windows=8, n_ctx=128, questions=0, floor_windows=0
        )
        (file,) = certify(asked, Limits.of("parity"), tmp_path / "work").files
        assert (file.verdict, file.culprit, file.tier) == ("FAIL", "quantized", "")
        assert any("KL divergence" in reason for reason in file.because)
        assert all(c.ok is not False for c in file.checks), "nothing is broken in it: it is only too coarse"

    def test_a_cortex_a76_passes_as_the_last_step_and_another_quantization_run_there_fails(
        self, files, tmp_path
    ):
        """Emulated: the only ARM kernels there are without a board. Then a log of the Q2_K, which ran here."""
        import shutil

        from edgeft import llamacpp
        from edgeft.parity.certify import Request, certify
        from edgeft.parity.gates import Limits

        qemu = shutil.which("qemu-aarch64-static")
        if not qemu or not llamacpp.built("perplexity-a76"):
            pytest.skip(
                "no emulator, or llama-perplexity is not compiled for it: benchmarks/stock_tool.py does that"
            )
        (tmp_path / "work").mkdir()
        asked = Request(reference=files["F16"], shipped=files["Q8_0"], windows=4, n_ctx=64, questions=0)
        (first,) = certify(asked, Limits.of("parity"), tmp_path / "work").files
        assert first.served == []
        base, tool = tmp_path / "work/domain.kld", ensure("perplexity-a76") / "llama-perplexity"
        pi = board_log(tmp_path / "pi.log", base, files["Q8_0"], [qemu, "-cpu", "cortex-a76", str(tool)])
        (file,) = certify(replace(asked, board_logs=(pi,)), Limits.of("parity"), tmp_path / "work").files
        (on_board,) = [f for f in file.findings if f.metric == "moved on the board"]
        assert on_board.verdict == "PASS", on_board.said
        assert file.steps[-1].step == "served" and "FP16_VA = 1" in file.served[0].kernels
        assert not any("may not be a board's" in note for note in file.notes)

        cheap = board_log(tmp_path / "cheap.log", base, files["Q2_K"], portable())
        (file,) = certify(replace(asked, board_logs=(cheap,)), Limits.of("parity"), tmp_path / "work").files
        assert (file.verdict, file.culprit) == ("FAIL", "served")
        (on_board,) = [f for f in file.findings if f.metric == "moved on the board"]
        assert on_board.verdict == "FAIL", "the numbers alone say it too"

    def test_twenty_certificates_of_q8_0_against_its_own_source_raise_no_false_alarm(self, files, tmp_path):
        """Each on other windows. The numbers alone: the exact checks do not depend on the windows."""
        from edgeft.parity import evidence, gates, reference
        from edgeft.parity.certify import Request
        from edgeft.parity.opening import opened
        from edgeft.parity.questions import sample

        asked = Request(reference=files["F16"], shipped=files["Q8_0"], windows=8, n_ctx=128)
        verdicts = []
        with opened(files["F16"], n_ctx=128) as first, opened(files["Q8_0"], n_ctx=128) as second:
            for seed in range(1, 21):
                texts = sample(replace(asked, seed=seed), first).texts
                nll = {n: reference.write(first.speaker, t, tmp_path / f"{n}.kld") for n, t in texts.items()}
                said = evidence.Reference(texts=texts, nll=nll, base=None)
                found = said.compare(evidence.measure(second.speaker, said, tmp_path))
                verdicts.append(gates.verdict(gates.judge(found, None, gates.Limits.of("parity"))))
        assert len(verdicts) == 20 and "FAIL" not in verdicts, verdicts
