"""Predicted sizes against files and buffers that llama.cpp really made, and the refusal of what does not fit."""

from __future__ import annotations

import ctypes
import itertools
import re
from dataclasses import replace
from pathlib import Path

import pytest

from edgeft.checkpoint.package import package_file
from edgeft.errors import RecipeError
from edgeft.fit.memory import (
    OFFERED,
    Serving,
    compute_bytes,
    fits,
    kv_bytes,
    largest_that_fits,
    predict,
    refusal,
    repackable,
)
from edgeft.fit.mixture import LABELS
from edgeft.fit.quant import file_bytes, place, weight_bytes
from edgeft.fit.shape import from_config, from_gguf
from edgeft.llamacpp import header as gguf_header
from tests.conftest import SMOLLM2 as PACKAGE
from tests.fit.models import (
    CARD,
    LLAMA_3B,
    LLAMA_8B,
    PC,
    PI_4,
    PI_5,
    smollm2,
    tiny_gguf,
)

MIB = 2**20
# bytes of SmolLM2-135M-Instruct files written by the pinned llama.cpp, without an importance matrix
WRITTEN = {
    "F16": 270_885_952, "Q8_0": 144_811_072, "Q6_K": 138_382_912, "Q5_K_M": 112_103_488, "Q4_K_M": 105_454_144,
    "Q4_K_S": 102_039_616, "Q3_K_M": 93_510_208, "Q4_0": 91_726_912, "IQ4_XS": 91_300_000, "Q2_K": 88_201_792,
}  # fmt: skip
PUBLISHED_8B_GB = {"Q4_0": 4.66, "Q4_K_M": 4.92, "Q5_K_M": 5.73, "Q6_K": 6.60, "Q8_0": 8.54}


@pytest.mark.parametrize(("label", "size"), WRITTEN.items())
def test_a_file_has_the_size_that_was_predicted(label, size):
    assert file_bytes(smollm2(), label) == pytest.approx(size, rel=0.002)


@pytest.mark.parametrize(("label", "size"), PUBLISHED_8B_GB.items())
def test_llama_3_1_8b_files_have_their_published_size(label, size):
    assert file_bytes(from_config(LLAMA_8B), label) / 1e9 == pytest.approx(size, rel=0.005)


def test_rows_of_576_fall_back_from_k_quants():
    types = {(p.matrix.role, p.type) for p in place(smollm2(), "Q4_K_M")}
    assert ("attn_q", "Q5_0") in types
    assert ("token_embd", "Q8_0") in types
    assert ("ffn_down", "Q4_K") in types
    assert ("ffn_down", "Q6_K") in types
    whole = {(p.matrix.role, p.type) for p in place(from_config(LLAMA_8B), "Q4_K_M")}
    assert ("attn_q", "Q4_K") in whole
    assert ("output", "Q6_K") in whole


def dry_run(bindings, source: Path, label: str, *, imatrix: bool) -> float:
    """MiB that llama.cpp's own quantizer announces for a label, without writing anything."""
    import numpy as np

    from edgeft.llamacpp.quantize import _FTYPES
    from edgeft.llamacpp.runtime import listening

    params = bindings.llama_model_quantize_default_params()
    params.ftype, params.nthread, params.allow_requantize, params.dry_run = _FTYPES[label], 1, True, True
    keep = []
    if imatrix:
        tensors = [t for t in gguf_header.read(source).tensors if len(t.shape) > 1]
        array = (bindings.llama_model_imatrix_data * (len(tensors) + 1))()
        for slot, tensor in zip(array, tensors, strict=False):
            keep.append(np.ones(tensor.shape[0], np.float32))
            slot.name, slot.size = tensor.name.encode(), keep[-1].size
            slot.data = ctypes.cast(keep[-1].ctypes.data, ctypes.POINTER(ctypes.c_float))
        params.imatrix = array
    with listening() as said:
        assert bindings.llama_model_quantize(bytes(source), b"never-written.gguf", ctypes.byref(params)) == 0
    found = re.search(r"quant size\s*=\s*([\d.]+) MiB", "".join(said))
    assert found
    return float(found[1])


