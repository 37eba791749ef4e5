"""Torch's weights against gguf-py's and ggml's own, bit by bit, and codes that go into blocks and come out again."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
import torch

from edgeft import llamacpp
from edgeft.errors import StageError
from edgeft.grid.formats import FORMATS, of
from edgeft.grid.formats.block import Plane
from edgeft.llamacpp import runtime

NAMES = list(FORMATS)
ROUNDED = [name for name, kind in FORMATS.items() if kind.rounding]
ONLY_C = {"Q1_0", "Q2_0"}
"""gguf-py's quants.py has no code for them."""
HALVES = {
    "Q1_0": (0,), "Q2_0": (0,), "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,),
    "Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "IQ4_NL": (0,), "IQ4_XS": (0,),
    "IQ2_XXS": (0,), "IQ2_XS": (0,), "IQ2_S": (0,), "IQ3_XXS": (0,), "IQ3_S": (0,), "IQ1_S": (0,), "IQ1_M": (),
    "TQ1_0": (52,), "TQ2_0": (64,), "MXFP4": (), "NVFP4": (), "F32": (), "F16": (0,), "BF16": (),
}  # fmt: skip
"""Where the float16 numbers of a block start, read off ggml-common.h."""
EXTREMES = np.array(
    [0.0, -0.0, 2**-24, -(2**-24), 1023 * 2**-24, 2**-14, 1.0, -1.0, 0.1, 65504.0, -65504.0, np.inf, -np.inf, np.nan],
    np.float16,
)  # fmt: skip


def blocks_of(name: str) -> torch.Tensor:
    """Random blocks, blocks of one byte over and over, and both with every extreme of a float16 as scale."""
    kind, random = FORMATS[name], np.random.default_rng(0)
    plain = random.integers(0, 256, (300, kind.bytes), np.uint8)
    same = np.repeat(np.arange(256, dtype=np.uint8)[:, None], kind.bytes, 1)
    blocks = [plain, same]
    for i, start in enumerate(HALVES[name]):
        for extreme in EXTREMES:
            for base in (plain[:20], same[:: 1 if extreme == 1 else 17]):
                changed = base.copy()
                changed[:, start : start + 2] = extreme.view((np.uint8, 2))
                for other in HALVES[name][:i]:
                    changed[:, other : other + 2] = np.float16(0.5).view((np.uint8, 2))
                blocks.append(changed)
    if name == "IQ1_M":  # its float16 is the high nibbles of four 16-bit numbers
        for extreme in EXTREMES:
            changed = plain[:20].copy()
            for i in range(4):
                nibble = (int(extreme.view(np.uint16)) >> 4 * i) & 15
                changed[:, 49 + 2 * i] = changed[:, 49 + 2 * i] & 15 | nibble << 4
            blocks.append(changed)
    if name in ("MXFP4", "NVFP4"):  # every scale with all codes
        changed = np.repeat(plain[:1], 256, 0)
        changed[:, : kind.bytes - kind.block // 2] = np.arange(256, dtype=np.uint8)[:, None]
        changed[:, -16:] = np.arange(16, dtype=np.uint8) * 17
        blocks.append(changed)
    if kind.bytes == 2:
        blocks.append(np.arange(65536, dtype=np.uint16).view(np.uint8).reshape(-1, 2))
    return torch.from_numpy(np.concatenate(blocks))


def of_gguf_py(name: str, blocks: torch.Tensor) -> np.ndarray:
    gguf = llamacpp.gguf()
    with np.errstate(all="ignore"):
        return gguf.quants.dequantize(blocks.numpy(), getattr(gguf.GGMLQuantizationType, name))


def of_ggml(name: str, blocks: torch.Tensor) -> np.ndarray:
    """ggml_get_type_traits(type)->to_float, which libllama runs for every row it reads."""

    class Traits(ctypes.Structure):
        _fields_ = (
            ("name", ctypes.c_char_p), ("block", ctypes.c_int64), ("interleave", ctypes.c_int64),
            ("bytes", ctypes.c_size_t), ("quantized", ctypes.c_bool), ("to_float", ctypes.c_void_p),
        )  # fmt: skip

    find = runtime.ggml().ggml_get_type_traits
    find.restype = ctypes.POINTER(Traits)
    traits = find(int(getattr(llamacpp.gguf().GGMLQuantizationType, name))).contents
    assert (traits.block, traits.bytes) == (FORMATS[name].block, FORMATS[name].bytes)
    data = np.ascontiguousarray(blocks.numpy())
    if name == "F32":
        assert not traits.to_float  # nothing to do
        return data.view(np.float32)
    weights = np.empty((len(data), traits.block), np.float32)
    convert = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)(traits.to_float)
    convert(data.ctypes.data, weights.ctypes.data, weights.size)
    return weights


