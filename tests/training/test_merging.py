import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from edgeft.errors import StageError
from edgeft.merging import check_bindable, merge
from edgeft.training import load_base, load_trained, resolve
from edgeft.training import model as models
from tests.training import tiny

IDS = torch.arange(10, 40)[None]

PEAK_KB = (
    "import pathlib, re, sys\n"
    "def peak_kb():\n"
    "    return int(re.search(r'VmHWM:\\s+(\\d+)', pathlib.Path('/proc/self/status').read_text())[1])\n"
)
"""For a process of its own. Not getrusage: its ru_maxrss starts at the peak of the process that started this one."""


@pytest.fixture
def made(tmp_path):
    """A float32 tiny Llama and an adapter for it."""
    return tiny.checkpoint(tmp_path / "base"), make_adapter(tmp_path / "base", tmp_path / "adapter")


def make_adapter(base, folder, *, method="lora", change=lambda config: None, **options):
    bare = load_base(base, method=method, device="cpu", compute_dtype="float32")
    chosen = {"rank": 4, "alpha": 8, "dropout": 0, "rslora": False, "seed": 0, **options}
    tuned = models.attach(bare, resolve(bare), **chosen)
    torch.manual_seed(1)
    for name, weight in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.05)
    models.save_adapter(tuned, models.adapter_weights(tuned), folder)
    return folder


def _edit(folder, edit):
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    edit(tensors)
    save_file({k: v.contiguous() for k, v in tensors.items()}, file)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom", "gpt_neox", "gemma3"])
@pytest.mark.parametrize("rslora", [False, True])
def test_the_merge_is_pefts_own(tmp_path, family, rslora):
    base = tiny.checkpoint(tmp_path / "base", family)
    adapter = make_adapter(base, tmp_path / "adapter", rslora=rslora)
    trained = load_trained(base, adapter, method="lora", device="cpu", compute_dtype="float32")
    with torch.no_grad():
        logits = trained(IDS).logits
    theirs = trained.merge_and_unload().state_dict()
    merged = merge(base, adapter, tmp_path / "out", dtype="bfloat16")
    ours = load_file(tmp_path / "out" / "model.safetensors")
    assert merged.adapted == len(resolve(tiny.model(family)).names)
    theirs["embed_out.weight"] = theirs.get("lm_head.weight")  # GPT-NeoX's head has another name in its files
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name].to(torch.bfloat16)), name
    loaded = load_base(tmp_path / "out", method="lora", device="cpu", compute_dtype="float32")
    with torch.no_grad():
        assert torch.allclose(loaded(IDS).logits, logits, atol=0.05)


def test_before_rounding_the_merge_agrees_with_peft_to_a_millionth(made):
    from edgeft.merging import adapter as adapters
    from edgeft.merging import fold as module
    from edgeft.merging.shards import read_header

    base, adapter = made
    theirs = (
        load_trained(base, adapter, method="lora", device="cpu", compute_dtype="float32")
        .merge_and_unload()
        .state_dict()
    )
    entries, _ = read_header(base / "model.safetensors")
    for pair in adapters.read(adapter):
        name = f"{pair.module}.weight"
        mine = torch.cat([block for _, block in module._blocks(entries[name], pair, set())])
        assert (mine - theirs[name]).norm() <= 1e-6 * theirs[name].norm()


def test_an_adapter_trained_on_nf4_is_merged_into_the_untouched_weights(tmp_path):
    base = tiny.checkpoint(
        tmp_path / "base", "gpt2"
    )  # NF4 turns Conv1D into Linear; the checkpoint stays Conv1D
    adapter = make_adapter(base, tmp_path / "adapter", method="qlora")
    full = load_trained(base, adapter, method="lora", device="cpu", compute_dtype="float32")
    merge(base, adapter, tmp_path / "out")
    with torch.no_grad():
        expected = full(IDS).logits
        got = load_base(tmp_path / "out", method="lora", device="cpu", compute_dtype="float32")(IDS).logits
    assert torch.allclose(got, expected, atol=0.02)


