"""Opens a model that edgeft may not have made: a checkpoint folder, one with an adapter, or a GGUF file."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from edgeft.errors import DataError
from edgeft.llamacpp.decode import Decoder
from edgeft.parity.checks import prompts
from edgeft.parity.checks.exact import FLOAT32_BELOW
from edgeft.parity.checks.prompts import Prompts
from edgeft.parity.speakers import Gguf, Speaker, Torch


@dataclass(frozen=True, kw_only=True)
class Opened:
    """A model that can be asked, and its own tokenizer and template."""

    title: str
    """For people, with the precision that it is computed in."""
    speaker: Speaker
    encode: Callable[[str], list[int]]
    """Token ids of a text: special tokens are read, none is added."""
    prompts: Prompts
    """Conversations by the model's own template."""
    bos: int | None
    """What llama.cpp puts in front of a window; None for a vocabulary that adds nothing."""
    without_adapter: Callable[[], AbstractContextManager[Any]] | None = field(default=None)
    """Inside it the speaker is the model before training; None without an adapter."""


def is_gguf(path: Path) -> bool:
    """Whether the path is a GGUF file. Raises DataError when it is neither that nor a checkpoint folder."""
    if path.is_dir() and (path / "config.json").is_file():
        return False
    if path.is_file() and path.suffix == ".gguf":
        return True
    what = (
        "does not exist" if not path.exists() else "is neither a .gguf file nor a folder with a config.json"
    )
    raise DataError(f"{path} {what}", hint="give a checkpoint as transformers saves it, or a GGUF file")


@contextmanager
def opened(
    path: Path, *, n_ctx: int, adapter: Path | None = None, method: Literal["lora", "qlora"] = "lora"
) -> Iterator[Opened]:
    """Open a model for asking.

    `n_ctx` is the longest sequence, in tokens. With `adapter`, a PEFT folder, `path` is the base it was trained on,
    held in NF4 with `method` "qlora". A checkpoint is computed in float32 up to 1.5 B parameters, else in its own
    precision. Raises DataError for what is no model.
    """
    if is_gguf(path):
        if adapter:
            raise DataError(f"{path} is a GGUF file; an adapter needs its base as a checkpoint folder")
        with Decoder(path, n_ctx=n_ctx) as decoder:
            yield _gguf(path, decoder)
    else:
        yield _checkpoint(path, adapter, method)


def _gguf(path: Path, decoder: Decoder) -> Opened:
    return Opened(
        title=f"{path.name}, computed by llama.cpp", speaker=Gguf(decoder), prompts=prompts.of_file(decoder, path.name),
        encode=lambda text: decoder.tokenize(text, add_special=False, parse_special=True),
        bos=decoder.bos if decoder.add_bos else None,
    )  # fmt: skip


def _checkpoint(folder: Path, adapter: Path | None, method: Literal["lora", "qlora"]) -> Opened:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging as chatter

    from edgeft.parity.reference import bos
    from edgeft.training.model import device_name, is_quantized, load_trained, pick_device

    if is_quantized(folder):
        raise DataError(
            f"{folder} is quantized already: it is not the model that was trained, only a copy of it",
            hint="give the 16-bit checkpoint, or the base with --adapter and --qlora",
        )
    chatter.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    small = sum(p.stat().st_size for p in folder.glob("*.safetensors")) / 2 < FLOAT32_BELOW
    device = pick_device()
    off: Callable[[], AbstractContextManager[Any]] | None = None
    if adapter:
        model = load_trained(folder, adapter, method=method, compute_dtype="float32" if small else "auto")
        off = model.disable_adapter
        held = "in NF4" if method == "qlora" else "in its own precision"
        title = f"{folder.name} {held} with the adapter {adapter.name} attached"
    else:
        dtype: Any = torch.float32 if small else "auto"
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True).to(device)
        title = f"{folder.name} as transformers computes it"
    precision = str(next(model.parameters()).dtype).removeprefix("torch.")

    return Opened(
        title=f"{title}, {precision} on {device_name(device)}", speaker=Torch(model, tokenizer),
        encode=lambda text: list(tokenizer.encode(text, add_special_tokens=False)), bos=bos(tokenizer),
        prompts=prompts.of_checkpoint(folder, tokenizer), without_adapter=off,
    )  # fmt: skip


def name_of(path: Path) -> str:
    """What a model calls itself: the GGUF's general.name, the checkpoint's folder."""
    from edgeft.llamacpp import header

    if path.is_file():
        return str(header.read(path).keys.get("general.name") or path.stem)
    own = path / "config.json"
    config = json.loads(own.read_text(encoding="utf-8")) if own.is_file() else {}
    return str(config.get("_name_or_path") or path.name)
