"""A packed layer next to the dense one that holds the same numbers: outputs, gradients, memory, PEFT."""

from __future__ import annotations

import copy
import io
import logging

import numpy as np
import peft
import pytest
import torch
from torch.utils.checkpoint import checkpoint

from edgeft import llamacpp
from edgeft.errors import StageError
from edgeft.grid import formats, linear
from edgeft.grid.linear import GridLinear, widen


def packed(out: int, inputs: int, kind: str = "Q4_0", *, seed: int = 0) -> torch.Tensor:
    package = llamacpp.gguf()
    weights = np.random.default_rng(seed).normal(size=(out, inputs)).astype(np.float32)
    return torch.from_numpy(package.quants.quantize(weights, package.GGMLQuantizationType[kind]))


def pair(out: int = 48, inputs: int = 64, kind: str = "Q4_0") -> tuple[GridLinear, torch.nn.Linear]:
    """A packed layer and a dense one of the same numbers."""
    torch.manual_seed(0)
    ours = GridLinear(packed(out, inputs, kind), kind, torch.randn(out))
    dense = torch.nn.Linear(inputs, out)
    with torch.no_grad():
        dense.weight.copy_(ours.dequantized())
        dense.bias.copy_(ours.bias)
    return ours, dense.requires_grad_(False)


def through(layer, x, *, run=lambda layer, x: layer(x)):
    """The layer's output, and the gradient of a weighted sum of it."""
    x = x.clone().requires_grad_(True)
    y = run(layer, x)
    (y.float() * torch.linspace(-1, 1, y.numel()).reshape(y.shape)).sum().backward()
    return y.detach(), x.grad


@pytest.mark.parametrize("kind", ["Q4_0", "Q5_1", "Q8_0", "BF16"])
def test_a_packed_layer_computes_what_the_dense_layer_of_its_numbers_computes(kind):
    ours, dense = pair(kind=kind)
    x = torch.randn(2, 5, 64)
    for a, b in zip(through(ours, x), through(dense, x), strict=True):
        assert torch.equal(a, b)
    assert (ours.in_features, ours.out_features, ours.weight.dtype) == (64, 48, torch.uint8)


def test_under_autocast_it_multiplies_in_bfloat16_as_a_dense_layer_does():
    ours, dense = pair()
    x = torch.randn(3, 64)

    def run(layer, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return layer(x)

    (y, grad), (y_dense, grad_dense) = (through(layer, x, run=run) for layer in (ours, dense))
    assert y.dtype is torch.bfloat16 and grad.dtype is torch.float32
    assert torch.equal(y, y_dense) and torch.equal(grad, grad_dense)


def test_without_autocast_it_computes_in_its_own_type_and_returns_the_inputs():
    ours, _ = pair()
    ours.compute_dtype = torch.bfloat16
    x = torch.randn(3, 64)
    wanted = torch.nn.functional.linear(x.bfloat16(), ours.dequantized().bfloat16(), ours.bias.bfloat16())
    assert ours(x).dtype is torch.float32 and torch.equal(ours(x), wanted.float())


def test_between_forward_and_backward_only_the_blocks_are_kept():
    ours, _ = pair(96, 256)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        ours(torch.randn(1, 256, requires_grad=True))
    assert [t.data_ptr() for t in kept] == [ours.weight.data_ptr()]


def test_activations_may_be_computed_again_on_the_way_back():
    ours, dense = pair()
    x = torch.randn(4, 64)
    again = through(ours, x, run=lambda layer, x: checkpoint(layer, x, use_reentrant=False))
    assert torch.equal(again[1], through(dense, x)[1])


def test_a_layer_that_holds_its_dense_weight_computes_the_same():
    ours, _ = pair()
    x = torch.randn(4, 64)
    fresh = through(ours, x)
    ours.hold()
    assert torch.equal(ours.held, ours.dequantized())
    assert all(torch.equal(a, b) for a, b in zip(through(ours, x), fresh, strict=True))
    assert "held" not in ours.state_dict()
    with torch.autocast("cpu", dtype=torch.bfloat16):  # held in another type than asked for
        wanted = torch.nn.functional.linear(x, ours.dequantized(), ours.bias)
        assert torch.equal(ours(x), wanted)


def test_blocks_survive_a_change_of_type_a_copy_and_a_file():
    ours, _ = pair()
    before, x = ours.weight.clone(), torch.randn(2, 64)
    stream = io.BytesIO()
    torch.save(ours, stream)
    stream.seek(0)
    for layer in (copy.deepcopy(ours), torch.load(stream, weights_only=False)):
        assert type(layer) is GridLinear and torch.equal(layer(x), ours(x))
    assert torch.equal(ours.to(torch.bfloat16).weight, before)


def test_a_weight_larger_than_a_piece_is_the_same_as_its_parts(monkeypatch):
    rows = packed(40, 64)
    whole = widen(rows, "Q4_0", torch.bfloat16)
    monkeypatch.setattr(linear, "_PIECE", 224)
    assert torch.equal(widen(rows, "Q4_0", torch.bfloat16), whole)


def test_a_wrong_row_or_type_is_refused():
    with pytest.raises(StageError, match=r"Q4_0 rows are multiples of 18 bytes, not torch.uint8 \(2, 20\)"):
        GridLinear(torch.zeros(2, 20, dtype=torch.uint8), "Q4_0")
    with pytest.raises(StageError, match="no weight type 'Q4_X'"):
        GridLinear(torch.zeros(2, 18, dtype=torch.uint8), "Q4_X")
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = linear.Nothing


class Block(torch.nn.Module):
    def __init__(self, up: torch.nn.Module, down: torch.nn.Module) -> None:
        super().__init__()
        self.up, self.down = up, down

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.tanh(self.up(x)))


