"""Weights with planted faults: which step, which tensor, and what happened to it."""

from __future__ import annotations

import json
import shutil
import struct

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from edgeft.llamacpp import header, quantize, runtime
from edgeft.parity.checks import file_weights, tensors, weights
from edgeft.parity.checks.check import failed
from tests.training import tiny

LAYERS = ("model.layers.0", "model.layers.1", "model.layers.2")


def passes(checks):
    assert [c.said for c in checks if c.ok is not True] == []
    return True


def the_fault(checks, step):
    """The one check that failed, which must blame `step`."""
    wrong = failed(checks)
    assert [c.step for c in wrong] == [step], [c.said for c in wrong]
    return wrong[0]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folders of a base, an adapter and their merge; made once for each kind."""
    known = {}

    def make(family="llama", dtype=torch.float16, **lora):
        key = (family, dtype, *sorted(lora.items()))
        if key not in known:
            folder = tmp_path_factory.mktemp("made")
            tiny.checkpoint(folder / "base", family, dtype=dtype)
            adapter(folder / "base", folder / "adapter", **lora)
            merge(folder)
            known[key] = folder
        return known[key]

    return make


class TestMerged:
    """Adapters by PEFT, merges by edgeft.merging, checked by neither."""

    @pytest.fixture
    def made(self, folders):
        return folders

    @pytest.fixture
    def copy(self, folders, tmp_path):
        return lambda **kind: shutil.copytree(folders(**kind), tmp_path / "copy")

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
    def test_a_good_merge_passes_whatever_the_type_of_its_base(self, made, dtype):
        assert passes(check(made(dtype=dtype)))

    @pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "qwen2"])
    def test_a_good_merge_passes_for_other_families(self, made, family):
        assert passes(check(made(family=family)))

    def test_pefts_own_merge_passes(self, copy):
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        folder = copy(dtype=torch.bfloat16)
        model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.bfloat16)
        PeftModel.from_pretrained(model, folder / "adapter").merge_and_unload().save_pretrained(
            folder / "merged"
        )
        assert passes(check(folder))

    def test_patterns_of_rank_and_alpha_are_honoured(self, made):
        patterns = (("rank_pattern", (("q_proj", 2),)), ("alpha_pattern", (("layers.1.mlp.up_proj", 64),)))
        assert passes(check(made(**dict(patterns))))

    def test_an_adapter_that_was_not_applied_is_found(self, copy):
        folder = copy()
        shutil.rmtree(folder / "merged")
        shutil.copytree(folder / "base", folder / "merged")
        fault = the_fault(check(folder), "merged")
        assert "C-01" in fault.codes and "the adapter was not applied" in fault.said
        assert "model.layers.0.mlp.down_proj.weight and 20 more of 21" in fault.said

    def test_an_adapter_that_one_layer_lost_is_found(self, copy):
        folder = copy()
        lost = "model.layers.1.self_attn.v_proj.weight"
        edit(
            folder / "merged", lambda w: w.update({lost: load_file(folder / "base/model.safetensors")[lost]})
        )
        assert (
            f"a part of the adapter was not applied: {lost} is still"
            in the_fault(check(folder), "merged").said
        )

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_a_lost_rslora_scale_is_found_and_measured(self, copy, dtype):
        folder = copy(dtype=dtype, use_rslora=True, r=16)
        config(folder / "adapter", use_rslora=False)
        merge(folder)
        config(folder / "adapter", use_rslora=True)
        fault = the_fault(check(folder), "merged")
        assert "C-07" in fault.codes and "model.layers.0.mlp.down_proj.weight and 20 more" in fault.said
        assert "lora_alpha / r, but the adapter is rsLoRA" in fault.said
        measured = float(fault.said.partition("with a scale of ")[2].split()[0])
        assert measured == pytest.approx(1.0, rel=0.02) and "instead of 4" in fault.said

    def test_an_adapter_that_was_applied_twice_is_found(self, copy):
        folder = copy()
        config(folder / "adapter", lora_alpha=32)
        merge(folder)
        config(folder / "adapter", lora_alpha=16)
        assert "it was applied twice" in the_fault(check(folder), "merged").said

    @pytest.mark.parametrize("noise", [0.01, 1e-4])
    def test_another_base_under_the_adapter_is_found(self, copy, noise):
        folder = copy()
        shutil.copytree(folder / "base", folder / "right")
        edit(folder / "base", lambda w: w.update({n: t + noise * torch.randn_like(t) for n, t in w.items()}))
        merge(folder)
        shutil.rmtree(folder / "base")
        (folder / "right").rename(folder / "base")
        fault = the_fault(check(folder), "merged")
        assert "the base under the adapter is another one" in fault.said and ".weight by " in fault.said

    def test_two_exchanged_layers_are_found(self, copy):
        folder = copy()
        a, b = (f"{layer}.mlp.up_proj.weight" for layer in LAYERS[:2])
        edit(folder / "merged", lambda w: w.update({a: w[b], b: w[a]}))
        said = the_fault(check(folder), "merged").said
        assert "mlp.up_proj.weight and 1 more of 29 tensors are not base + adapter" in said

    @pytest.mark.parametrize("name", ["model.layers.1.mlp.gate_proj.weight", "model.embed_tokens.weight"])
    def test_a_zeroed_tensor_is_named(self, copy, name):
        folder = copy()
        edit(folder / "merged", lambda w: w[name].zero_())
        assert f"{name} is all zeros" in the_fault(check(folder), "merged").said

    def test_one_changed_number_in_a_tensor_without_an_adapter_is_found(self, copy):
        folder = copy()
        edit(folder / "merged", lambda w: w["model.norm.weight"][3].add_(0.001))
        assert "model.norm.weight is not the base's" in the_fault(check(folder), "merged").said

    def test_a_number_beyond_float16_is_found(self, copy):
        folder = copy()
        name = "model.layers.2.self_attn.q_proj.weight"
        edit(folder / "merged", lambda w: w[name][0, 0].fill_(1e6))
        fault = the_fault(check(folder), "merged")
        assert "C-35" in fault.codes and f"{name} is not finite in 1 places" in fault.said

    def test_a_merge_rounded_to_four_bits_again_is_found(self, copy):
        from bitsandbytes import functional

        def nf4(weight):
            packed, state = functional.quantize_4bit(weight.float(), quant_type="nf4", blocksize=64)
            return functional.dequantize_4bit(packed, state).to(weight.dtype)

        folder = copy()
        edit(folder / "merged", lambda w: w.update({n: nf4(t) for n, t in w.items() if "_proj" in n}))
        fault = the_fault(check(folder), "merged")
        assert "C-06" in fault.codes and "rounded to 4 bits again" in fault.said

    def test_tied_embeddings_that_differ_are_found(self, copy):
        folder = copy()
        edit(folder / "merged", lambda w: w.update({"lm_head.weight": w["model.embed_tokens.weight"] + 1}))
        fault = the_fault(check(folder), "merged")
        assert "C-12" in fault.codes and "lm_head.weight hold different numbers" in fault.said

    def test_a_lost_tensor_and_a_quantized_merge_are_found(self, copy):
        folder = copy()
        edit(folder / "merged", lambda w: w.pop("model.layers.0.mlp.up_proj.weight"))
        assert "the merge lost model.layers.0.mlp.up_proj.weight" in the_fault(check(folder), "merged").said
        merge(folder)
        config(folder / "merged", "config.json", quantization_config={"quant_method": "bitsandbytes"})
        assert "C-41" in the_fault(check(folder), "merged").codes

    def test_an_adapter_for_other_layers_is_found(self, copy):
        folder = copy()
        edit(folder / "adapter", lambda w: [
            w.update({n.replace("layers.2", "layers.7"): w.pop(n)}) for n in list(w) if "layers.2.mlp" in n
        ], "adapter_model.safetensors")  # fmt: skip
        said = [c.said for c in failed(check(folder)) if "C-02" in c.codes]
        assert said == ["adapter layer model.layers.7.mlp.down_proj has no weights in the base"]

    def test_an_adapter_that_is_more_than_lora_is_not_judged(self, copy):
        folder = copy()
        config(folder / "adapter", use_dora=True)
        checks = check(folder)
        assert failed(checks) == [] and [c.name for c in checks if c.ok is None] == ["adapter binding"]


def check(folder):
    return weights.merged(folder / "base", folder / "adapter", folder / "merged")


def merge(folder):
    from edgeft.merging import merge as fold

    shutil.rmtree(folder / "merged", ignore_errors=True)
    fold(folder / "base", folder / "adapter", folder / "merged")


def adapter(base, folder, **lora):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    chosen = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    chosen |= {name: dict(value) if name.endswith("pattern") else value for name, value in lora.items()}
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    tuned = get_peft_model(model, LoraConfig(**chosen))
    torch.manual_seed(1)
    for name, weight in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.01)
    tuned.save_pretrained(folder)


def edit(folder, change, file="model.safetensors"):
    held = {name: tensor.clone() for name, tensor in load_file(folder / file).items()}
    change(held)
    save_file({name: tensor.contiguous() for name, tensor in held.items()}, folder / file, {"format": "pt"})


def config(folder, file="adapter_config.json", **values):
    path = folder / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


BLOCKS, WIDTH = 3, 256


@pytest.fixture(scope="module")
def source(library, tmp_path_factory):
    """Random matrices under a Llama's names, without a vocabulary: all that the quantizer needs."""
    path = tmp_path_factory.mktemp("gguf") / "source.gguf"
    shapes = {"token_embd.weight": (WIDTH, 64), "output_norm.weight": (WIDTH,)}
    for i in range(BLOCKS):
        for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
            shapes[f"blk.{i}.{name}.weight"] = (WIDTH, WIDTH)
        shapes |= {f"blk.{i}.attn_norm.weight": (WIDTH,), f"blk.{i}.ffn_norm.weight": (WIDTH,)}
    random = np.random.default_rng(0)
    header.write(
        path,
        {
            "general.architecture": "llama", "general.file_type": 0, "llama.block_count": BLOCKS,
            "llama.context_length": 64, "llama.embedding_length": WIDTH, "llama.feed_forward_length": WIDTH,
            "llama.attention.head_count": 4, "llama.attention.layer_norm_rms_epsilon": 1e-5,
            "tokenizer.ggml.model": "no_vocab", "llama.vocab_size": 64, "tokenizer.ggml.eos_token_id": 2,
        },
        {n: (s, random.standard_normal(s[::-1], np.float32).tobytes()) for n, s in shapes.items()},
    )  # fmt: skip
    return path


