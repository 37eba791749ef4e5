"""Activations as ggml's kernels store them: against the pinned library's own, number by number and product by product."""

from __future__ import annotations

import ctypes
import os
import platform

import numpy as np
import pytest
import torch
from torch.nn.functional import linear

from edgeft.errors import StageError
from edgeft.grid import placement
from edgeft.grid.activations import (
    BLOCKS,
    activation_type,
    install,
    install_layer,
    rounded_activations,
    simulate,
)
from edgeft.grid.formats import FORMATS
from edgeft.grid.linear import GridLinear
from edgeft.grid.model import load, matrices
from edgeft.grid.rounded import attach
from edgeft.llamacpp import runtime
from edgeft.llamacpp.header import GGML_TYPES
from tests.grid.test_grid_model import Files
from tests.training import tiny

x86 = pytest.mark.skipif(
    platform.machine() != "x86_64", reason="other processors divide in another order: codes differ at halves"
)
NUMBERS = {name: number for number, (name, _, _) in GGML_TYPES.items()} | {"Q8_1": 9, "Q8_K": 15}
LAYOUT = {"Q8_0": ("<f2", 2, 34), "Q8_1": ("<f2", 4, 36), "Q8_K": ("<f4", 4, 292)}
"""ggml-common.h: type of the scale, which comes first, where the codes start, bytes of a block."""


class Traits(ctypes.Structure):
    """struct ggml_type_traits_cpu."""

    _fields_ = (
        ("from_float", ctypes.c_void_p), ("vec_dot", ctypes.c_void_p), ("vec_dot_type", ctypes.c_int),
        ("nrows", ctypes.c_int64),
    )  # fmt: skip


@pytest.fixture(scope="module")
def traits(library):
    """What ggml's CPU kernels do with a type, by its name."""
    runtime.native()
    find = ctypes.CDLL(os.fspath(library / "libggml-cpu.so")).ggml_get_type_traits_cpu
    find.argtypes, find.restype = [ctypes.c_int], ctypes.POINTER(Traits)
    return lambda name: find(NUMBERS[name]).contents


@pytest.fixture(scope="module")
def files(library, tmp_path_factory) -> Files:
    return Files(tmp_path_factory.mktemp("activations"), std=0.1)


@pytest.fixture(scope="module")
def model(files):
    return load(files.folder, files.file, files.plain)


def rows() -> torch.Tensor:
    """Random ones of many sizes, codes that lie on halves, ties of largest numbers, zeros, denormals, huge ones."""
    random = np.random.default_rng(0)
    plain = random.standard_normal((200, 512)) * np.exp(random.standard_normal((200, 1)) * 4)
    halves = random.integers(-254, 255, (40, 512)) / 2
    halves[:, ::32] = random.choice([-127, 127], (40, 16))
    small = [halves * scale for scale in (1e-3, 1e-6, 1e-7, 1e-9, 1e-30, 1e-37, 1e-38, 1e-42, 0.0)]
    made = np.concatenate([plain, halves, -halves, *small, halves * 5e2, halves * 6e4, halves * 1e9])
    return torch.from_numpy(made.astype(np.float32))


