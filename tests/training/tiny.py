"""Tiny random models of several families, and rows to teach them."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from edgeft.training.rows import NOT_SUPERVISED, Row

END = 2


def config(family: str, **changes: Any) -> Any:
    import transformers as t

    small = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
    feed = {"intermediate_size": 48, "max_position_embeddings": 64}
    grouped = {**small, **feed, "num_key_value_heads": 2}
    made = {
        "llama": lambda: t.LlamaConfig(**grouped, tie_word_embeddings=True),
        "qwen2": lambda: t.Qwen2Config(**grouped),
        "gpt2": lambda: t.GPT2Config(vocab_size=64, n_embd=32, n_layer=3, n_head=4, n_positions=64),
        "bloom": lambda: t.BloomConfig(vocab_size=64, hidden_size=32, n_layer=3, n_head=4),
        "gpt_neox": lambda: t.GPTNeoXConfig(**small, **feed),
        "gemma3": lambda: t.Gemma3TextConfig(**grouped, head_dim=8, layer_types=None, sliding_window=16),
        "glm4": lambda: t.Glm4Config(**grouped, head_dim=8, pad_token_id=0),
        "qwen3_moe": lambda: t.Qwen3MoeConfig(
            **grouped, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
            mlp_only_layers=[0], decoder_sparse_step=1,
        ),
        "qwen3_next": lambda: t.Qwen3NextConfig(
            **{**grouped, "num_hidden_layers": 4}, head_dim=8, num_experts=0, linear_num_value_heads=2,
            linear_num_key_heads=2, linear_key_head_dim=8, linear_value_head_dim=8,
        ),
    }[family]()  # fmt: skip
    for name, value in changes.items():
        setattr(made, name, value)
    return made


def model(family: str, **changes: Any) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config(family, **changes), dtype=torch.float32).eval()


def checkpoint(
    folder: Path, family: str = "llama", *, dtype: torch.dtype = torch.float32, **save: Any
) -> Path:
    torch.nn.Module.to(model(family), dtype).save_pretrained(folder, **save)
    return folder


def rows(count: int, *, seed: int = 0, vocabulary: int = 64) -> list[Row]:
    """Answers that follow from the question, so that there is something to learn."""
    rng = random.Random(seed)
    made = []
    for _ in range(count):
        question = [rng.randrange(10, vocabulary) for _ in range(rng.randint(3, 8))]
        answer = [10 + (token + 1) % (vocabulary - 10) for token in question[: rng.randint(2, 5)]] + [END]
        made.append(
            Row(ids=(1, *question, *answer), labels=(*[NOT_SUPERVISED] * (1 + len(question)), *answer))
        )
    return made