@pytest.fixture(scope="module")
def made(source):
    """The source as llama.cpp quantizes it, once for each label."""

    def make(label):
        out = source.with_name(f"{label}.gguf")
        if not out.exists():
            quantize.quantize(source, out, label, threads=1)
        return out

    return make


class TestQuantized:
    """A random Llama in GGUF, quantized by llama.cpp, with faults planted in the bytes."""

    @pytest.fixture
    def copy(self, made, tmp_path):
        return lambda label: shutil.copyfile(made(label), tmp_path / "file.gguf")

    @pytest.mark.parametrize(
        "label", ["F32", "F16", "BF16", "Q8_0", "Q6_K", "Q5_K_M", "Q5_0", "Q4_K_M", "Q4_1", "Q4_0", "IQ4_NL", "IQ4_XS",
                  "Q3_K_S", "Q2_K", "TQ1_0"]
    )  # fmt: skip
    def test_what_llama_cpp_makes_passes(self, source, made, label):
        checks = weights.quantized(source, made(label))
        assert passes(checks) and {c.step for c in checks} == {"quantized"}

    @pytest.mark.parametrize("label", ["Q8_0", "Q4_0", "Q4_K_M", "Q2_K", "F16"])
    def test_a_zeroed_tensor_is_named(self, source, copy, label):
        file = copy(label)
        plant(file, "blk.1.ffn_up.weight", lambda raw: bytes(len(raw)))
        fault = the_fault(weights.quantized(source, file), "quantized")
        assert fault.said == "blk.1.ffn_up.weight is not the source's: it is all zeros"

    @pytest.mark.parametrize("label", ["Q8_0", "Q4_K_M", "F16"])
    def test_exchanged_layers_are_named_and_recognized(self, source, copy, label):
        file = copy(label)
        for kind in ("attn_q", "attn_norm"):
            a, b = (at(file, f"blk.{i}.{kind}.weight") for i in (0, 2))
            if a[1] == b[1]:
                first, second = (read(file, *place) for place in (a, b))
                write(file, a[0], second)
                write(file, b[0], first)
        said = the_fault(weights.quantized(source, file), "quantized").said
        assert "of 29 tensors are not the source's" in said and "blk." in said
        assert "it holds the numbers of blk." in said

    def test_rows_in_another_order_are_found(self, source, copy):
        file = copy("Q8_0")
        plant(file, "blk.2.ffn_gate.weight", lambda raw: raw[len(raw) // 2 :] + raw[: len(raw) // 2])
        said = the_fault(weights.quantized(source, file), "quantized").said
        assert "blk.2.ffn_gate.weight is not the source's: relative error 1.4" in said

    def test_a_file_of_another_model_is_recognized(self, source, copy, tmp_path):
        other = tmp_path / "other.gguf"
        shutil.copyfile(source, other)
        for tensor in header.read(other).tensors:
            plant(
                other,
                tensor.name,
                lambda raw: np.random.default_rng(7).standard_normal(len(raw) // 4, np.float32).tobytes(),
            )
        said = the_fault(weights.quantized(other, copy("Q4_0")), "quantized").said
        assert "the file was made from another model" in said

    def test_a_scale_that_is_no_number_is_found(self, source, copy):
        file = copy("Q8_0")
        plant(file, "blk.0.attn_v.weight", lambda raw: struct.pack("<e", float("nan")) + raw[2:])
        fault = the_fault(weights.quantized(source, file), "quantized")
        assert "C-35" in fault.codes and "blk.0.attn_v.weight is not finite in 32 places" in fault.said

    def test_a_norm_that_changed_is_named(self, source, copy):
        file = copy("Q4_0")
        plant(file, "blk.1.attn_norm.weight", lambda raw: struct.pack("<f", 1.5) + raw[4:])
        said = the_fault(weights.quantized(source, file), "quantized").said
        assert "blk.1.attn_norm.weight is not the source's: 1 of 256 numbers differ" in said

    def test_a_changed_key_is_named_with_both_values(self, source, copy):
        file = copy("Q8_0")
        header.set_keys(file, {"tokenizer.ggml.eos_token_id": 7})
        fault = the_fault(weights.quantized(source, file), "quantized")
        assert "C-21" in fault.codes
        assert fault.said == "tokenizer.ggml.eos_token_id is 7 in the file and 2 in its source"

    def test_a_block_too_few_is_counted(self, source, copy):
        file = copy("Q8_0")
        header.set_keys(file, {"llama.block_count": 4})
        said = {c.name: c.said for c in failed(weights.quantized(source, file))}
        assert said["block count"] == "llama.block_count is 4, but the file has tensors of 3 blocks"

    def test_a_missing_tensor_is_named(self, source, copy):
        file = copy("Q8_0")
        whole = file.read_bytes()
        file.write_bytes(whole.replace(b"blk.1.attn_k.weight", b"blk.1.attn_x.weight", 1))
        fault = the_fault(weights.quantized(source, file), "quantized")
        assert (
            "C-32" in fault.codes and fault.said == "the file lacks blk.1.attn_k.weight, which its source has"
        )

    def test_small_types_under_a_larger_name_are_found(self, source, copy):
        file = copy("Q2_K")
        header.set_keys(file, {"general.file_type": 15})
        fault = the_fault(weights.quantized(source, file), "quantized")
        assert "C-39" in fault.codes and "the file calls itself Q4_K_M, but" in fault.said

    def test_a_file_quantized_from_a_quantized_one_is_found(self, source, made, tmp_path):
        wide, twice = tmp_path / "wide.gguf", tmp_path / "twice.gguf"
        held = header.read(made("Q8_0"))
        dequantized = {
            t.name: (t.shape, np.concatenate(list(tensors.numbers(made("Q8_0"), held, t))).tobytes())
            for t in held.tensors
        }
        header.write(wide, {n: v for n, v in header.read(source).keys.items() if v is not None}, dequantized)
        quantize.quantize(wide, twice, "Q4_0", threads=1)
        fault = the_fault(weights.quantized(made("Q8_0"), twice), "quantized")
        assert "C-41" in fault.codes and "quantized twice" in fault.said
        honest = {c.name: c.ok for c in weights.quantized(made("Q8_0"), made("Q4_0"))}
        assert honest.pop("source precision") is None and set(honest.values()) == {True}


def at(file, name):
    """Where a tensor's bytes are: first byte of the file, and how many."""
    found = header.read(file)
    tensor = next(t for t in found.tensors if t.name == name)
    return found.data_offset + tensor.offset, tensor.bytes


def read(file, start, size):
    with file.open("rb") as stream:
        stream.seek(start)
        return stream.read(size)


def write(file, start, raw):
    with file.open("r+b") as stream:
        stream.seek(start)
        stream.write(raw)


def plant(file, name, change):
    start, size = at(file, name)
    raw = change(read(file, start, size))
    assert len(raw) == size
    write(file, start, raw)


ROW, ROWS = 1024, 16
RANDOM = np.random.default_rng(0)
ORDINARY = {
    "normal": RANDOM.standard_normal((ROWS, ROW)), "student": RANDOM.standard_t(3, (ROWS, ROW)),
    "laplace": RANDOM.laplace(size=(ROWS, ROW)), "uniform": RANDOM.uniform(-1, 1, (ROWS, ROW)),
    "outliers": RANDOM.standard_normal((ROWS, ROW)) + 8 * (RANDOM.random((ROWS, ROW)) < 1 / 32),
    "columns": RANDOM.standard_normal((ROWS, ROW)) * np.exp(RANDOM.standard_normal((1, ROW))),
}  # fmt: skip
NO_MATRIX_NEEDED = [
    kind for kind in file_weights.LIMITS if kind not in ("IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ1_S", "IQ1_M")
]


@pytest.mark.parametrize("kind", NO_MATRIX_NEEDED)
def test_a_types_limit_leaves_room_over_what_ggml_makes_of_ordinary_weights(library, tmp_path, kind):
    limit, margin = file_weights.LIMITS[kind], 1.0 if file_weights.LIMITS[kind] >= 0.9 else 1.5
    worst = 0.0
    for values in ORDINARY.values():
        tensor = one_tensor(kind, ROWS * ROW)
        wanted = np.ascontiguousarray(values, np.float32)
        file = tmp_path / "raw"
        file.write_bytes(tensors.requantized(wanted, tensor))
        (got,) = tensors.numbers(file, NO_HEADER, tensor)
        worst = max(worst, np.linalg.norm(got - wanted.ravel()) / np.linalg.norm(wanted))
    assert 0.2 * limit < worst and margin * worst <= limit < 1


@pytest.mark.parametrize(
    "kind", ["Q8_0", "Q6_K", "Q5_K", "Q4_K", "Q4_0", "IQ4_XS", "IQ3_S", "MXFP4", "TQ1_0", "BF16", "F16"]
)
def test_the_numbers_read_are_those_that_gguf_py_reads(library, tmp_path, kind):
    package = runtime.gguf()
    tensor = one_tensor(kind, ROWS * ROW)
    file = tmp_path / "raw"
    file.write_bytes(tensors.requantized(np.ascontiguousarray(ORDINARY["student"], np.float32), tensor))
    (ours,) = tensors.numbers(file, NO_HEADER, tensor)
    raw = np.frombuffer(file.read_bytes(), np.uint8)
    theirs = package.quants.dequantize(raw, package.GGMLQuantizationType[kind])
    assert np.allclose(ours, theirs.ravel(), rtol=1e-6, atol=0)


NO_HEADER = header.Header(keys={}, lengths={}, tensors=(), data_offset=0, spans={})


def one_tensor(kind, count):
    block, size = next((block, size) for name, block, size in header.GGML_TYPES.values() if name == kind)
    return header.Tensor(
        name="w", shape=(ROW, count // ROW), type=kind, weights=count, bytes=count // block * size, offset=0
    )


@pytest.fixture(scope="module")
def converted(tiny_checkpoint, tmp_path_factory):
    from edgeft.llamacpp import convert

    out = tmp_path_factory.mktemp("converted") / "f16.gguf"
    convert.to_gguf(tiny_checkpoint, out, outtype="f16")
    return out


@pytest.mark.slow
class TestGguf:
    """A converted tiny Llama, with faults planted in the file or in the checkpoint's config."""

    @pytest.fixture
    def file(self, converted, tmp_path):
        return shutil.copyfile(converted, tmp_path / "file.gguf")

    @pytest.fixture
    def checkpoint(self, tiny_checkpoint, tmp_path):
        return shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint")

    def test_a_good_conversion_passes(self, tiny_checkpoint, converted):
        checks = weights.gguf(tiny_checkpoint, converted)
        assert passes(checks) and {c.step for c in checks} == {"gguf"}

    def test_an_overflow_is_found(self, tiny_checkpoint, file):
        plant(file, "blk.1.ffn_down.weight", lambda raw: struct.pack("<e", float("inf")) + raw[2:])
        said = {c.name: c.said for c in failed(weights.gguf(tiny_checkpoint, file))}
        assert said["finite weights"] == "blk.1.ffn_down.weight is not finite in 1 places: F16 ends at 65504"

    def test_a_zeroed_tensor_and_exchanged_layers_are_named(self, tiny_checkpoint, file):
        plant(file, "blk.0.attn_k.weight", lambda raw: bytes(len(raw)))
        fault = the_fault(weights.gguf(tiny_checkpoint, file), "gguf")
        assert fault.said.startswith(
            "blk.0.attn_k.weight is all zeros, model.layers.0.self_attn.k_proj.weight"
        )
        first, second = (at(file, f"blk.{i}.ffn_up.weight") for i in (0, 1))
        held = read(file, *first), read(file, *second)
        write(file, first[0], held[1])
        write(file, second[0], held[0])
        assert "(and 2 more of 15 matrices)" in the_fault(weights.gguf(tiny_checkpoint, file), "gguf").said

    def test_blocks_that_the_config_does_not_have_are_counted(self, checkpoint, file):
        config(checkpoint, "config.json", num_hidden_layers=3)
        fault = the_fault(weights.gguf(checkpoint, file), "gguf")
        assert fault.codes == ("C-34",) and fault.said == "config.json has 3 layers, the file 2 blocks"

    def test_vocabulary_rows_that_do_not_fit_are_found(self, checkpoint, file):
        config(checkpoint, "config.json", vocab_size=49280)
        fault = the_fault(weights.gguf(checkpoint, file), "gguf")
        assert "C-14" in fault.codes
        assert fault.said == "token_embd.weight has 49152 rows, but config.json says vocab_size 49280"
        key = "tokenizer.ggml.tokens"
        header.set_keys(file, {key: header.read(file, arrays=(key,)).keys[key][:-7]})
        faults = {c.name: c for c in failed(weights.gguf(checkpoint, file))}
        assert (
            "the file lists 49145 tokens, but token_embd.weight has 49152" in faults["vocabulary rows"].said
        )

    def test_an_untied_config_without_an_output_layer_is_found(self, checkpoint, file):
        held = load_file(checkpoint / "model.safetensors")
        held["lm_head.weight"] = held["model.embed_tokens.weight"] + 1
        save_file(held, checkpoint / "model.safetensors", {"format": "pt"})
        config(checkpoint, "config.json", tie_word_embeddings=False)
        fault = the_fault(weights.gguf(checkpoint, file), "gguf")
        assert fault.codes == ("C-12",) and "output.weight is missing" in fault.said

    def test_another_template_and_a_missing_one_are_found(self, checkpoint, file):
        header.set_keys(file, {"tokenizer.chat_template": "{% for m in messages %}x{% endfor %}"})
        fault = the_fault(weights.gguf(checkpoint, file), "gguf")
        assert fault.codes == ("C-20",) and "at character" in fault.said
        header.set_keys(file, {"tokenizer.chat_template": ""})
        assert (
            "the file has no tokenizer.chat_template"
            in the_fault(weights.gguf(checkpoint, file), "gguf").said
        )

    def test_rewritten_special_ids_are_found(self, checkpoint, file):
        header.set_keys(file, {"tokenizer.ggml.eos_token_id": 0})
        said = the_fault(weights.gguf(checkpoint, file), "gguf").said
        assert "tokenizer.ggml.eos_token_id is 0, the tokenizer's eos id is 2" in said

    def test_an_answer_that_ends_where_llama_cpp_goes_on_is_found(self, checkpoint, file):
        template = (checkpoint / "chat_template.jinja").read_text().replace("<|im_end|>", "<file_sep>")
        (checkpoint / "chat_template.jinja").write_text(template)
        header.set_keys(file, {"tokenizer.chat_template": template})
        other = json.loads((checkpoint / "tokenizer.json").read_text())["model"]["vocab"]["<file_sep>"]
        fault = the_fault(weights.gguf(checkpoint, file), "gguf")
        assert "C-21" in fault.codes and f"an answer ends with token {other}, at which" in fault.said
