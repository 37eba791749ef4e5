"""Tiny models of several families with random weights, saved as transformers saves them."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers

SHAPE = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 128, "tie_word_embeddings": True, "bos_token_id": 1,
    "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip

FAMILIES = {
    "llama": (transformers.LlamaConfig, {}),
    "untied": (transformers.LlamaConfig, {"tie_word_embeddings": False}),
    "biases": (transformers.LlamaConfig, {"attention_bias": True, "mlp_bias": True}),
    "qwen2": (transformers.Qwen2Config, {}),
    "qwen3": (transformers.Qwen3Config, {}),
    "gemma": (transformers.GemmaConfig, {}),
    "gemma2": (transformers.Gemma2Config, {}),
    "gemma3": (transformers.Gemma3TextConfig, {}),
    "phi3": (transformers.Phi3Config, {}),
    "olmo2": (transformers.Olmo2Config, {}),
    "gpt_neox": (transformers.GPTNeoXConfig, {}),
    "stablelm": (transformers.StableLmConfig, {}),
    "mixture": (transformers.Qwen2MoeConfig, {"num_experts": 4, "moe_intermediate_size": 64, "shared_expert_intermediate_size": 64}),
}  # fmt: skip


def model(family: str, dtype: torch.dtype = torch.float16, **more: object):
    """A model of the family whose norms and biases are not at their plain starting values either."""
    kind, extra = FAMILIES[family]
    torch.manual_seed(0)
    made = transformers.AutoModelForCausalLM.from_config(kind(**{**SHAPE, **extra, **more}))
    with torch.no_grad():
        for name, p in made.named_parameters():
            if p.ndim == 1:
                p += 0.3 * torch.randn_like(p)
            elif "embed" not in name:
                p *= 4
    return made.to(dtype).eval()


def save(folder: Path, family: str, dtype: torch.dtype = torch.float16, **more: object) -> Path:
    model(family, dtype, **more).save_pretrained(folder)
    tokenizer(folder)
    return folder


def tokenizer(folder: Path) -> None:
    """One token a word, w3 to w95, with a template."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i for i in range(3, 96)}}
    inner = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    made.chat_template = "{% for m in messages %}w3 {{ m.content }} {% endfor %}w4"
    made.save_pretrained(folder)


def windows(count: int = 6, size: int = 32) -> list[list[int]]:
    made = torch.Generator().manual_seed(1)
    return torch.randint(3, 96, (count, size), generator=made).tolist()
