"""How far vLLM's logits are from torch's in float32, on the same weights: the KL divergence of every token of one text.

An AWQ folder's weights are unpacked from its bytes by edgeft; a 16-bit one's are what they are. Where vLLM is found: docs/servers.md.
Prints a line for each folder and dtype; nothing is asserted.

python benchmarks/vllm_logits.py TEXT FOLDER[:DTYPE] ...        DTYPE: auto (config.json's), float16, bfloat16, float32
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

TOKENS = 512


def main() -> None:
    """Read the text with each folder, in torch and in vLLM."""
    import torch

    from edgeft.servers import open_vllm

    text = Path(sys.argv[1]).read_text(encoding="utf-8")
    print("folder | vLLM | tokens | KL divergence, mean | largest | same first token")
    for argument in sys.argv[2:]:
        name, _, dtype = argument.partition(":")
        folder = Path(name)
        with open_vllm(folder, context=TOKENS, dtype=dtype or "auto") as session:
            ids = session.tokenize(text)[:TOKENS]
            said = torch.log_softmax(torch.from_numpy(session.logits(ids)).double(), -1)
            runtime = session.said
        with torch.inference_mode():
            wanted = torch.log_softmax(in_float32(folder)(torch.tensor([ids])).logits[0].double(), -1)
        apart = (wanted.exp() * (wanted - said)).sum(-1)
        same = (wanted.argmax(-1) == said.argmax(-1)).double().mean()
        print(
            f"{folder.name} | {runtime} | {len(ids)} | {apart.mean():.1e} | {apart.max():.1e} | {same:.1%}",
            flush=True,
        )


def in_float32(folder: Path) -> Any:
    """The folder's model in torch, its packed weights unpacked."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder)
    if getattr(config, "quantization_config", None) is None:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    from edgeft.awq.weights import dequantized

    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    unpacked = {name: tensor.float() for name, tensor in dequantized(folder).items()}
    wrong = [
        name for name in model.load_state_dict(unpacked, strict=False).missing_keys if "lm_head" not in name
    ]
    if wrong:
        raise SystemExit(f"{folder} has no {wrong[0]}")
    model.tie_weights()
    return model


if __name__ == "__main__":
    main()