@pytest.mark.parametrize(
    "model", [pytest.param("smollm2", marks=pytest.mark.slow), "wide, untied", "wide, tied", "few key heads"]
)
def test_every_label_takes_the_bytes_that_llama_cpp_announces(library, model, tmp_path):
    from edgeft import llamacpp

    if model == "smollm2":
        source = package_file(**PACKAGE)
    else:  # rows of 256 and 512 take every K-quant as it is
        source = tiny_gguf(
            tmp_path / "m.gguf", layers=12, hidden=256, ffn=512, heads=8, tied=model == "wide, tied",
            kv_heads=2 if model == "few key heads" else 8,
        )  # fmt: skip
    shape = from_gguf(source)
    wrong = {}
    for label, imatrix in itertools.product(LABELS, (False, True)):
        if label in ("F32", "F16", "BF16"):
            continue
        theirs = dry_run(llamacpp.native(), source, label, imatrix=imatrix)
        ours = weight_bytes(shape, label, imatrix=imatrix) / MIB
        if abs(ours - theirs) > 0.0051:
            wrong[label, imatrix] = (ours, theirs)
    assert not wrong


def test_an_unknown_quantization_and_kv_type_are_refused():
    with pytest.raises(RecipeError, match="'Q4_K_X' is not known"):
        place(smollm2(), "Q4_K_X")
    with pytest.raises(RecipeError, match="'f8' is not known"):
        kv_bytes(smollm2(), Serving(context=512, kv_type="f8"))


# what the pinned llama.cpp logged for SmolLM2-135M: KV and compute buffer in MiB
@pytest.mark.parametrize(
    ("context", "kv_type", "kv", "compute"),
    [(512, "f16", 11.25, 14.01), (2048, "f16", 45.0, 15.51), (8192, "f16", 180.0, 21.51), (2048, "q8_0", 23.91, 14.42),
     (8192, "q4_0", 50.62, 20.42)],
)  # fmt: skip
def test_cache_and_buffers_have_the_sizes_that_llama_cpp_logged(context, kv_type, kv, compute):
    serving = Serving(context=context, kv_type=kv_type)
    assert kv_bytes(smollm2(), serving) / MIB == pytest.approx(kv, abs=0.01)
    assert compute_bytes(smollm2(), serving) / MIB == pytest.approx(compute, abs=1.5)


def test_repacked_weights_lie_in_memory_twice_only_when_the_file_is_mapped():
    mapped = predict(smollm2(), "Q4_0", Serving(context=2048, mmap=True), PC)
    assert mapped.repacked * 1e6 / MIB == pytest.approx(56.95, abs=0.01)  # CPU_REPACK, logged
    assert predict(smollm2(), "Q4_0", Serving(context=2048), PC).repacked == 0


def test_a_pi_4_repacks_nothing_and_a_pi_5_what_dotprod_can():
    assert not repackable("Q4_0", 4096, PI_4)
    assert repackable("Q6_K", 4096, PI_5)
    assert not repackable("Q6_K", 4100, PI_5)
    assert not repackable("Q6_K", 4096, PC)
    assert repackable("Q4_K", 4096, PC)
    assert not repackable("Q4_K", 4096, CARD)


def test_a_tied_output_that_is_repacked_is_held_beside_its_embedding():
    shape = from_config(LLAMA_3B)
    need = predict(shape, "Q4_K_M", Serving(context=2048), PI_5)
    assert need.repacked * 1e6 == 128256 * 3072 // 256 * 210


def test_weights_of_a_card_leave_an_untied_embedding_in_main_memory():
    shape = from_config(LLAMA_8B)
    on_card = predict(shape, "Q4_K_M", Serving(context=2048), CARD)
    assert on_card.weights * 1e6 == weight_bytes(shape, "Q4_K_M") - 128256 * 4096 // 256 * 144


