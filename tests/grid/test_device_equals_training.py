"""What llama.cpp computes with a file, against what torch computed with the same weights: modes B and C, packed and not."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest
import torch

from edgeft.checkpoint.dequantize import gguf_to_checkpoint
from edgeft.grid import adapter, model, placement, rounded
from edgeft.grid.activations import simulate
from edgeft.llamacpp import kernels, score
from edgeft.llamacpp.convert import to_gguf
from edgeft.llamacpp.decode import Decoder
from edgeft.llamacpp.quantize import quantize
from edgeft.parity.speakers import Torch
from edgeft.parity.suite import GENERAL
from edgeft.training.modules import resolve
from tests.conftest import ROOT


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    """The benchmark, whose measures these are."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        return importlib.import_module("device_equals_training")


@pytest.mark.slow
def test_each_product_of_a_running_llama_cpp_is_the_simulated_one(bench, tiny_checkpoint, library, tmp_path):
    to_gguf(tiny_checkpoint, tmp_path / "F16.gguf", outtype="f16")
    quantize(tmp_path / "F16.gguf", tmp_path / "blocks.gguf", "Q4_1", threads=1)
    found = bench.products(tmp_path / "blocks.gguf", list(range(100, 132)))
    assert {kind: len(pairs) for kind, pairs in found.items()} == {"Q4_1": 14, "Q8_0": 1}
    for plain, same in (pair for pairs in found.values() for pair in pairs):
        assert same < 3e-6 and plain > 1e-4


class Smol:
    """SmolLM2 in Q4_0, and two windows of general text."""

    def __init__(self, smollm2: Path, folder: Path, bench: ModuleType) -> None:
        self.folder, self.hf, self.plain = folder, folder / "hf", folder / "F16.gguf"
        self.file = folder / "start" / "model.gguf"
        self.file.parent.mkdir()
        gguf_to_checkpoint(smollm2, self.hf)
        to_gguf(self.hf, self.plain, outtype="f16")
        quantize(self.plain, self.file, "Q4_0")
        self.case, self.bench = bench.Case(folder, self.hf, self.plain, None), bench
        self.windows = self.case.windows(GENERAL, 256, 2)
        self.known = placement.placement(self.hf, self.plain)

    def load(self, **more):
        return model.load(self.hf, self.file, self.plain, placement=self.known, **more)

    def speaker(self, made) -> Torch:
        return Torch(made, self.case.tokenizer())

    def kept(self, name: str, logits):
        return self.bench.Kept(self.folder / name, self.windows, logits)

    def in_llama_cpp(self, file: Path, beside: Path | None = None):
        with Decoder(file, n_ctx=256, adapter=beside) as decoder:
            return self.kept("theirs", lambda window: score.scored_logits(decoder, window))


@pytest.fixture(scope="module")
def smol(smollm2, library, bench, tmp_path_factory) -> Smol:
    return Smol(smollm2, tmp_path_factory.mktemp("smol"), bench)


@pytest.mark.slow
def test_a_file_trained_through_its_rounding_is_the_model_of_the_last_step(smol, tmp_path):
    bare = smol.load(hold=False)
    names = resolve(bare).names
    latents = dict(zip(names, model.matrices(smol.plain, names, smol.known, torch.float16), strict=True))
    tuned = rounded.attach(bare, latents, rank=4, alpha=8, rslora=False, learn_scales=True, seed=0)
    random = torch.Generator().manual_seed(0)
    for name, weight in tuned.named_parameters():
        if "lora_B" in name or "lora_scales" in name:  # as if it had learnt something
            weight.data.normal_(0, 0.002, generator=random)
    file = tmp_path / "model.gguf"
    model.write_rows(smol.file, file, rounded.packed(tuned), smol.known)
    assert file.read_bytes() != smol.file.read_bytes()
    ours = smol.kept("ours", smol.speaker(tuned).logits)
    for wide in smol.bench.expanded(file, tmp_path).values():
        assert ours.kld(smol.in_llama_cpp(wide)) < 1e-5
    noise = kernels.floor(file, smol.windows).largest
    assert 0 < ours.kld(smol.in_llama_cpp(file)) < 1.2 * noise


@pytest.mark.slow
def test_a_base_in_blocks_and_its_adapter_are_the_model_of_the_last_step(smol, tmp_path):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    trained = get_peft_model(smol.load(), config)
    for name, weight in trained.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(0, 0.02)
    trained.save_pretrained(tmp_path / "peft")
    ours = smol.kept("ours", smol.speaker(trained).logits)
    for kind, file in {"packed": smol.file, **smol.bench.expanded(smol.file, tmp_path)}.items():
        beside = tmp_path / f"{kind}.adapter"
        adapter.write(tmp_path / "peft", smol.hf, file, beside)
        limit = 1e-5 if kind != "packed" else 1.2 * kernels.floor(file, smol.windows, adapter=beside).largest
        assert ours.kld(smol.in_llama_cpp(file, beside)) < limit, kind
    without = ours.kld(smol.in_llama_cpp(smol.bench.expanded(smol.file, tmp_path)["F32"]))
    assert without > 1e-3, "the adapter did nothing"


@pytest.mark.slow
def test_what_remains_when_activations_are_rounded_is_what_a_last_bit_does(smol):
    speaker = smol.speaker(smol.load())
    few, kept = smol.windows, smol.kept("before", speaker.logits)
    assert kept.kld(smol.bench.nudged(speaker, smol.folder, few)) < 1e-8
    with simulate(speaker.model):
        same = smol.kept("rounded", speaker.logits)
        chaos = same.kld(smol.bench.nudged(speaker, smol.folder, few))
    theirs = same.kld(smol.in_llama_cpp(smol.file))
    assert 1e-3 < theirs < 1.5 * chaos, "the device is farther from torch than torch from itself"
