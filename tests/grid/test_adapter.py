"""A PEFT adapter as adapter.gguf: what is refused, and that llama.cpp computes what PEFT computes."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from edgeft.errors import DataError, StageError
from edgeft.grid import adapter
from edgeft.llamacpp import convert, header
from edgeft.llamacpp.decode import Decoder

IDS = [1, 100, 2000, 31, 7, 40000, 8, 9, 10, 11, 300, 4000]
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "all"}, "no trained biases"),
        ({"peft_type": "IA3"}, "IA3 is no LoRA"),
        ({"init_lora_weights": "pissa"}, "changes the base's weights"),
        ({"lora_alpha": 0}, "alpha of 0 as a scale of 1"),
        ({"alpha_pattern": {"q_proj": 0}}, "q_proj = 0"),
        ({"target_modules": ["q_proj", "model.embed_tokens"]}, "embed_tokens"),
        ({"alora_invocation_tokens": [5]}, "alora_invocation_tokens"),
    ],
)
def test_what_the_format_cannot_hold_is_named(config, reason):
    (said,) = adapter.refuse(config)
    assert reason in said


def test_plain_lora_in_all_its_scales_is_not_refused():
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "use_rslora": True, "target_modules": LINEAR, "bias": "none"}  # fmt: skip
    assert adapter.refuse({**config, "rank_pattern": {"q_proj": 4}, "alpha_pattern": {"q_proj": 4}}) == []
    assert adapter.refuse({}) == []
    head = {**config, "target_modules": ["lm_head"]}
    assert adapter.refuse(head) == [] and "the head" in adapter.refuse(head, tied=True)[0]
    assert len(adapter.refuse({"use_dora": True, "bias": "all"})) == 2


def saved(folder, tensors, **config):
    import torch
    from safetensors.torch import save_file

    folder.mkdir(exist_ok=True)
    prefix = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    save_file({f"{prefix}{k}": torch.tensor(v) for k, v in tensors.items()}, folder / "adapter_model.safetensors")  # fmt: skip
    told = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, **config}
    (folder / "adapter_config.json").write_text(json.dumps(told))
    return folder


@pytest.mark.parametrize(
    ("tensors", "config", "sentence"),
    [
        (
            {"A.weight": [[7e4]], "B.weight": [[1.0]]},
            {},
            "A of .*q_proj reaches 70000, which F16 cannot hold",
        ),
        ({"A.weight": [[float("nan")]], "B.weight": [[1.0]]}, {}, "reaches nan"),
        ({"A.weight": [[1.0]]}, {}, "no lora_B for .*q_proj"),
        ({"A.weight": [[1.0]], "magnitude_vector": [1.0]}, {}, "magnitude_vector, which is no lora_A"),
        ({"A.weight": [[1.0]], "B.weight": [[1.0]]}, {"r": 2}, "its rank is 2"),
        ({}, {"use_dora": True}, "does not fit llama.cpp's adapter format: use_dora"),
    ],
)
def test_an_adapter_that_cannot_be_written_is_refused_before_the_converter_runs(
    tmp_path, tiny_base, tensors, config, sentence
):
    pytest.importorskip("torch")
    with pytest.raises(StageError, match=sentence):
        adapter.write(
            saved(tmp_path / "peft", tensors, **config), tmp_path, tiny_base, tmp_path / "adapter.gguf"
        )
    assert not (tmp_path / "adapter.gguf").exists()


@pytest.fixture(scope="module")
def tiny_base(tmp_path_factory):
    path = tmp_path_factory.mktemp("base") / "model.gguf"
    header.write(path, {"general.architecture": "llama"}, {"output_norm.weight": ((1,), bytes(4))})
    return path


@pytest.fixture(scope="module")
def plain(tiny_checkpoint, tmp_path_factory):
    """The tiny checkpoint as F32 GGUF."""
    path = tmp_path_factory.mktemp("plain") / "model.gguf"
    convert.to_gguf(tiny_checkpoint, path, outtype="f32")
    return path


def trained(checkpoint, folder, **config):
    """A saved PEFT adapter whose B are no longer zero, and the logits of the model with it."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    model = get_peft_model(model, LoraConfig(**config)).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    model.save_pretrained(folder)
    with torch.inference_mode():
        return model(torch.tensor([IDS])).logits[0].numpy()


