"""A whole chain, base to quantized file, on a tiny model, and the ways to break it that users have met."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from edgeft.llamacpp import header


@dataclass(frozen=True)
class Chain:
    """Folders and files of one model's way."""

    folder: Path
    base: Path
    adapter: Path
    merged: Path
    f16: Path
    q8: Path
    text: Path

    def copy(self, folder: Path) -> Chain:
        """The same chain in files of its own, to be broken."""
        shutil.copytree(self.folder, folder, dirs_exist_ok=True)
        moved = {
            name: folder / path.relative_to(self.folder)
            for name, path in vars(self).items()
            if name != "folder"
        }
        return Chain(folder=folder, **moved)


def make(folder: Path, base: Path, rows: Path) -> Chain:
    """Adapter with rsLoRA, merge, conversion and Q8_0, as edgeft makes them."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    shutil.copytree(base, folder / "base")
    shutil.copyfile(rows, folder / "text.jsonl")
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    config = LoraConfig(
        r=16, lora_alpha=8, use_rslora=True, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    tuned = get_peft_model(model, config)
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    tuned.save_pretrained(folder / "adapter")
    chain = Chain(
        folder=folder, base=folder / "base", adapter=folder / "adapter", merged=folder / "merged",
        f16=folder / "f16.gguf", q8=folder / "q8.gguf", text=folder / "text.jsonl",
    )  # fmt: skip
    return remerged(chain)


def remerged(chain: Chain, *, base: Path | None = None, adapter: Path | None = None) -> Chain:
    """The chain from the merge on, made again, from another base or adapter if one is given."""
    from edgeft import merging

    shutil.rmtree(chain.merged, ignore_errors=True)
    if adapter and not (adapter / "adapter_config.json").exists():
        shutil.copytree(base or chain.base, chain.merged)
    else:
        merging.merge(base or chain.base, adapter or chain.adapter, chain.merged)
    return reconverted(chain)


def reconverted(chain: Chain) -> Chain:
    """The chain from the conversion on, made again."""
    from edgeft.llamacpp import convert, quantize

    convert.to_gguf(chain.merged, chain.f16, outtype="f16")
    quantize.quantize(chain.f16, chain.q8, "Q8_0")
    return chain


def adapter_not_applied(chain: Chain) -> None:
    remerged(chain, adapter=chain.folder / "no-adapter")


def rslora_scale_lost(chain: Chain) -> None:
    plain = shutil.copytree(chain.adapter, chain.folder / "plain")
    config = json.loads((plain / "adapter_config.json").read_text())
    (plain / "adapter_config.json").write_text(json.dumps({**config, "use_rslora": False}))
    remerged(chain, adapter=plain)


def base_swapped(chain: Chain) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    other = shutil.copytree(chain.base, chain.folder / "other")
    model = AutoModelForCausalLM.from_pretrained(other, dtype=torch.float16)
    torch.manual_seed(5)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data += 0.01 * torch.randn_like(parameter)
    model.save_pretrained(other)
    remerged(chain, base=other)


def merged_tensor_zeroed(chain: Chain) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(chain.merged / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"] *= 0
    save_file(weights, chain.merged / "model.safetensors", {"format": "pt"})
    reconverted(chain)


def wrong_template(chain: Chain) -> None:
    template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}[assistant]"
    header.set_keys(chain.q8, {"tokenizer.chat_template": template})


def eos_rewritten(chain: Chain) -> None:
    for file in (chain.f16, chain.q8):
        header.set_keys(file, {"tokenizer.ggml.eos_token_id": 0})


def double_bos(chain: Chain) -> None:
    """The template writes BOS, and the file asks the tokenizer to add one as well."""
    for file in (chain.f16, chain.q8):
        header.set_keys(file, {"tokenizer.ggml.add_bos_token": True})


def shifted_tokenizer(chain: Chain) -> None:
    """Two hundred tokens of the list stand one place too far."""
    key = "tokenizer.ggml.tokens"
    for file in (chain.f16, chain.q8):
        tokens = header.read(file, arrays=(key,)).keys[key]
        assert isinstance(tokens, list)
        tokens[400:600] = [tokens[599], *tokens[400:599]]
        header.set_keys(file, {key: tokens})


def _bytes_of(file: Path, name: str) -> tuple[int, int]:
    found = header.read(file)
    tensor = next(t for t in found.tensors if t.name == name)
    return found.data_offset + tensor.offset, tensor.bytes


def tensor_zeroed(chain: Chain) -> None:
    start, size = _bytes_of(chain.q8, "blk.1.ffn_up.weight")
    with chain.q8.open("r+b") as stream:
        stream.seek(start)
        stream.write(bytes(size))


def layers_swapped(chain: Chain) -> None:
    """One layer's weights stand in the other's place."""
    data = bytearray(chain.q8.read_bytes())
    for part in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_up", "ffn_down", "ffn_gate"):
        (a, size), (b, _) = (_bytes_of(chain.q8, f"blk.{n}.{part}.weight") for n in (0, 1))
        data[a : a + size], data[b : b + size] = data[b : b + size], data[a : a + size]
    chain.q8.write_bytes(data)
