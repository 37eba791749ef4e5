from __future__ import annotations

import hashlib
import math

import pytest

from edgeft.errors import StageError, ToolError
from edgeft.llamacpp import header, quantize, runtime, tensor_types


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_every_type_name_is_the_number_llama_cpp_gives_it(library):
    bindings = runtime.native()
    known = {
        name.removeprefix("LLAMA_FTYPE_").removeprefix("MOSTLY_").removeprefix("ALL_"): getattr(
            bindings, name
        )
        for name in dir(bindings)
        if name.startswith("LLAMA_FTYPE_")
    }
    assert {name: known[name] for name in quantize.TYPES} == quantize._FTYPES


def test_a_wide_model_gets_the_types_its_label_promises(tiny, tmp_path):
    out = tmp_path / "q.gguf"
    assert quantize.quantize(tiny(256), out, "Q4_K_M") == ()
    found = quantize.types_in(out)
    assert set(found.counts) == {"Q4_K", "Q6_K", "F32"}
    assert sum(found.counts.values()) == len(header.read(tiny(256)).tensors)
    assert found.file_bytes == out.stat().st_size
    assert 4.5 < found.bits_per_weight < 6.7
    assert header.read(out).keys["general.file_type"] == 15


def test_a_narrow_model_falls_back_and_the_file_says_so(tiny, tmp_path):
    out = tmp_path / "q.gguf"
    fell = {f.tensor: f for f in quantize.quantize(tiny(64), out, "Q4_K_M")}
    shapes = {t.name: t.shape for t in header.read(tiny(64)).tensors}
    weights = {name for name, shape in shapes.items() if len(shape) > 1 and shape[0] % 256}
    # llama.cpp gives the tied embedding Q8_0 by another rule and does not call it a fallback.
    assert set(fell) == weights - {"token_embd.weight"}
    assert {f.row for f in fell.values()} == {64, 128}
    now = {t.name: t.type for t in header.read(out).tensors}
    assert all(now[name] == f.got != f.wanted for name, f in fell.items())
    assert set(tensor_types.expected_fallbacks(shapes, "Q4_K_M")) == weights
    assert "Q4_K" not in quantize.types_in(out).counts


def test_what_is_expected_before_quantizing_is_what_happens(tiny, tmp_path):
    shapes = {t.name: t.shape for t in header.read(tiny(64)).tensors}
    for label in ("Q6_K", "Q5_K_S", "Q3_K_S", "IQ4_XS"):
        quantize.quantize(tiny(64), tmp_path / "q.gguf", label)
        now = {t.name: t.type for t in header.read(tmp_path / "q.gguf").tensors}
        expected = tensor_types.expected_fallbacks(shapes, label)
        assert now["blk.0.ffn_gate.weight"] == expected["blk.0.ffn_gate.weight"], label


@pytest.mark.parametrize("label", quantize.TYPES)
def test_every_label_falls_back_where_it_is_expected_to_and_needs_a_matrix_where_it_is_said_to(
    tiny, tmp_path, label
):
    shapes = {t.name: t.shape for t in header.read(tiny(64)).tensors}
    fell = {f.tensor for f in quantize.quantize(tiny(64), tmp_path / "q.gguf", label, dry_run=True)}
    # The tied embedding follows rules of its own: Q6_K in most mixes, or Q8_0 without calling that a fallback.
    ours = {"token_embd.weight"}
    assert fell - ours == set(tensor_types.expected_fallbacks(shapes, label)) - ours
    with runtime.listening() as said:
        assert quantize.quantize(tiny(256), tmp_path / "q.gguf", label, dry_run=True) == ()
    assert ("will require an imatrix" in "".join(said)) == (label in quantize.NEED_IMATRIX)


def test_the_bytes_do_not_depend_on_the_number_of_threads(tiny, tmp_path):
    for threads in (1, 2, 5):
        out = tmp_path / f"{threads}.gguf"
        quantize.quantize(tiny(256), out, "Q4_K_M", threads=threads, token_embedding_type="Q8_0")
    assert sha256(tmp_path / "1.gguf") == sha256(tmp_path / "2.gguf") == sha256(tmp_path / "5.gguf")


def test_overrides_embedding_and_output_types_reach_the_file(tiny, tmp_path):
    out = tmp_path / "q.gguf"
    quantize.quantize(
        tiny(256), out, "Q4_0", overrides={"ffn_down": "Q6_K", r"blk\.0\.attn_q": "q8_0"}, token_embedding_type="Q5_0"
    )  # fmt: skip
    now = {t.name: t.type for t in header.read(out).tensors}
    assert now["blk.1.ffn_down.weight"] == "Q6_K"
    assert (now["blk.0.attn_q.weight"], now["blk.1.attn_q.weight"]) == ("Q8_0", "Q4_0")
    assert now["token_embd.weight"] == "Q5_0"


def test_bits_per_weight_is_counted_from_the_blocks(tiny, tmp_path):
    quantize.quantize(tiny(64), tmp_path / "q.gguf", "Q8_0")
    found = quantize.types_in(tmp_path / "q.gguf")
    assert found.bytes["Q8_0"] == found.weights["Q8_0"] // 32 * 34
    total = sum(math.prod(t.shape) for t in header.read(tiny(64)).tensors)
    assert sum(found.weights.values()) == total
    assert found.bits_per_weight == pytest.approx(8.5, abs=0.01)


def test_a_failure_says_llama_cpps_reason_and_leaves_no_file(tiny, tmp_path):
    with pytest.raises(ToolError, match="imatrix"):
        quantize.quantize(tiny(256), tmp_path / "q.gguf", "IQ2_XS")
    assert list(tmp_path.iterdir()) == []


def test_quantizing_a_quantized_file_is_refused(tiny, tmp_path):
    quantize.quantize(tiny(256), tmp_path / "q8.gguf", "Q8_0")
    with pytest.raises(ToolError, match="requantizing from type q8_0 is disabled"):
        quantize.quantize(tmp_path / "q8.gguf", tmp_path / "q4.gguf", "Q4_0")


def test_unknown_names_are_refused_before_anything_runs(tiny, tmp_path):
    with pytest.raises(StageError, match="'Q4_K_X' is no quantization type"):
        quantize.quantize(tiny(64), tmp_path / "q.gguf", "Q4_K_X")
    with pytest.raises(StageError, match="'Q9' is no tensor type"):
        quantize.quantize(tiny(64), tmp_path / "q.gguf", "Q4_0", overrides={"ffn": "Q9"})
    with pytest.raises(StageError, match="no regular expression"):
        quantize.quantize(tiny(64), tmp_path / "q.gguf", "Q4_0", overrides={"ffn[": "Q8_0"})


def test_a_dry_run_writes_nothing_and_still_knows_the_fallbacks(tiny, tmp_path):
    assert quantize.quantize(tiny(64), tmp_path / "q.gguf", "Q4_K_M", dry_run=True)
    assert list(tmp_path.iterdir()) == []