def test_patterns_of_rank_and_alpha_are_honoured(tmp_path):
    from peft import LoraConfig, get_peft_model

    base = tiny.checkpoint(tmp_path / "base")
    tuned = get_peft_model(
        load_base(base, method="lora", device="cpu", compute_dtype="float32"),
        LoraConfig(
            r=4, lora_alpha=8, target_modules=["q_proj", "up_proj"],
            rank_pattern={"q_proj": 2}, alpha_pattern={"layers.1.mlp.up_proj": 32},
        ),
    )  # fmt: skip
    for name, weight in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.05)
    models.save_adapter(tuned, models.adapter_weights(tuned), tmp_path / "adapter")
    merged = merge(base, tmp_path / "adapter", tmp_path / "out", dtype="bfloat16")
    assert merged.adapted == 6
    theirs = tuned.merge_and_unload().state_dict()
    for name, tensor in load_file(tmp_path / "out" / "model.safetensors").items():
        assert torch.equal(tensor, theirs[name].to(torch.bfloat16)), name


def test_untouched_tensors_and_files_are_copied_bit_for_bit(tmp_path):
    base = tiny.checkpoint(tmp_path / "base", dtype=torch.float16)
    (base / "tokenizer.json").write_text('{"odd" :  "spacing"}')
    adapter = make_adapter(base, tmp_path / "adapter")
    merged = merge(base, adapter, tmp_path / "out")
    assert (merged.dtype, merged.adapted, merged.untouched) == ("float16", 21, 8)
    before, after = (load_file(f / "model.safetensors") for f in (base, tmp_path / "out"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"{name}.weight" for name in resolve(tiny.model("llama")).names}
    for name in ("config.json", "tokenizer.json", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (base / name).read_bytes()
    assert all(file.stat().st_mode & 0o777 == 0o644 for file in (tmp_path / "out").iterdir())


def test_the_same_inputs_give_the_same_bytes(made, tmp_path):
    one, two = merge(*made, tmp_path / "one"), merge(*made, tmp_path / "two")
    assert one == two
    for file in (tmp_path / "one").iterdir():
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes()


def test_a_float32_base_becomes_float16_and_its_config_says_so(made, tmp_path):
    assert merge(*made, tmp_path / "out").dtype == "float16"
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float16"
    assert {t.dtype for t in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.float16}


def test_what_float16_cannot_hold_is_written_as_bfloat16(made, tmp_path, caplog):
    base, adapter = made
    weights = load_file(base / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 4] = 70000.0
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    merged = merge(base, adapter, tmp_path / "out")
    assert merged.dtype == "bfloat16"
    assert merged.max_abs > 65504
    assert "C-35" in caplog.text
    with pytest.raises(StageError, match="float16 ends at 65504"):
        merge(base, adapter, tmp_path / "again", dtype="float16")


def test_several_shards_keep_their_files_and_their_index(tmp_path):
    base = tiny.checkpoint(tmp_path / "base", dtype=torch.float16, max_shard_size="20KB")
    adapter = make_adapter(base, tmp_path / "adapter")
    merge(base, adapter, tmp_path / "out")
    names = sorted(f.name for f in base.iterdir())
    assert len(names) > 4
    assert sorted(f.name for f in (tmp_path / "out").iterdir()) == names
    index = "model.safetensors.index.json"
    assert (tmp_path / "out" / index).read_bytes() == (base / index).read_bytes()
    load_base(tmp_path / "out", method="lora", device="cpu", compute_dtype="float32")


def test_a_checkpoint_saved_without_the_head_is_bound_all_the_same(tmp_path):
    base = tmp_path / "base"
    whole = tiny.model("gpt2")
    whole.save_pretrained(base)
    weights = {k.removeprefix("transformer."): v for k, v in load_file(base / "model.safetensors").items()}
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    adapter = make_adapter(base, tmp_path / "adapter")
    assert merge(base, adapter, tmp_path / "out").adapted == 12


def _rename(tensors):
    for key in list(tensors):
        tensors[key.replace("layers.0.mlp", "blocks.0.mlp")] = tensors.pop(key)


def _twice(tensors):
    for side in "AB":
        tensors[f"base_model.model.layers.0.mlp.up_proj.lora_{side}.weight"] = tensors[
            f"base_model.model.model.layers.0.mlp.up_proj.lora_{side}.weight"
        ].clone()


UP = "base_model.model.model.layers.0.mlp.up_proj.lora_"


@pytest.mark.parametrize(
    ("edit", "sentence"),
    [
        (_rename, "matches no weight of the base"),
        (lambda t: t.pop(UP + "B.weight"), "has no lora_B for model.layers.0.mlp.up_proj"),
        (lambda t: t[UP + "B.weight"].zero_(), "leaves model.layers.0.mlp.up_proj.weight as it was"),
        (lambda t: t.update({UP + "B.weight": torch.ones(47, 4)}), "is for a weight of"),
        (lambda t: t.update({UP + "A.weight": torch.ones(3, 32)}), "do not fit each other"),
        (lambda t: t.update({UP + "B.bias": torch.ones(48)}), "is no lora_A or lora_B weight"),
        (_twice, "both belong to model.layers.0.mlp.up_proj.weight"),
        (lambda t: t.clear(), "holds no tensor"),
        (lambda t: t[UP + "B.weight"].fill_(float("inf")), "not finite"),
    ],
)
def test_an_adapter_that_does_not_belong_fails_with_a_sentence(made, tmp_path, edit, sentence):
    base, adapter = made
    _edit(adapter, edit)
    with pytest.raises(StageError, match=sentence):
        merge(base, adapter, tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"init_lora_weights": "pissa"}, "pissa"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"peft_type": "IA3"}, "IA3"),
        ({"r": 5}, "rank 5, its tensors have 4"),
    ],
)
def test_an_adapter_of_another_making_is_refused(made, tmp_path, change, sentence):
    base, adapter = made
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(StageError, match=sentence):
        merge(base, adapter, tmp_path / "out")