def test_a_windowed_layer_costs_its_window_and_not_the_context():
    gemma = {"model_type": "gemma3_text", "hidden_size": 1152, "intermediate_size": 6912, "num_hidden_layers": 26,
             "num_attention_heads": 4, "num_key_value_heads": 1, "vocab_size": 262144, "sliding_window": 512,
             "max_position_embeddings": 32768}  # fmt: skip
    shape = from_config(gemma)
    row = 2 * 256 * 2
    assert kv_bytes(shape, Serving(context=32768)) == row * (4 * 32768 + 22 * 1024)
    assert (
        kv_bytes(replace(shape, window_layers=0, sliding_window=0), Serving(context=32768))
        == row * 26 * 32768
    )


def test_an_8b_model_is_refused_by_a_pi_4_with_the_largest_that_would_fit():
    shape = from_config(LLAMA_8B)
    fit = fits(shape, "Q8_0", Serving(context=8192), PI_4)
    assert not fit.fits
    message, hint = refusal(shape, fit)
    assert message.startswith(
        "Q8_0 with a context of 8192 (KV f16) needs 9.8 GB of RAM (weights 8.5 GB, KV cache 1.1 GB"
    )
    assert message.endswith("pi-4 leaves 3.4 GB for a model")
    assert hint == "no quantization of three bits or more fits there: take a smaller base or a larger target"


def test_a_3b_model_is_refused_with_what_would_fit_and_that_does():
    shape = from_config(LLAMA_3B)
    _, hint = refusal(shape, fits(shape, "Q8_0", Serving(context=8192), PI_4))
    assert hint == "what would fit: Q4_K_M with a context of 8192"
    assert fits(shape, "Q4_K_M", Serving(context=8192), PI_4).fits
    assert not fits(shape, "Q5_K_M", Serving(context=8192), PI_4).fits
    _, hint = refusal(shape, fits(shape, "Q4_K_M", Serving(context=65536), PI_4))
    label, context = hint.removeprefix("what would fit: ").split(" with a context of ")
    assert label == "Q4_K_M"
    assert fits(shape, label, Serving(context=int(context)), PI_4).fits


def test_the_largest_context_fits_and_256_more_would_not():
    shape = from_config(LLAMA_3B)
    best = largest_that_fits(shape, "Q4_K_M", Serving(context=65536), PI_4)
    assert 0 < best.context < 65536
    assert best.context % 256 == 0
    assert fits(shape, "Q4_K_M", Serving(context=best.context), PI_4).fits
    assert not fits(shape, "Q4_K_M", Serving(context=best.context + 256), PI_4).fits


def test_the_largest_quantization_at_a_context_is_the_largest():
    shape = from_config(LLAMA_3B)
    serving = Serving(context=4096)
    best = largest_that_fits(shape, "F16", serving, PI_4).label
    assert fits(shape, best, serving, PI_4).fits
    larger = [name for name in OFFERED if weight_bytes(shape, name) > weight_bytes(shape, best)]
    assert larger
    assert not any(fits(shape, name, serving, PI_4).fits for name in larger)


def test_a_model_that_no_quantization_can_squeeze_in_is_told_so():
    shape = from_config({**LLAMA_8B, "num_hidden_layers": 400})
    message, hint = refusal(shape, fits(shape, "Q4_K_M", Serving(context=2048), PI_4))
    assert "pi-4 leaves 3.4 GB" in message
    assert hint.startswith("no quantization of three bits")


def test_the_refusal_of_an_estimated_shape_says_that_it_is_one():
    shape = from_config({**LLAMA_8B, "model_type": "neverheard"})
    message, _ = refusal(shape, fits(shape, "Q8_0", Serving(context=2048), PI_4))
    assert "estimated: neverheard is not known" in message
