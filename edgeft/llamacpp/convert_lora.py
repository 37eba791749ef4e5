"""PEFT LoRA adapter to GGUF, by the pinned llama.cpp's own converter, which renames and permutes as for the base.

It writes what it is given: an adapter whose runtime scale is lora_alpha / rank, as the format has it. What else PEFT
knows (rsLoRA, other ranks and alphas for some layers) is brought to that form by edgeft.grid.adapter.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from edgeft import progress
from edgeft.errors import StageError, ToolError
from edgeft.llamacpp.convert import run_converter
from edgeft.llamacpp.header import Value, set_keys


def lora_to_gguf(
    adapter: Path,
    checkpoint: Path,
    out: Path,
    *,
    outtype: Literal["f16", "f32"],
    metadata: Mapping[str, Value] | None = None,
) -> None:
    """Write `out`, the PEFT folder as a GGUF adapter for what `checkpoint` (config and tokenizer) converts to.

    `metadata` is set in the file afterwards. Raises StageError for an adapter that is not there, ToolError when the
    converter does not know the model, or cannot split or turn an adapter as it does the model's weights.
    """
    for file in (adapter / "adapter_config.json", adapter / "adapter_model.safetensors"):
        if not file.is_file():
            raise StageError(f"{adapter} is no PEFT adapter: it has no {file.name}")
    if "{" in os.fspath(out):
        raise StageError(f"{out} has a brace in its name, which the converter would read as a pattern")
    progress.report("convert the adapter to GGUF")
    aside = out.with_name(f"{out.name}.part.gguf")
    argv = [
        os.fspath(adapter), "--base", os.fspath(checkpoint), "--outfile", os.fspath(aside), "--outtype", outtype,
    ]  # fmt: skip
    said: list[str] = []
    try:
        run_converter("convert_lora_to_gguf.py", argv, watch=said.append)
        set_keys(aside, metadata or {})
        aside.replace(out)
    except ToolError as error:
        raise explained("".join(said), checkpoint) from error
    finally:
        aside.unlink(missing_ok=True)


def explained(text: str, checkpoint: Path) -> ToolError:
    """What the converter said before it failed, as one sentence."""
    if unknown := re.search(r"Model (\S+) is not supported", text):
        return ToolError(
            f"the pinned llama.cpp cannot convert adapters of the architecture {unknown[1]} of {checkpoint}"
        )
    if unexpected := re.search(r"Unexpected name '(\S+)'", text):
        return ToolError(
            f"llama.cpp's adapter format cannot hold {unexpected[1]}",
            hint="train LoRA on linear layers only, without modules_to_save, bias or embeddings",
        )
    if foreign := re.search(r"Can not map tensor '(\S+)'", text):
        return ToolError(f"the adapter's layer {foreign[1]} is none of the model in {checkpoint}")
    if "NotImplementedError" in text or "lm_head is present in adapter" in text:
        return ToolError(
            f"llama.cpp's converter rearranges a weight of {checkpoint} in a way that it cannot do to a LoRA pair",
            hint='leave that layer out of target_modules, or use a method that merges: [train] method = "plain"',
        )
    last = next((line for line in reversed(text.splitlines()) if line.strip()), text)
    return ToolError(f"llama.cpp's converter failed on the adapter for {checkpoint}: {last.strip()}")
