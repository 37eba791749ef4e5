"""Real models for llama.cpp: SmolLM2 out of its package, and tiny random Llamas with its vocabulary."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from edgeft.llamacpp import header

ROOT = Path(__file__).parents[2]
TEXT = ROOT.parent / "shared" / "data" / "eval_state_union.txt"


@pytest.fixture(scope="session")
def english() -> str:
    """Some thousand words of plain English."""
    if not TEXT.is_file():
        pytest.skip(f"{TEXT} is not there")
    return TEXT.read_text(encoding="utf-8")


@pytest.fixture(scope="session")
def tiny(library, smollm2, tmp_path_factory) -> Callable[[int], Path]:
    """Makes a random Llama (2 layers, SmolLM2's vocabulary, F32 GGUF) of a given width, once a session."""
    made: dict[int, Path] = {}

    def make(width: int) -> Path:
        if width not in made:
            made[width] = tmp_path_factory.mktemp("tiny") / f"tiny-{width}.gguf"
            _write_llama(made[width], width, smollm2)
        return made[width]

    return make


def _write_llama(path: Path, width: int, vocabulary: Path) -> None:
    import numpy as np

    layers, heads, n_vocab = 2, 4, 49152
    random = np.random.default_rng(width)
    shapes = {"token_embd": (width, n_vocab), "output_norm": (width,)}
    for i in range(layers):
        shapes |= {
            f"blk.{i}.attn_norm": (width,), f"blk.{i}.ffn_norm": (width,),
            f"blk.{i}.attn_q": (width, width), f"blk.{i}.attn_output": (width, width),
            f"blk.{i}.attn_k": (width, width // 2), f"blk.{i}.attn_v": (width, width // 2),
            f"blk.{i}.ffn_gate": (width, 2 * width), f"blk.{i}.ffn_up": (width, 2 * width),
            f"blk.{i}.ffn_down": (2 * width, width),
        }  # fmt: skip
    tensors = {}
    for name, shape in shapes.items():
        values = 0.1 * random.standard_normal(shape[::-1], np.float32)
        tensors[f"{name}.weight"] = (shape, (values + (len(shape) == 1)).astype("<f4").tobytes())
    keys = {
        "general.architecture": "llama", "general.name": "tiny", "general.file_type": 0,
        "llama.block_count": layers, "llama.context_length": 1024, "llama.embedding_length": width,
        "llama.feed_forward_length": 2 * width, "llama.attention.head_count": heads,
        "llama.attention.head_count_kv": 2, "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.dimension_count": width // heads, "llama.vocab_size": n_vocab,
    }  # fmt: skip
    whole, spans = vocabulary.read_bytes(), header.read(vocabulary).spans
    copied = [whole[start:end] for name, (start, end) in spans.items() if name.startswith("tokenizer.")]
    header.write(path, keys, tensors, copied)


@pytest.fixture(scope="session")
def checkpoint(smollm2, library, tmp_path_factory) -> Path:
    """A random two-layer Llama as transformers saves it, with SmolLM2's tokenizer; its path has spaces in it."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("hf") / "ein Modell, für Tests"
    tokenizer = AutoTokenizer.from_pretrained(smollm2.parent, gguf_file=smollm2.name)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.float16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