def assert_same_bits(got: torch.Tensor | np.ndarray, wanted: np.ndarray) -> None:
    """All bits but those of a NaN: IEEE leaves open which NaN an operation makes."""
    got = got.numpy() if isinstance(got, torch.Tensor) else got
    assert got.shape == wanted.shape and got.dtype == wanted.dtype == np.float32
    nan = np.isnan(wanted)
    assert (np.isnan(got) == nan).all()
    differ = (got.view(np.uint32) != wanted.view(np.uint32)) & ~nan
    assert not differ.any(), f"{differ.sum()} of {differ.size}, first in block {np.argwhere(differ)[0]}"


def on_the_grid(name: str, blocks: torch.Tensor, codes: torch.Tensor, fields: torch.Tensor) -> torch.Tensor:
    """What the contract of Rounding says the weights are."""
    rounding = FORMATS[name].rounding
    scale, offset = rounding.scales(blocks, fields)
    assert scale.shape == (len(blocks), FORMATS[name].block // rounding.group)
    each = torch.tensor(rounding.levels)[codes.long()] * scale.repeat_interleave(rounding.group, 1)
    return each if offset is None else each + offset.repeat_interleave(rounding.group, 1)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ONLY_C])
def test_weights_have_the_bits_of_gguf_py(name):
    blocks = blocks_of(name)
    assert_same_bits(FORMATS[name].dequantize(blocks), of_gguf_py(name, blocks))


@pytest.mark.parametrize("name", NAMES)
def test_weights_have_the_bits_of_ggml_itself(name, library):
    blocks = blocks_of(name)
    assert_same_bits(FORMATS[name].dequantize(blocks), of_ggml(name, blocks))


def test_every_weight_type_of_ggml_is_known_with_its_sizes():
    gguf = llamacpp.gguf()
    sizes = {kind.name: size for kind, size in gguf.GGML_QUANT_SIZES.items()}
    no_weights = {
        "I8",
        "I16",
        "I32",
        "I64",
        "F64",
        "Q8_1",
        "Q8_K",
    }  # Q8_1 and Q8_K: activations while multiplying
    assert {name: (kind.block, kind.bytes) for name, kind in FORMATS.items()} == {
        name: size for name, size in sizes.items() if name not in no_weights
    }


def test_an_unknown_type_is_refused_with_the_known_ones():
    assert of("Q4_K").name == "Q4_K"
    with pytest.raises(StageError, match=r"'Q4_K_M' .*Q4_K, .*IQ1_M"):
        of("Q4_K_M")


@pytest.mark.parametrize("name", NAMES)
def test_blocks_may_lie_anywhere_and_may_be_none(name):
    kind, blocks = FORMATS[name], blocks_of(name)[:5]
    shifted = torch.zeros(5, kind.bytes + 3, dtype=torch.uint8)[
        :, 1 : 1 + kind.bytes
    ]  # odd addresses, with gaps
    shifted.copy_(blocks)
    assert_same_bits(kind.dequantize(shifted), kind.dequantize(blocks).numpy())
    assert kind.dequantize(blocks[:0]).shape == (0, kind.block)
    if kind.rounding:
        assert kind.rounding.pack(blocks[:0], kind.rounding.codes(blocks[:0]), None).shape == (0, kind.bytes)


@pytest.mark.parametrize("name", ROUNDED)
def test_scale_times_level_plus_offset_is_the_weight(name):
    blocks, rounding = blocks_of(name), FORMATS[name].rounding
    assert list(rounding.levels) == sorted(rounding.levels)
    fields = rounding.fields(blocks)
    assert fields.shape == (len(blocks), len(HALVES[name])) and fields.dtype == torch.float32
    assert_same_bits(on_the_grid(name, blocks, rounding.codes(blocks), fields), of_ggml(name, blocks))


@pytest.mark.parametrize("name", ROUNDED)
def test_scale_times_level_is_exact_so_that_a_fused_multiply_add_gives_the_same_weight(name):
    blocks, rounding = blocks_of(name), FORMATS[name].rounding
    scale = rounding.scales(blocks, rounding.fields(blocks))[0]
    scale = scale[scale.isfinite()].unique().unsqueeze(-1)
    levels = torch.tensor(rounding.levels)
    inside = (scale * levels).isfinite()  # MXFP4 reaches beyond float32
    assert torch.equal((scale.double() * levels.double())[inside], (scale * levels).double()[inside])


@pytest.mark.parametrize("name", ROUNDED)
def test_packing_the_codes_and_fields_of_blocks_changes_no_byte(name):
    blocks, rounding = blocks_of(name), FORMATS[name].rounding
    before = blocks.clone()
    codes, fields = rounding.codes(blocks), rounding.fields(blocks)
    assert codes.dtype == torch.uint8 and codes.shape == (len(blocks), FORMATS[name].block)
    assert torch.equal(rounding.pack(blocks, codes, None), blocks)
    numbers = ~fields.isnan().any(1)
    assert torch.equal(rounding.pack(blocks, codes, fields)[numbers], blocks[numbers])
    assert torch.equal(blocks, before), "pack wrote into what it was given"