def of_ggml(x: torch.Tensor, kind: str, traits) -> torch.Tensor:
    """What ggml stores of `x`, and what that stands for."""
    if kind in ("F16", "BF16"):
        raw = np.empty(x.shape, np.uint16)
        _from_float(traits(kind), x, raw)
        wide = raw.view(np.float16).astype(np.float32) if kind == "F16" else (raw.astype(np.uint32) << 16).view(np.float32)  # fmt: skip
        return torch.from_numpy(wide)
    scale, start, size = LAYOUT[kind]
    raw = np.zeros((x.numel() // BLOCKS[kind], size), np.uint8)
    _from_float(traits(kind), x, raw)
    d = raw[:, : np.dtype(scale).itemsize].copy().view(scale).astype(np.float32)
    with np.errstate(all="ignore"):
        wide = d * raw[:, start : start + BLOCKS[kind]].view(np.int8).astype(np.float32)
    return torch.from_numpy(wide).reshape(x.shape)


def _from_float(trait: Traits, x: torch.Tensor, raw: np.ndarray) -> None:
    convert = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)(trait.from_float)
    convert(x.data_ptr(), raw.ctypes.data, x.numel())


def test_every_weight_type_gets_the_activations_that_ggml_gives_it(traits):
    for name in FORMATS:
        assert NUMBERS[activation_type(name)] == traits(name).vec_dot_type, name
    with pytest.raises(StageError, match="no weight type"):
        activation_type("Q7_9")


@x86
@pytest.mark.parametrize("kind", ["Q8_0", "Q8_1", "Q8_K", "F16", "BF16"])
def test_what_is_stored_is_what_ggml_stores_bit_for_bit(kind, traits):
    x = rows()
    ours, theirs = rounded_activations(x, kind), of_ggml(x, kind, traits)
    same = (ours == theirs) | (ours.isnan() & theirs.isnan())
    assert same.all(), x[~same][:5]
    assert (ours[:200] != x[:200]).float().mean() > 0.9
    assert torch.equal(rounded_activations(x, "F32"), x)


def test_the_gradient_passes_through_and_the_type_is_kept():
    x = rows()[:4].requires_grad_()
    rounded_activations(x, "Q8_0").backward(torch.arange(4 * 512.0).reshape(4, 512))
    assert torch.equal(x.grad, torch.arange(4 * 512.0).reshape(4, 512))
    small = rows()[:4].bfloat16()
    rounded = rounded_activations(small, "Q8_K")
    assert rounded.dtype is torch.bfloat16
    assert torch.equal(rounded, rounded_activations(small.float(), "Q8_K").bfloat16())


def test_other_kinds_and_rows_of_no_whole_blocks_are_refused():
    with pytest.raises(StageError, match="no activation is brought to 'Q4_0'"):
        rounded_activations(torch.zeros(32), "Q4_0")
    with pytest.raises(StageError, match="48 activations are no whole blocks of 32"):
        rounded_activations(torch.zeros(2, 48), "Q8_0")


@pytest.mark.parametrize(
    "kind", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS",
             "TQ1_0", "TQ2_0", "MXFP4", "F16", "BF16"],
)  # fmt: skip
def test_a_product_is_that_of_ggmls_kernel(kind, traits):
    random = torch.Generator().manual_seed(3)
    weight = torch.randn(16, 512, generator=random)
    x = torch.randn(8, 512, generator=random) + 0.5  # a mean, so that offsets and sums count
    packed = np.empty((16, 512 // FORMATS[kind].block * FORMATS[kind].bytes), np.uint8)
    made = runtime.ggml().ggml_quantize_chunk
    made.argtypes = [
        ctypes.c_int, *[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 3, ctypes.c_void_p,
    ]  # fmt: skip
    made.restype = ctypes.c_size_t
    assert made(NUMBERS[kind], weight.data_ptr(), packed.ctypes.data, 0, 16, 512, None) == packed.size
    layer = GridLinear(torch.from_numpy(packed), kind)
    plain = layer(x)
    install_layer(layer)
    theirs = torch.tensor([[_dot(kind, row, numbers, traits) for row in packed] for numbers in x])
    far, near = ((y - theirs).norm() / theirs.norm() for y in (plain, layer(x)))
    # float32 sums, of products and offsets that nearly cancel; without the sums that Q8_1 stores, 1.2e-3 for Q4_1
    assert near < 3e-6 and far > 100 * near, (float(near), float(far))


def _dot(kind: str, row: np.ndarray, x: torch.Tensor, traits) -> float:
    """ggml's vec_dot of a row of blocks with activations, which it converts first."""
    trait, to = traits(kind), activation_type(kind)
    stored = np.zeros(2048, np.uint8)
    _from_float(traits(to), x.contiguous(), stored)
    types = [
        ctypes.c_int,
        ctypes.c_void_p,
        ctypes.c_size_t,
        *[ctypes.c_void_p, ctypes.c_size_t] * 2,
        ctypes.c_int,
    ]
    found = ctypes.c_float()
    dot = ctypes.CFUNCTYPE(None, *types)(trait.vec_dot)
    dot(len(x), ctypes.addressof(found), 0, row.ctypes.data, 0, stored.ctypes.data, 0, 1)
    return found.value


def test_a_model_rounds_while_it_is_told_to_and_not_after(model):
    ids = torch.arange(40)[None]
    with torch.inference_mode():
        before = model(ids).logits
        with simulate(model):
            rounded = model(ids).logits
            install(model)  # what rounds already rounds no more
            assert torch.equal(model(ids).logits, rounded)
        with simulate(model, float16_cache=False):
            products = model(ids).logits
        with simulate(model, products=False):
            cache = model(ids).logits
        after = model(ids).logits
    assert torch.equal(before, after)
    assert not any("forward" in vars(m) for m in model.modules())
    far, half = ((y - before).norm() / before.norm() for y in (rounded, cache))
    assert 1e-3 < far < 0.1 and 1e-6 < half < far
    assert not torch.equal(products, rounded)


def test_the_output_layer_rounds_as_its_tensor_in_the_file_asks(model, files):
    assert model.lm_head.kind == "Q4_1"
    x = torch.randn(3, 64)
    with simulate(model):
        assert torch.equal(model.lm_head(x), linear(rounded_activations(x, "Q8_1"), model.lm_head.weight))
    assert load(files.folder, files.plain, files.plain).lm_head.kind == "F16"
    with pytest.raises(StageError, match="not loaded by"), simulate(tiny.model("llama")):
        pass


def test_a_model_can_be_loaded_so_that_it_rounds(model, files):
    ids = torch.arange(40)[None]
    always = load(files.folder, files.file, files.plain, activations=True)
    with torch.inference_mode(), simulate(model):
        assert torch.equal(always(ids).logits, model(ids).logits)


def test_an_adapter_multiplies_float16_numbers_beside_a_base_that_rounds(files):
    from peft import LoraConfig, get_peft_model

    bare = load(files.folder, files.file, files.plain)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"], init_lora_weights=False)
    layer = get_peft_model(bare, config).get_base_model().model.layers[0].self_attn.q_proj
    x = torch.randn(5, 64)
    with simulate(bare), torch.inference_mode():
        a, b = (layer.lora_A["default"].weight, layer.lora_B["default"].weight)
        low = rounded_activations(rounded_activations(x, "F16") @ a.T, "F16") @ b.T
        torch.testing.assert_close(layer(x), layer.base_layer(x) + low * 2, rtol=0, atol=1e-6)


def test_a_layer_that_learns_through_its_rounding_learns_with_rounded_activations(files):
    bare, known = (
        load(files.folder, files.file, files.plain, hold=False),
        placement.placement(files.folder, files.plain),
    )
    names = ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"]
    latents = dict(zip(names, matrices(files.plain, names, known, torch.float16), strict=True))
    tuned = attach(bare, latents, rank=2, alpha=4, rslora=False, learn_scales=True, seed=0)
    layer = tuned.get_base_model().get_submodule(names[0])
    x = torch.randn(5, 64)
    with simulate(tuned):
        same = GridLinear(layer.blocks().reshape(layer.out_features, -1), "Q4_1", layer.get_base_layer().bias)
        install_layer(same)
        torch.testing.assert_close(layer(x), same(x), rtol=0, atol=1e-5)
        assert (
            layer(x) - tuned.get_base_model().get_submodule(names[0]).__class__.forward(layer, x)
        ).norm() > 1e-3
        tuned(torch.arange(20)[None], labels=torch.arange(20)[None]).loss.backward()
    assert layer.lora_B["default"].weight.grad.norm() > 0 and layer.lora_scales["default"].grad.norm() > 0


def test_attention_of_another_kind_keeps_its_cache_and_says_so(files, caplog):
    other = load(files.folder, files.file, files.plain)
    other.set_attn_implementation("eager")
    with simulate(other, products=False):
        assert "not rounded to float16" in caplog.text and other.config._attn_implementation == "eager"