def test_layers_that_could_not_be_merged_are_refused_before_training(made):
    base, _ = made
    empty = models.skeleton(base)
    check_bindable(base, empty, resolve(empty).names)
    with pytest.raises(StageError, match=r"blocks\.0\.mlp matches no weight"):
        check_bindable(base, empty, ["blocks.0.mlp"])


def test_a_quantized_base_is_refused(made, tmp_path):
    base, adapter = made
    file = base / "config.json"
    file.write_text(
        json.dumps({**json.loads(file.read_text()), "quantization_config": {"load_in_4bit": True}})
    )
    with pytest.raises(StageError, match="already quantized"):
        merge(base, adapter, tmp_path / "out")


def test_a_tied_head_that_differs_from_the_embedding_is_refused(made, tmp_path):
    base, adapter = made
    weights = load_file(base / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"] + 1
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(StageError, match="ties"):
        merge(base, adapter, tmp_path / "out")


def test_a_shard_that_was_cut_short_is_refused(made, tmp_path):
    base, adapter = made
    file = base / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(StageError, match="cut short"):
        merge(base, adapter, tmp_path / "out")


@pytest.mark.parametrize("fault", ["untouched", "adapted"])
def test_a_wrong_tensor_in_what_was_written_is_noticed(made, tmp_path, monkeypatch, fault):
    from edgeft.merging import fold as module

    honest = module._tensor

    def faulty(entry, dtype, pair, transposed):
        lost = fault == "adapted" and pair and "up_proj" in pair.module
        for piece in honest(entry, dtype, None if lost else pair, transposed):
            yield b"\x01" + piece[1:] if fault == "untouched" and len(entry.shape) == 1 else piece

    monkeypatch.setattr(module, "_tensor", faulty)
    sentence = "has no adapter, yet" if fault == "untouched" else "leaves .*up_proj.weight as it was"
    with pytest.raises(StageError, match=sentence):
        merge(*made, tmp_path / "out")


@pytest.mark.slow
def test_memory_does_not_grow_with_the_model(tmp_path):
    """600 MB of weights, 200 MB of it in one file's one tensor; the bound is a few BLOCKs and what malloc keeps."""
    import transformers as t

    config = t.LlamaConfig(
        vocab_size=64, hidden_size=2048, intermediate_size=24576, num_hidden_layers=2, num_attention_heads=8,
        num_key_value_heads=1, tie_word_embeddings=True,
    )  # fmt: skip
    t.AutoModelForCausalLM.from_config(config, dtype=torch.float16).save_pretrained(tmp_path / "base")
    adapter = make_adapter(tmp_path / "base", tmp_path / "adapter")
    code = PEAK_KB + (
        "import torch, transformers, peft\n"
        "from edgeft.merging import merge; from edgeft.training.model import skeleton\n"
        "base, adapter, out = map(pathlib.Path, sys.argv[1:])\n"
        "skeleton(base)\n"
        "torch.ones(64, 64) @ torch.ones(64, 64)\n"
        "before = peak_kb()\n"
        "merge(base, adapter, out)\n"
        "sys.stdout.write(str(peak_kb() - before))\n"
    )
    arguments = [sys.executable, "-c", code, tmp_path / "base", adapter, tmp_path / "out"]
    grown_kb = int(subprocess.run(arguments, capture_output=True, text=True, check=True).stdout)
    size_kb = (tmp_path / "base" / "model.safetensors").stat().st_size // 1024
    assert size_kb > 550_000
    assert grown_kb < 300_000
    shutil.rmtree(tmp_path)
