"""A checkpoint cut to its first layers: small enough to try a conversion on before hours of training."""

from __future__ import annotations

import shutil
from pathlib import Path

WHOLE_BELOW = 600_000_000
"""Parameters up to which a model is tried whole: its float32 logits cost seconds."""


def truncated(source: Path, out: Path, layers: int = 4) -> Path:
    """Write the first `layers` blocks of a checkpoint to `out`, with the tokenizer and template files as they are.

    Layers are the first ones in order, so patterns such as sliding and full attention in turn are kept as far as they
    go. Returns `out`.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(source)
    text = config.get_text_config()
    keep = min(layers, text.num_hidden_layers)
    for name, value in list(vars(text).items()):
        if isinstance(value, list) and len(value) == text.num_hidden_layers:
            setattr(text, name, value[:keep])
    text.num_hidden_layers = keep
    model = AutoModelForCausalLM.from_pretrained(source, config=config, dtype=torch.bfloat16)
    model.save_pretrained(out)
    for path in source.iterdir():
        if path.is_file() and path.name != "config.json" and "safetensors" not in path.name:
            shutil.copyfile(path, out / path.name)
    return out