@pytest.mark.parametrize("name", ROUNDED)
def test_other_codes_and_fields_give_the_weights_they_name(name):
    blocks, rounding = blocks_of(name), FORMATS[name].rounding
    random = torch.Generator().manual_seed(1)
    shape = (len(blocks), FORMATS[name].block)
    codes = torch.randint(len(rounding.levels), shape, dtype=torch.uint8, generator=random)
    packed = rounding.pack(blocks, codes, None)
    assert torch.equal(rounding.codes(packed), codes)
    assert_same_bits(on_the_grid(name, blocks, codes, rounding.fields(blocks)), of_ggml(name, packed))

    fields = torch.randn(len(blocks), len(HALVES[name]), generator=random)
    moved = rounding.pack(blocks, codes, fields)
    assert torch.equal(rounding.fields(moved), fields.half().float())
    assert_same_bits(on_the_grid(name, blocks, codes, fields.half().float()), of_ggml(name, moved))
    rest = torch.ones(FORMATS[name].bytes, dtype=torch.bool)
    for start in HALVES[name]:
        rest[start : start + 2] = False
    assert torch.equal(moved[:, rest], packed[:, rest])


def test_fields_are_rounded_to_the_nearest_float16_and_ties_to_even():
    rounding, block = FORMATS["Q4_0"].rounding, torch.zeros(4, 18, dtype=torch.uint8)
    fields = torch.tensor([[1 + 2**-11], [1 + 3 * 2**-11], [1 + 2**-11 + 2**-20], [2**-26]])
    packed = rounding.pack(block, rounding.codes(block), fields)
    assert rounding.fields(packed)[:, 0].tolist() == [1, 1 + 2**-9, 1 + 2**-10, 0]


@pytest.mark.parametrize("name", [name for name in ROUNDED if HALVES[name]])
def test_gradients_reach_the_fields_through_scale_and_offset(name):
    rounding = FORMATS[name].rounding
    blocks = blocks_of(name)[:50]
    fields = torch.full((50, len(HALVES[name])), 0.5, requires_grad=True)
    scale, offset = rounding.scales(blocks, fields)
    (scale.sum() + (0 if offset is None else 3 * offset.sum())).backward()
    unit, unit_offset = rounding.scales(blocks, torch.ones_like(fields))
    wanted = unit.sum(1, keepdim=True) if unit_offset is None else torch.stack(
        [unit.sum(1), 3 * unit_offset.sum(1)], 1
    )  # fmt: skip
    assert torch.equal(fields.grad, wanted.detach())


def test_ternary_digits_are_packed_as_the_quantizer_packs_them():
    gguf = llamacpp.gguf()
    weights = np.random.default_rng(0).standard_normal((200, 256)).astype(np.float32)
    wanted = torch.from_numpy(gguf.quants.quantize(weights, gguf.GGMLQuantizationType.TQ1_0))
    rounding = FORMATS["TQ1_0"].rounding
    blank = torch.full_like(wanted, 255)
    assert torch.equal(rounding.pack(blank, rounding.codes(wanted), rounding.fields(wanted)), wanted)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_a_plane_writes_nothing_but_its_own_bytes(bits):
    random = torch.Generator().manual_seed(0)
    blocks = torch.randint(256, (3, 40), dtype=torch.uint8, generator=random)
    values = torch.randint(256, (3, 32), dtype=torch.uint8, generator=random)
    before, plane = blocks.clone(), Plane(start=3, bits=bits, run=4)
    plane.write(blocks, values)
    assert torch.equal(plane.read(blocks, 32), values & (2**bits - 1))
    outside = [i for i in range(40) if not 3 <= i < 3 + 4 * bits]
    assert torch.equal(blocks[:, outside], before[:, outside])


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["Q4_0", "Q5_1", "Q4_K", "Q6_K", "IQ4_XS", "IQ2_XXS", "IQ1_M", "TQ1_0", "NVFP4", "BF16"]
)
def test_compiled_without_a_graph_break_the_bits_stay(name):
    blocks = blocks_of(name)
    torch._dynamo.reset()
    compiled = torch.compile(FORMATS[name].dequantize, fullgraph=True)
    assert_same_bits(compiled(blocks), FORMATS[name].dequantize(blocks).numpy())


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
def test_the_gpu_gives_the_bits_of_the_processor_compiled_or_not(name):
    kind, blocks = FORMATS[name], blocks_of(name)
    wanted, there = kind.dequantize(blocks).numpy(), blocks.cuda()
    assert_same_bits(kind.dequantize(there).cpu(), wanted)
    torch._dynamo.reset()
    assert_same_bits(torch.compile(kind.dequantize, fullgraph=True)(there).cpu(), wanted)
    if kind.rounding:
        codes, fields = kind.rounding.codes(there), kind.rounding.fields(there)
        assert torch.equal(codes.cpu(), kind.rounding.codes(blocks))
        assert torch.equal(kind.rounding.pack(there, codes, None).cpu(), blocks)
        packed = kind.rounding.pack(there, codes, fields).cpu()
        assert torch.equal(packed, kind.rounding.pack(blocks, codes.cpu(), fields.cpu()))
