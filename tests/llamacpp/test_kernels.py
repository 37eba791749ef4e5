from __future__ import annotations

import dataclasses
import json
import os
import shutil

import numpy as np
import pytest

from edgeft.errors import DataError, SetupError, ToolError
from edgeft.llamacpp import build, kernels, pin, quantize, runtime, score
from edgeft.llamacpp.decode import Decoder
from tests.conftest import ensure

N_CTX = 32


@pytest.fixture(scope="module")
def parts():
    return np.random.default_rng(3).integers(100, 40_000, (2, N_CTX)).tolist()


@pytest.fixture(scope="module")
def q4(tiny, tmp_path_factory):
    path = tmp_path_factory.mktemp("floors") / "q4.gguf"
    quantize.quantize(tiny(64), path, "Q4_0")
    return path


@pytest.fixture(scope="module")
def floors(tiny, q4, parts):
    """The noise floors of one model in full and in four bits."""
    return {"F32": kernels.floor(tiny(64), parts, threads=1), "Q4_0": kernels.floor(q4, parts, threads=1)}


def test_the_same_file_differs_under_other_kernels_and_least_in_f32(floors):
    assert [pair.what for pair in floors["Q4_0"].pairs] == [
        "repack on / off", f"native / portable {os.uname().machine}",
    ]  # fmt: skip
    (repack, portable), (_, coarse) = floors["F32"].pairs, floors["Q4_0"].pairs
    assert (repack.kld, repack.same_top) == (0, 1)  # nothing is repacked in F32
    assert abs(portable.kld) < 1e-7
    assert 1e-6 < coarse.kld < 0.02
    assert coarse.same_top > 0.8


def test_the_floor_is_its_largest_pair_and_goes_into_json(floors):
    for floor in floors.values():
        assert floor.largest == max(pair.kld for pair in floor.pairs)
        assert floor.tokens == 2 * (N_CTX - 1 - N_CTX // 2)
        facts = json.loads(json.dumps(floor.facts()))
        assert facts == floor.facts()
        assert facts["largest"] == floor.largest
        assert [pair["kld"] for pair in facts["pairs"]] == [pair.kld for pair in floor.pairs]


def test_the_portable_kernels_lack_what_this_processor_has(floors):
    own, other = ({w for w in said.split() if w.isupper()} for said in
                  (floors["F32"].kernels, floors["F32"].pairs[1].kernels))  # fmt: skip
    assert not other & {"AVX2", "FMA", "AVX512", "DOTPROD", "MATMUL_INT8"}
    assert other <= own


def test_a_pair_is_the_kl_divergence_of_two_runs_of_the_file(floors, q4, parts):
    with Decoder(q4, n_ctx=N_CTX, threads=1) as native:
        ours = [score.scored_logits(native, part) for part in parts]
    with Decoder(q4, n_ctx=N_CTX, threads=1, repack=False) as plain:
        theirs = [score.scored_logits(plain, part) for part in parts]
    p, q = (np.exp(np.array(x, np.float64)) for x in (ours, theirs))
    p, q = p / p.sum(-1, keepdims=True), q / q.sum(-1, keepdims=True)
    assert floors["Q4_0"].pairs[0].kld == pytest.approx(
        (p * np.log(p / q)).sum(-1).mean(), abs=1e-7, rel=1e-3
    )


def test_a_floor_from_logits_that_were_known_already_is_the_same(floors, q4, parts, tmp_path):
    """Those of the shipped file's own pass, with a longer context and more windows than the floor asks for."""
    with Decoder(q4, n_ctx=2 * N_CTX, threads=1) as decoder:
        asked = kernels.remembered(lambda w: score.scored_logits(decoder, w), 2, tmp_path / "native.f32")
        for part in (*parts, parts[0]):
            asked(part)
    found = kernels.floor(q4, parts, threads=1, native=tmp_path / "native.f32")
    assert found == floors["Q4_0"]
    with pytest.raises(DataError, match="does not hold the logits of 1 windows"):
        (tmp_path / "cut.f32").write_bytes(bytes(100))
        kernels.floor(q4, parts[:1], threads=1, native=tmp_path / "cut.f32")


def test_kernels_from_elsewhere_are_refused(library, tmp_path):
    runtime.native()
    kernels._assert_loaded(library)
    with pytest.raises(ToolError, match=r"the kernels were loaded from \['.*libggml-cpu"):
        kernels._assert_loaded(tmp_path)


def test_windows_of_several_lengths_are_refused(tiny):
    with pytest.raises(DataError, match="must be of one length"):
        kernels.floor(tiny(64), [[1, 2, 3, 4], [1, 2, 3]])
    with pytest.raises(DataError, match="there must be one"):
        kernels.floor(tiny(64), [])


def test_a_part_with_settings_of_its_own_has_a_tree_of_its_own_and_leaves_the_pin_alone():
    parts = {name: dataclasses.replace(part, cmake={}) for name, part in pin.load().parts.items()}
    assert dataclasses.replace(pin.load(), parts=parts).id == pin.load().id
    folders = {name: build._folder(name) for name in parts}
    assert folders["library"] == folders["server"] == folders["perplexity"] == build.binaries()
    assert len({folders[name] for name in ("library", "portable", "perplexity-a76")}) == 3


def test_portable_kernels_that_were_changed_are_refused(floors, tmp_path, monkeypatch):
    whole = ensure("portable")
    shutil.copytree(whole, tmp_path / "bin", symlinks=True)
    shutil.copy(whole.parent / "portable.built.json", tmp_path)
    monkeypatch.setattr(build, "_folder", lambda part: tmp_path / "bin")
    assert build.built("portable")
    with (tmp_path / "bin" / "libggml-cpu.so").resolve().open("ab") as stream:
        stream.write(b"\0")
    with pytest.raises(ToolError, match=r"libggml-cpu\.so is not the file that was built here"):
        build.built("portable")


def test_a_missing_cross_compiler_is_named_with_its_package(tmp_path, monkeypatch):
    monkeypatch.setenv("EDGEFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SetupError, match=r"aarch64-linux-gnu-g\+\+ is not installed") as caught:
        build.PERPLEXITY_A76.find()
    assert caught.value.hint == "sudo apt install g++-aarch64-linux-gnu"


@pytest.mark.slow
def test_the_floor_of_a_real_model_is_where_it_was_measured(smollm2, english):
    """docs/device-kernels.md: 2e-3 to 9e-3 for 4-bit files, whatever the pair of machines."""
    with Decoder(smollm2, vocab_only=True) as decoder:
        ids = decoder.tokenize(english, add_special=True, parse_special=False)
    floor = kernels.floor(smollm2, score.windows(ids, 256, at_most=2), threads=1)
    assert 5e-4 < floor.largest < 2e-2
    assert 0.85 < floor.pairs[1].same_top < 1


def test_a_processor_without_avx_is_not_asked_to_run_what_it_cannot():
    assert kernels.runs_portable("x86_64", "flags\t\t: fpu sse2 avx f16c avx2\n")
    assert not kernels.runs_portable("x86_64", "flags\t\t: fpu sse2 sse4_2\n")
    assert not kernels.runs_portable("x86_64", "")
    assert kernels.runs_portable("aarch64", "Features\t: fp asimd\n")
