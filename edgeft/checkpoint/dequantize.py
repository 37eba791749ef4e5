"""A GGUF file as a 16-bit Hugging Face checkpoint: blocks dequantized, config and tokenizer rebuilt from its header."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from edgeft import progress
from edgeft.errors import StageError
from edgeft.llamacpp import header as gguf_header

log = logging.getLogger(__name__)

F16_MAX = 65504.0
DIGITS_APART = ("starcoder", "refact", "command-r", "smollm", "codeshell", "exaone", "minerva-7b")
"""Values of `tokenizer.ggml.pre` whose tokenizers split digits before anything else."""


def gguf_to_checkpoint(gguf: Path, out: Path) -> dict[str, Any]:
    """Write `out/` (safetensors, config, tokenizer, chat template) from a GGUF file.

    The weights are float16, or bfloat16 when one of them is beyond float16's largest number (65504). Returns
    facts: the dtype, and the licence and name that the file carries. Raises StageError for an architecture that
    transformers cannot read from GGUF.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    header = dict(gguf_header.read(gguf).keys)
    progress.report("dequantize the base")
    try:
        model = AutoModelForCausalLM.from_pretrained(
            str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32
        )
        tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
    except (ValueError, NotImplementedError, KeyError) as e:
        raise StageError(
            f"transformers cannot read the architecture {header.get('general.architecture')!r} from {gguf.name}: {e}",
            hint="give the model's original checkpoint as [base] repo or path",
        ) from e
    largest = max(float(p.detach().abs().max()) for p in model.parameters())
    if not largest < float("inf"):
        raise StageError(f"{gguf.name} holds weights that are not finite numbers")
    dtype = torch.float16 if largest <= F16_MAX else torch.bfloat16
    _forget_quantizer(model)
    model.to(dtype)
    model.config.dtype = dtype
    out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    _same_special_ids(tokenizer, header, gguf)
    repaired = digits_apart(out, str(header.get("tokenizer.ggml.pre", "")))
    for file in out.iterdir():
        file.chmod(0o644)  # safetensors writes its files readable for the owner alone
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "licence": header.get("general.license", ""),
        "name": header.get("general.name", ""),
        "add_space_prefix": header.get("tokenizer.ggml.add_space_prefix"),
        "tokenizer_repairs": repaired,
    }


def _same_special_ids(tokenizer: Any, header: dict[str, Any], gguf: Path) -> None:
    """C-21: a tokenizer rebuilt with another end of turn would be trained never to stop.

    transformers 5.17 did that to SmolLM2 (end of sequence 1 instead of 2); 5.23 does not.
    """
    for name in ("bos", "eos"):
        wanted, got = header.get(f"tokenizer.ggml.{name}_token_id"), getattr(tokenizer, f"{name}_token_id")
        if wanted is not None and got is not None and got != wanted:
            raise StageError(
                f"transformers read the {name} token of {gguf.name} as {got}; the file says {wanted}",
                hint="install transformers 5.23 or newer",
            )


def digits_apart(folder: Path, pre: str) -> list[str]:
    """Give a tokenizer its digit splitting back, and say so.

    transformers rebuilds every byte-level BPE tokenizer in a GGUF with GPT-2's split. These families cut each digit
    off first (src/llama-vocab.cpp, the case that begins with STARCODER); without it " ½" is one word instead of two,
    and the ids differ from the ones the model was trained on.
    """
    if pre not in DIGITS_APART:
        return []
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    split = {"type": "Digits", "individual_digits": True}
    if "Digits" in json.dumps(tokenizer["pre_tokenizer"]):
        return []
    tokenizer["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, tokenizer["pre_tokenizer"]]}
    path.write_text(json.dumps(tokenizer, ensure_ascii=False, indent=2), encoding="utf-8")
    said = f"tokenizer.json: digits are split one by one again, as the file's pre-tokenizer {pre!r} does"
    log.warning("%s", said)
    return [said]


def _forget_quantizer(model: Any) -> None:
    """transformers keeps a dequantized model marked as quantized and then refuses to cast or save it."""
    model.is_quantized = False
    for name in ("hf_quantizer", "quantization_method"):
        if hasattr(model, name):
            delattr(model, name)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config


def chat_template(folder: Path) -> str:
    """The chat template stored beside a checkpoint, or an empty string."""
    if (own := folder / "chat_template.jinja").is_file():
        return own.read_text(encoding="utf-8")
    config = folder / "tokenizer_config.json"
    if not config.is_file():
        return ""
    template = json.loads(config.read_text(encoding="utf-8")).get("chat_template", "")
    if isinstance(template, list):  # several named templates; the default one is for chatting
        template = next((t["template"] for t in template if t.get("name") == "default"), "")
    return str(template or "")
