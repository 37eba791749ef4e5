"""Hugging Face checkpoint to GGUF, by the pinned llama.cpp's own converter."""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal

from edgeft import progress
from edgeft.errors import StageError, ToolError
from edgeft.llamacpp.header import Value, read, set_keys
from edgeft.llamacpp.source import llama_cpp_tree, python_path
from edgeft.tool import run

log = logging.getLogger(__name__)


def to_gguf(
    checkpoint: Path,
    out: Path,
    *,
    outtype: Literal["f32", "f16", "bf16"],
    model_name: str = "",
    metadata: Mapping[str, Value] | None = None,
    vocab_only: bool = False,
) -> None:
    """Write `out`, the checkpoint folder as one GGUF file; norms stay F32.

    `metadata` is set in the file afterwards, whatever its keys: the licence and other `general.*` keys, or
    `tokenizer.ggml.add_space_prefix`, that a trip through a checkpoint loses. `vocab_only` writes the tokenizer
    and hyperparameters alone, in seconds: what fails there would fail after training too. Raises StageError when
    the checkpoint is quantized, ToolError when the converter does not know the model or its tokenizer.
    """
    _refuse_quantized(checkpoint)
    progress.report("convert to GGUF")
    aside = out.with_name(f"{out.name}.part.gguf")
    # The converter fills in {ftype} and similar braces in the name it is given.
    if "{" in os.fspath(out):
        raise StageError(f"{out} has a brace in its name, which the converter would read as a pattern")
    argv = [os.fspath(checkpoint), "--outfile", os.fspath(aside), "--outtype", outtype]
    if model_name:
        argv += ["--model-name", model_name]
    if vocab_only:
        argv += ["--vocab-only"]
    said: list[str] = []  # the reason often stands before the traceback, which is all that an error quotes
    try:
        run_converter("convert_hf_to_gguf.py", argv, watch=lambda line: _heard(line, said))
        if metadata:
            set_keys(aside, metadata)
        read(aside)
        with aside.open("rb") as stream:
            os.fsync(stream.fileno())
        aside.replace(out)
    except ToolError as error:
        raise explained("".join(said), checkpoint) from error
    finally:
        aside.unlink(missing_ok=True)


def run_converter(program: str, arguments: Sequence[str], *, watch: Callable[[str], None]) -> None:
    """Run one of the pinned source's converters, by its file's name, on the pinned gguf-py and without the network.

    Raises ToolError when it fails; `watch` hears every line.
    """
    argv = [sys.executable, os.fspath(Path(__file__).with_name("converter.py")), os.fspath(llama_cpp_tree())]
    search = [os.fspath(python_path()), *filter(None, [os.environ.get("PYTHONPATH", "")])]
    environment = {"PYTHONPATH": os.pathsep.join(search), "HF_HUB_OFFLINE": "1"}
    run([*argv, program, *arguments], env=environment, watch=watch)


def explained(text: str, checkpoint: Path) -> ToolError:
    """What the converter said before it failed, as one sentence."""
    if hashed := re.search(r"chkhsh:\s+([0-9a-f]{64})", text):
        return ToolError(
            f"the pinned llama.cpp does not know the pre-tokenizer of {checkpoint} (hash {hashed[1]})",
            hint="use the base model's own tokenizer files unchanged: adding tokens to them changes the hash",
        )
    if unknown := re.search(r"Model (\S+) is not supported", text):
        return ToolError(f"the pinned llama.cpp cannot convert the architecture {unknown[1]} of {checkpoint}")
    if lost := re.search(r"KeyError: \"could not find any of: \[(.+?)\]\"", text):
        return ToolError(
            f"{checkpoint / 'config.json'} lacks {lost[1]}, which llama.cpp's converter needs",
            hint="carry config.json over from the base model instead of the one that was saved again",
        )
    if absent := re.search(r"FileNotFoundError: (?:File not found: )?(\S+)", text):
        return ToolError(
            f"llama.cpp's converter misses {absent[1]} in {checkpoint}",
            hint="copy the base model's tokenizer files into the checkpoint",
        )
    last = next((line for line in reversed(text.splitlines()) if line.strip()), text)
    return ToolError(f"llama.cpp's converter failed on {checkpoint}: {last.strip()}")


def _refuse_quantized(checkpoint: Path) -> None:
    import json

    config = checkpoint / "config.json"
    if not config.is_file():
        raise StageError(f"{checkpoint} is no checkpoint: it has no config.json")
    if "quantization_config" in json.loads(config.read_text(encoding="utf-8")):
        raise StageError(
            f"{checkpoint} is quantized already (quantization_config in config.json)",
            hint="convert the merged 16-bit checkpoint",
        )


def _heard(line: str, said: list[str]) -> None:
    said.append(line)
    if percent := re.search(r"Writing:\s+(\d+)%", line):
        progress.report("convert to GGUF", int(percent[1]), 100, unit="%")