@pytest.mark.parametrize("rslora", [False, True])
def test_peft_adapts_a_packed_layer_as_it_adapts_a_dense_one(rslora):
    up, down = pair(48, 64), pair(64, 64)
    models = []
    for i in (0, 1):
        torch.manual_seed(1)
        block = Block(up[i], torch.nn.Sequential(torch.nn.Linear(48, 64), down[i]))
        torch.manual_seed(2)
        config = peft.LoraConfig(
            r=4, lora_alpha=8, lora_dropout=0.1, use_rslora=rslora, target_modules=["up", "down.1"]
        )
        models.append(peft.get_peft_model(block, config).train())
    outcomes = []
    for model in models:
        torch.manual_seed(3)
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight)
        torch.manual_seed(4)
        model(torch.randn(6, 64)).square().sum().backward()
        outcomes.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    ours, dense = outcomes
    assert list(ours) == list(dense) and len(ours) == 4
    assert all(ours[n].dtype is torch.float32 and torch.equal(ours[n], dense[n]) for n in ours)
    assert ours["base_model.model.up.lora_A.default.weight"].shape == (4, 64)
    with pytest.raises(RuntimeError):  # blocks cannot take a sum: PEFT's own merge must not pretend to
        models[0].merge_and_unload()


def test_without_a_compiler_a_gpu_still_gets_the_numbers_and_the_log_says_so(monkeypatch, caplog):
    def no_compiler(function, **options):
        def fail(*args):
            raise RuntimeError("Cannot find a working triton installation")

        return fail

    monkeypatch.setattr(torch, "compile", no_compiler)
    blocks = packed(8, 64).reshape(-1, 18)
    run = linear._compiled.__wrapped__("Q4_0", torch.bfloat16)
    with caplog.at_level(logging.WARNING):
        wide = [run(blocks), run(blocks)]
    assert all(torch.equal(w, formats.of("Q4_0").dequantize(blocks).bfloat16()) for w in wide)
    (said,) = [r.message for r in caplog.records]
    assert said.startswith("Q4_0 blocks are dequantized step by step, which is slow: torch cannot compile")
    assert said.endswith("(RuntimeError: Cannot find a working triton installation)")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:bf16 and fp16 are mixed")
@pytest.mark.parametrize("kind", ["Q4_0", "Q4_K", "Q6_K", "IQ4_XS"])
def test_the_compiled_function_gives_the_same_bits_for_any_number_of_blocks_in_one_compilation(kind, caplog):
    import torch._dynamo.utils as counted

    format = formats.of(kind)
    random = np.random.default_rng(0)
    blocks = torch.from_numpy(random.integers(0, 256, (96, format.bytes), np.uint8))
    counted.counters.clear()
    for count in (96, 7, 1, 33):
        some = blocks[:count]
        wide = linear._compiled(kind, torch.float32)(some)
        assert torch.equal(wide.view(torch.int32), format.dequantize(some).view(torch.int32))
    assert counted.counters["stats"]["unique_graphs"] == 1
    assert not [r for r in caplog.records if r.name.startswith("edgeft")]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:bf16 and fp16 are mixed")
def test_a_model_of_packed_layers_compiles_as_one_graph():
    ours, dense = pair()
    x = torch.randn(4, 64)
    compiled = through(torch.compile(ours, fullgraph=True), x)
    for a, b in zip(compiled, through(dense, x), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
def test_a_gpu_dequantizes_every_type_to_the_same_bits(caplog):
    for kind, format in formats.FORMATS.items():
        blocks = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (64, format.bytes), np.uint8))
        wide = widen(blocks, kind, torch.float32)
        there = widen(blocks.cuda(), kind, torch.float32).cpu()
        real = ~wide.isnan()
        assert torch.equal(there[real].view(torch.int32), wide[real].view(torch.int32)), kind
        assert bool(there[~real].isnan().all()), kind
    assert not [r for r in caplog.records if r.name.startswith("edgeft")]  # all of them compiled
