"""What making a model takes, against what was measured."""

from __future__ import annotations

import pytest

from edgeft.fit import training as sizes
from edgeft.fit.shape import from_config
from tests.fit.models import LLAMA_8B, QWEN_7B, smollm2


@pytest.mark.parametrize(("batch", "measured_gb"), [(1, 10.1), (4, 22.6)])
def test_qlora_of_a_7b_model_peaks_where_an_h200_measured_it(batch, measured_gb):
    need = sizes.training(
        from_config(QWEN_7B), method="qlora", rank=16, batch=batch, tokens=2048, device="cuda"
    )
    tensors = need.total - need.runtime  # torch's own count leaves the CUDA context out
    assert tensors / 1e3 == pytest.approx(measured_gb, rel=0.05)


@pytest.mark.parametrize(
    ("batch", "tokens", "checkpointing", "measured_mb"),
    [(2, 128, False, 1966), (4, 256, False, 4669), (4, 256, True, 2771)],
)
def test_lora_on_a_cpu_peaks_just_below_what_is_predicted(batch, tokens, checkpointing, measured_mb):
    need = sizes.training(
        smollm2(), method="lora", rank=16, batch=batch, tokens=tokens, device="cpu", weight_bytes=4,
        checkpointing=checkpointing, optimizer_bits=32,
    )  # fmt: skip
    assert measured_mb <= need.total <= 1.1 * measured_mb


def test_a_large_vocabulary_is_most_of_a_small_models_memory():
    need = sizes.training(
        smollm2(), method="lora", rank=16, batch=8, tokens=512, device="cpu", weight_bytes=4
    )
    assert need.working > need.weights
    assert need.working == pytest.approx(8 * 512 * 49152 * 32 / 1e6)
    answers = sizes.training(
        smollm2(), method="lora", rank=16, batch=8, tokens=512, device="cpu", weight_bytes=4, logit_tokens=100
    )
    assert answers.total == pytest.approx(need.total - 8 * 412 * 49152 * 32 / 1e6, abs=1)


def test_four_bits_hold_the_linear_maps_in_an_eighth_of_float32():
    shape = from_config(LLAMA_8B)
    nf4 = sizes.training(shape, method="qlora", rank=8, batch=1, tokens=512, device="cuda").weights
    full = sizes.training(shape, method="lora", rank=8, batch=1, tokens=512, device="cuda").weights
    assert full == pytest.approx(shape.parameters * 2 / 1e6)
    assert nf4 < 0.4 * full


def test_a_lora_of_rank_8_on_smollm2_has_the_size_of_the_real_one():
    # 7 linear maps in 30 layers, rank 8: the adapter that was converted had 9.8 MB in float32
    assert sizes.adapter_parameters(smollm2(), 8) * 4 / 1e6 == pytest.approx(9.8, abs=0.1)


def test_disk_is_what_the_files_take():
    shape = smollm2()
    assert sizes.checkpoint_mb(shape) == pytest.approx(269 + 3.4, abs=2)
    assert sizes.gguf_mb(shape, "Q4_K_M") == 106
    assert sizes.bundle_mb(shape, "Q4_K_M") == 107
    # 8 windows of 512: 25 MB a window in llama.cpp's 16-bit form
    assert sizes.reference_mb(shape, windows=8, context=512) == pytest.approx(8 * 25, rel=0.01)
    assert sizes.training_mb(shape, 16, checkpoints=2) > 3 * sizes.adapter_mb(shape, 16)