def said(base, lora=None, **more):
    with Decoder(base, n_ctx=32, threads=1, adapter=lora, **more) as decoder:
        return decoder.logits(IDS)


@pytest.mark.slow
class TestWritten:
    @pytest.mark.parametrize("rslora", [False, True])
    def test_llama_cpp_computes_what_peft_computes(self, tiny_checkpoint, plain, tmp_path, rslora):
        config = {
            "r": 8, "lora_alpha": 24, "use_rslora": rslora, "target_modules": LINEAR,
            "rank_pattern": {"k_proj": 4, "layers.1.mlp.up_proj": 16}, "alpha_pattern": {"o_proj": 50},
        }  # fmt: skip
        theirs = trained(tiny_checkpoint, tmp_path / "peft", **config)
        lora = tmp_path / "adapter.gguf"
        written = adapter.write(tmp_path / "peft", tiny_checkpoint, plain, lora, outtype="f32")
        assert (written.layers, written.max_abs_error, written.vanished) == (14, 0, 0)
        assert written.alpha == pytest.approx(24 * 8**0.5 if rslora else 24)
        assert np.abs(said(plain) - theirs).max() > 0.05
        exact = np.abs(said(plain, lora) - theirs).max()
        assert exact < 1e-3
        # A wrong alpha is seen, though it is near.
        assert np.abs(said(plain, lora, adapter_scale=0.97) - theirs).max() > 5 * exact

        small = adapter.write(tmp_path / "peft", tiny_checkpoint, plain, tmp_path / "f16.gguf")
        assert small.type == "F16" and small.bytes == written.bytes // 2
        assert 0 < small.relative_error < 2**-10 and 0 < small.max_abs_error < 1e-3
        assert np.abs(said(plain, tmp_path / "f16.gguf") - theirs).max() < 5e-3

    def test_a_probe_changes_the_one_output_it_names(self, tiny_checkpoint, plain, tmp_path):
        """Rank 1, a B of one 1: it must stand where the base's conversion put that very row."""
        import torch
        from safetensors.torch import load_file, save_file

        trained(tiny_checkpoint, tmp_path / "peft", r=1, lora_alpha=1, target_modules=LINEAR)
        path = tmp_path / "peft" / "adapter_model.safetensors"
        tensors, rows = load_file(path), {}
        for number, name in enumerate(sorted(n for n in tensors if ".lora_B." in n)):
            rows[name] = 5 + 16 * (number % (len(tensors[name]) // 16))
            tensors[name] = torch.nn.functional.one_hot(
                torch.tensor([rows[name]]), len(tensors[name])
            ).T.float()
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
        lora = tmp_path / "adapter.gguf"
        adapter.write(tmp_path / "peft", tiny_checkpoint, plain, lora)
        weights = load_file(tiny_checkpoint / "model.safetensors")
        moved = 0
        for name, row in rows.items():
            module = name.removeprefix("base_model.model.").removesuffix(".lora_B.weight")
            theirs = weights[f"{module}.weight"].float().numpy()
            stem = next(stem for stem, here in matrices(plain).items() if same_rows(here, theirs))
            b = matrices(lora)[f"{stem}.lora_b"]
            (where,) = np.flatnonzero(b)
            assert b[where] == 1 and np.array_equal(matrices(plain)[stem][where], theirs[row])
            moved += where != row
        assert len(rows) == 14
        assert moved == 4  # the q and k of both layers, which llama.cpp's rotation wants in another order

    def test_a_b_in_the_checkpoints_order_is_another_model(self, tiny_checkpoint, plain, tmp_path):
        """What this file would show if the converter did not permute B."""
        theirs = trained(
            tiny_checkpoint, tmp_path / "peft", r=8, lora_alpha=64, target_modules=["q_proj", "k_proj"]
        )
        lora = tmp_path / "adapter.gguf"
        adapter.write(tmp_path / "peft", tiny_checkpoint, plain, lora, outtype="f32")
        right = np.abs(said(plain, lora) - theirs).max()
        tensors = {}
        for tensor in header.read(lora).tensors:
            data = matrices(lora)[tensor.name]
            if tensor.name.endswith("lora_b"):
                heads = 4 if "attn_q" in tensor.name else 2
                data = data.reshape(heads, -1, 2, 8).swapaxes(1, 2).reshape(data.shape)
            tensors[tensor.name] = (tensor.shape, np.ascontiguousarray(data).tobytes())
        raw, spans = lora.read_bytes(), header.read(lora).spans
        header.write(tmp_path / "wrong.gguf", {}, tensors, [raw[start:end] for start, end in spans.values()])
        assert np.abs(said(plain, tmp_path / "wrong.gguf") - theirs).max() > 20 * right

    def test_the_same_adapter_over_another_base_is_refused(self, tiny_checkpoint, plain, tmp_path):
        trained(tiny_checkpoint, tmp_path / "peft", r=2, target_modules=["v_proj"])
        lora = tmp_path / "adapter.gguf"
        written = adapter.write(tmp_path / "peft", tiny_checkpoint, plain, lora, name="a test")
        keys = header.read(lora).keys
        assert keys[adapter.BASE_KEY] == written.base_sha256 == adapter.base_hash(plain)
        assert (keys["general.name"], keys["general.type"]) == ("a test", "adapter")
        again = tmp_path / "again.gguf"
        assert adapter.write(tmp_path / "peft", tiny_checkpoint, plain, again, name="a test") == written
        assert again.read_bytes() == lora.read_bytes()
        half = tmp_path / "half.gguf"
        convert.to_gguf(tiny_checkpoint, half, outtype="f16")
        with pytest.raises(DataError, match=f"{written.base_sha256}.*{adapter.base_hash(half)}"):
            Decoder(half, adapter=lora)

    def test_weights_that_are_stored_turned_get_their_pairs_turned(self, tiny_checkpoint, tmp_path):
        """GPT-2's Conv1D, whose square matrix would else be wrong without an error."""
        import torch
        from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

        folder, base, lora = tmp_path / "gpt2", tmp_path / "model.gguf", tmp_path / "adapter.gguf"
        AutoTokenizer.from_pretrained(tiny_checkpoint).save_pretrained(folder)
        torch.manual_seed(0)
        config = GPT2Config(
            vocab_size=49152, n_positions=64, n_embd=64, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=2
        )
        model = GPT2LMHeadModel(config).to(torch.float16)
        model.save_pretrained(folder)
        told = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**told, "n_ctx": 64}))
        convert.to_gguf(folder, base, outtype="f32")
        targets = ["c_attn", "c_proj", "c_fc"]
        theirs = trained(
            folder, tmp_path / "peft", r=4, lora_alpha=32, target_modules=targets, fan_in_fan_out=True
        )
        adapter.write(tmp_path / "peft", folder, base, lora, outtype="f32")
        assert np.abs(said(base) - theirs).max() > 0.05
        assert np.abs(said(base, lora) - theirs).max() < 5e-3

    def test_a_layer_that_the_base_has_not_is_named(self, tiny_checkpoint, plain, tmp_path):
        trained(tiny_checkpoint, tmp_path / "peft", r=2, target_modules=["v_proj"])
        cut = tmp_path / "cut.gguf"
        shutil.copy(plain, cut)
        cut.write_bytes(plain.read_bytes().replace(b"blk.1.attn_v.weight", b"blk.1.attn_w.weight"))
        with pytest.raises(
            StageError, match=r"is for blk\.1\.attn_v\.weight, which .*cut\.gguf does not have"
        ):
            adapter.write(tmp_path / "peft", tiny_checkpoint, cut, tmp_path / "adapter.gguf")
        assert not (tmp_path / "adapter.gguf").exists()


def matrices(path):
    """Every matrix of an F32 or F16 file, [rows, columns]; a B of rank 1 flat."""
    found, raw = header.read(path), path.read_bytes()
    result = {}
    for t in found.tensors:
        data = np.frombuffer(
            raw[found.data_offset + t.offset :][: t.bytes], {"F32": "<f4", "F16": "<f2"}[t.type]
        )
        result[t.name] = data.astype(np.float32).reshape(t.shape[::-1]).squeeze()
    return result


def same_rows(a, b):
    """The same rows in any order."""
    return a.shape == b.shape and np.array_equal(a[np.lexsort(a.T)], b[np.lexsort(b.T)])
