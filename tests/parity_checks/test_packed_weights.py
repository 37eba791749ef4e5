"""Packed weights against the merged ones: what AWQ's folding does is no fault, and what is one is found by name."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from edgeft.parity.checks import packed, packed_kinds, packed_onnx, packed_weights
from edgeft.parity.checks.tensors import in_checkpoint

OUT, IN, GROUP = 96, 128, 32
NAMES = ["model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.down_proj.weight"]


def rounded(w, bits=4):
    """Codes, zero points and scales [out, groups] of asymmetric rounding to the nearest."""
    rows = w.reshape(len(w), -1, GROUP)
    low, high = np.minimum(rows.min(-1), 0), np.maximum(rows.max(-1), 0)
    scales = ((high - low) / (2**bits - 1)).astype(np.float16)
    zeros = np.clip(np.round(-low / scales.astype(np.float32)), 0, 2**bits - 1)
    codes = np.clip(np.round(rows / scales.astype(np.float32)[..., None]) + zeros[..., None], 0, 2**bits - 1)
    return codes.reshape(w.shape).astype(np.uint8), zeros.astype(np.uint8), scales


def words(codes, bits=4):
    shifts = np.arange(0, 32, bits, dtype=np.uint32)
    return (codes.reshape(len(codes), -1, 32 // bits).astype(np.uint32) << shifts).sum(-1, dtype=np.uint32).view(np.int32)  # fmt: skip


def compressed(name, w):
    codes, zeros, scales = rounded(w)
    part = name.removesuffix(".weight")
    return {
        f"{part}.weight_packed": words(codes), f"{part}.weight_scale": scales,
        f"{part}.weight_zero_point": np.ascontiguousarray(words(np.ascontiguousarray(zeros.T)).T),
        f"{part}.weight_shape": np.array(w.shape, np.int64),
    }  # fmt: skip


def gemm(name, w):
    codes, zeros, scales = rounded(w)
    part, order = name.removesuffix(".weight"), [0, 2, 4, 6, 1, 3, 5, 7]

    def packs(x):
        x = np.ascontiguousarray(x.T).reshape(x.shape[1], -1, 8)[..., order]
        return words(np.ascontiguousarray(x.reshape(len(x), -1)))

    return {
        f"{part}.qweight": packs(codes),
        f"{part}.qzeros": packs(zeros),
        f"{part}.scales": np.ascontiguousarray(scales.T),
    }


SAID = {
    compressed: {"quant_method": "compressed-tensors", "format": "pack-quantized",
                 "config_groups": {"group_0": {"weights": {"num_bits": 4, "actorder": None}}}},
    gemm: {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"},
}  # fmt: skip


@pytest.fixture
def models(tmp_path):
    """Two weights as a base has them, and with a small change of training in the merged model."""
    random = np.random.default_rng(0)
    shapes = [(OUT, IN), (IN, OUT)]
    before = {n: random.standard_normal(s, np.float32) * 0.02 for n, s in zip(NAMES, shapes, strict=True)}
    low = {n: (random.standard_normal((w.shape[0], 2)) @ random.standard_normal((2, w.shape[1]))) for n, w in before.items()}  # fmt: skip
    after = {n: (w + 0.002 * low[n]).astype(np.float32) for n, w in before.items()}
    for name, tensors in (("base", before), ("merged", after)):
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "model.safetensors")
    return before, after


def folder(tmp_path, weights, pack=compressed, change=lambda tensors: None):
    out = tmp_path / "packed"
    out.mkdir(exist_ok=True)
    tensors = {k: v for name, w in weights.items() for k, v in pack(name, w).items()}
    change(tensors)
    save_file(tensors, out / "model.safetensors")
    (out / "config.json").write_text(json.dumps({"quantization_config": SAID[pack]}))
    return out


def answers(tmp_path, out, kind="awq"):
    return {c.name: c for c in packed_weights.checks(kind, out, tmp_path / "merged", tmp_path / "base")}


@pytest.mark.parametrize("pack", [compressed, gemm])
def test_both_layouts_of_awq_are_read_as_servers_compute_them(tmp_path, models, pack):
    _, after = models
    found = {layer.name: layer for layer in packed.awq(folder(tmp_path, after, pack))}
    for name, w in after.items():
        codes, zeros, scales = rounded(w)
        wide = np.repeat(scales.astype(np.float32), GROUP, axis=1)
        expected = (codes.astype(np.float32) - np.repeat(zeros, GROUP, axis=1)) * wide
        assert np.array_equal(found[name].weight, expected)
    assert all(c.ok for c in answers(tmp_path, tmp_path / "packed").values())


def test_compressed_tensors_own_packing_is_read_back(tmp_path):
    pack = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers", reason="another version packs elsewhere")  # fmt: skip
    import torch

    codes = torch.randint(-8, 8, (OUT, IN), dtype=torch.int8)
    theirs = pack.pack_to_int32(codes, 4).numpy()
    assert np.array_equal(packed._codes(theirs, 4).astype(int) - 8, codes.numpy())


def test_scales_moved_between_layers_are_no_fault(tmp_path, models):
    """What AWQ does: rows of one weight are divided by what the columns of the next are multiplied by."""
    _, after = models
    s = np.exp(np.random.default_rng(1).normal(0, 1, OUT)).astype(np.float32)
    up, down = NAMES
    found = answers(tmp_path, folder(tmp_path, {up: after[up] / s[:, None], down: after[down] * s}))
    assert all(c.ok for c in found.values()), found


def test_weights_of_the_base_are_told_from_the_merged_ones(tmp_path, models):
    before, _ = models
    found = answers(tmp_path, folder(tmp_path, before))["training in the weights"]
    assert found.ok is False and "is the base's" in found.said and found.codes == ("C-01", "C-10")


def test_another_layers_weight_and_a_broken_zero_point_fail_by_name(tmp_path, models):
    _, after = models
    up, down = NAMES
    random = np.random.default_rng(2).standard_normal(after[up].shape).astype(np.float32) * 0.02
    found = answers(tmp_path, folder(tmp_path, {up: random, down: after[down]}))["packed weights"]
    assert found.ok is False and up in found.said

    def shifted(tensors):
        tensors["model.layers.0.mlp.down_proj.weight_zero_point"][:] = 0

    found = answers(tmp_path, folder(tmp_path, after, change=shifted))["packed weights"]
    assert found.ok is False and down in found.said


def test_a_scale_that_is_not_finite_and_a_tensor_of_zeros_are_found(tmp_path, models):
    _, after = models

    def infinite(tensors):
        tensors["model.layers.0.mlp.up_proj.weight_scale"][3, 1] = np.inf

    found = answers(tmp_path, folder(tmp_path, after, change=infinite))["finite weights"]
    assert found.ok is False and "up_proj.weight has" in found.said

    def emptied(tensors):
        tensors["model.layers.0.mlp.up_proj.weight_packed"][:] = 0
        tensors["model.layers.0.mlp.up_proj.weight_zero_point"][:] = 0

    found = answers(tmp_path, folder(tmp_path, after, change=emptied))["finite weights"]
    assert found.ok is False and "nothing but zeros" in found.said


def test_columns_with_another_sign_and_a_weight_that_the_model_does_not_have_are_found(tmp_path, models):
    _, after = models
    up, down = NAMES
    turned = after[down].copy()
    turned[:, 7] *= -1
    found = answers(tmp_path, folder(tmp_path, {up: after[up], down: turned}))["packed weights"]
    assert found.ok is False and "1 columns with another sign" in found.said
    found = answers(tmp_path, folder(tmp_path, {"model.layers.9.x.weight": after[up]}))["packed weights"]
    assert found.ok is False and "model.layers.9.x.weight is no weight" in found.said


def test_reordered_columns_cannot_be_asked_about_and_that_is_said(tmp_path, models):
    _, after = models
    out = folder(tmp_path, after)
    said = json.loads((out / "config.json").read_text())
    said["quantization_config"]["config_groups"]["group_0"]["weights"]["actorder"] = "group"
    (out / "config.json").write_text(json.dumps(said))
    (only,) = answers(tmp_path, out).values()
    assert only.ok is None and "reordered columns" in only.said


def test_bits_and_kinds_are_counted_from_the_files(tmp_path, models):
    _, after = models
    found = packed_kinds.inside("awq", folder(tmp_path, after))
    assert found.counts == {"int4": 2} and 4.5 < found.bits_per_weight < 4.7


def matmul(name, w, bits=4):
    """A MatMulNBits node with its initializers."""
    import onnx
    from onnx import numpy_helper

    codes, zeros, scales = rounded(w, bits)
    step, blocks = 8 // bits, w.shape[1] // GROUP

    def packs(x):
        x = x.reshape(len(x), -1, step).astype(np.uint16)
        return (x << (np.arange(step, dtype=np.uint16) * bits)).sum(-1).astype(np.uint8)

    held = [
        numpy_helper.from_array(packs(codes).reshape(len(w), blocks, -1), f"{name}.q"),
        numpy_helper.from_array(scales.astype(np.float32), f"{name}.s"),
        numpy_helper.from_array(packs(zeros), f"{name}.z"),
    ]
    node = onnx.helper.make_node(
        "MatMulNBits", ["x", *(h.name for h in held)], ["y"], name=name, domain="com.microsoft",
        K=w.shape[1], N=len(w), bits=bits, block_size=GROUP,
    )  # fmt: skip
    return node, held


@pytest.mark.parametrize("bits", [4, 8])
def test_a_matmul_node_is_read_as_onnx_runtime_computes_it(tmp_path, bits):
    onnx = pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    from onnx import TensorProto, helper

    random = np.random.default_rng(3)
    q, k, v = (random.standard_normal((rows, IN)).astype(np.float32) for rows in (64, 32, 32))
    node, held = matmul("/model/layers.0/attn/qkv_proj/MatMul", np.concatenate([q, k, v]), bits)
    graph = helper.make_graph(
        [node], "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, IN])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 128])], held,
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), tmp_path / "model.onnx")
    (tmp_path / "genai_config.json").write_text(json.dumps({"model": {"decoder": {"filename": "model.onnx"}}}))  # fmt: skip
    names = {f"model.layers.0.self_attn.{n}_proj.weight": w for n, w in zip("qkv", (q, k, v), strict=True)}
    (tmp_path / "merged").mkdir()
    save_file(names, tmp_path / "merged/model.safetensors")
    read = list(packed_onnx.layers(tmp_path, in_checkpoint(tmp_path / "merged")))
    assert [layer.name for layer in read] == list(names), "one matrix is cut into the three that it holds"
    session = runtime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    x = random.standard_normal((1, IN)).astype(np.float32)
    ours = x @ np.concatenate([layer.weight for layer in read]).T
    assert np.allclose(session.run(None, {"x": x})[0], ours, atol=2e-4)
    found = packed_weights.checks("onnx", tmp_path, tmp_path / "merged")
    assert [c.ok for c in found] == [True, True]
    assert packed_kinds.inside("onnx", tmp_path).counts == {f"int{bits}": 1}


def graph(folder, node, held, inputs, outputs):
    import onnx
    from onnx import helper

    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    made = helper.make_graph([node], "g", inputs, outputs, held)
    onnx.save(helper.make_model(made, opset_imports=opsets, ir_version=10), folder / "model.onnx")
    said = {"model": {"decoder": {"filename": "model.onnx"}}}
    (folder / "genai_config.json").write_text(json.dumps(said))


def test_an_embedding_whose_rows_are_filled_up_is_read_as_onnx_runtime_computes_it(tmp_path):
    """8 bits, rows of 40 numbers in blocks of 32."""
    onnx = pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    from onnx import TensorProto, helper, numpy_helper

    w = np.random.default_rng(4).standard_normal((20, 40)).astype(np.float32)
    codes, zeros, scales = rounded(np.pad(w, ((0, 0), (0, 24))), 8)
    arrays = {"q": codes, "s": scales.astype(np.float32), "z": zeros}
    held = [numpy_helper.from_array(a, name) for name, a in arrays.items()]
    node = helper.make_node(
        "GatherBlockQuantized", ["q", "i", "s", "z"], ["y"], name="/model/embed_tokens/Gather", domain="com.microsoft",
        bits=8, block_size=GROUP, gather_axis=0, quantize_axis=1,
    )  # fmt: skip
    one = helper.make_tensor_value_info
    graph(tmp_path, node, held, [one("i", TensorProto.INT64, [2])], [one("y", TensorProto.FLOAT, [2, 64])])
    assert onnx
    (tmp_path / "merged").mkdir()
    save_file({"model.embed_tokens.weight": w}, tmp_path / "merged/model.safetensors")
    (layer,) = packed_onnx.layers(tmp_path, in_checkpoint(tmp_path / "merged"))
    session = runtime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    (theirs,) = session.run(None, {"i": np.array([3, 11])})
    assert layer.weight.shape == (20, 40) and np.allclose(theirs[:, :40], layer.weight[[3, 11]], atol=1e-6)
    assert [c.ok for c in packed_weights.checks("onnx", tmp_path, tmp_path / "merged")] == [True, True]


def test_a_matrix_that_the_checkpoint_keeps_with_another_is_found_in_it(tmp_path):
    """Phi-3 has gate and up in one tensor, the graph has each by itself."""
    pytest.importorskip("onnx")
    from onnx import TensorProto, helper

    random = np.random.default_rng(5)
    gate, up = (random.standard_normal((64, IN)).astype(np.float32) for _ in range(2))
    node, held = matmul("/model/layers.0/mlp/up_proj/MatMul", up)
    one = helper.make_tensor_value_info
    graph(tmp_path, node, held, [one("x", TensorProto.FLOAT, [1, IN])], [one("y", TensorProto.FLOAT, [1, 64])])  # fmt: skip
    (tmp_path / "merged").mkdir()
    whole = {"model.layers.0.mlp.gate_up_proj.weight": np.concatenate([gate, up])}
    save_file(whole, tmp_path / "merged/model.safetensors")
    assert [c.ok for c in packed_weights.checks("onnx", tmp_path, tmp_path / "merged")] == [True, True]
    save_file({n: w[::-1].copy() for n, w in whole.items()}, tmp_path / "merged/model.safetensors")
    assert [c.ok for c in packed_weights.checks("onnx", tmp_path, tmp_path / "merged")] == [True, False]


def test_an_embedding_that_is_not_packed_is_held_to_the_merged_one(tmp_path, models):
    _, after = models
    name = "model.embed_tokens.weight"
    own = np.random.default_rng(6).standard_normal((50, 8)).astype(np.float32)
    save_file({**after, name: own}, tmp_path / "merged/model.safetensors")

    def with_it(values):
        return answers(tmp_path, folder(tmp_path, after, change=lambda t: t.update({name: values})))

    assert with_it(own.astype(np.float16))["embedding and head"].ok
    moved = np.roll(own, 1, axis=0).astype(np.float16)
    found = with_it(moved)["embedding and head"]
    assert found.ok is False and "differs from the merged one in" in found.said


def test_one_row_that_is_another_weights_is_found(tmp_path):
    w = np.random.default_rng(7).standard_normal((40, 512)).astype(np.float32)
    (tmp_path / "merged").mkdir()
    save_file({NAMES[0]: w}, tmp_path / "merged/model.safetensors")
    other = w.copy()
    other[17] = w[3]
    found = packed_weights.checks("awq", folder(tmp_path, {NAMES[0]: other}), tmp_path / "merged")[1]
    assert found.ok is False and "of row 17" in found.said
