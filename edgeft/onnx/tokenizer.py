"""The tokenizer files of a GenAI folder: the checkpoint's own, said in the words that GenAI understands.

GenAI has a tokenizer of its own (onnxruntime-extensions), which reads tokenizer.json and does not know every part of it:
it takes `Digits` for ASCII digits only, and forgets the pattern that `ByteLevel` brings with it when another part stands
before it. Both can be written as a `Split` instead, which means the same to everybody.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgeft.errors import StageError

FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    "vocab.json", "merges.txt", "tokenizer.model",
)  # fmt: skip
BYTE_LEVEL = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""What ByteLevel splits by itself: GPT-2's pattern (tokenizers, pre_tokenizers/byte_level.rs). GenAI knows this very text."""
_LONGEST = 1 << 31
"""transformers writes 1e30 for a tokenizer without a limit, which is no length to GenAI."""


def write(checkpoint: Path, out: Path, *, context: int) -> list[str]:
    """Copy the tokenizer's files and the chat template, and put what GenAI misreads in other words; what was changed.

    Raises StageError for a checkpoint without tokenizer.json: GenAI reads no other form reliably.
    """
    if not (checkpoint / "tokenizer.json").is_file():
        raise StageError(
            "the checkpoint has no tokenizer.json, the one form of a tokenizer that ONNX Runtime GenAI reads",
            hint="save its tokenizer with transformers 5, which writes one",
        )
    for name in FILES:
        if (checkpoint / name).is_file():
            shutil.copyfile(checkpoint / name, out / name)
    said = []
    described = json.loads((out / "tokenizer.json").read_text(encoding="utf-8"))
    plain = in_plain_words(described.get("pre_tokenizer"))
    if plain != described.get("pre_tokenizer"):
        described["pre_tokenizer"] = plain
        _write(out / "tokenizer.json", described)
        said.append("tokenizer.json: Digits and ByteLevel's pattern written as Split, for GenAI's tokenizer")
    settings = _read(out / "tokenizer_config.json")
    if int(settings.get("model_max_length") or 0) > _LONGEST:
        _write(out / "tokenizer_config.json", {**settings, "model_max_length": context})
        said.append(f"tokenizer_config.json: model_max_length {context}")
    return said


def in_plain_words(part: Any) -> Any:
    """A pre-tokenizer with `Digits`, and a `ByteLevel` behind it, as splits by the same patterns; others as they are."""
    if not isinstance(part, Mapping) or part.get("type") != "Sequence":
        return part
    parts = part["pretokenizers"]
    if not any(p["type"] == "Digits" for p in parts):
        return part
    if any(p["type"] == "ByteLevel" and p.get("add_prefix_space") for p in parts):
        return part  # the space would have to come before the splits
    plain: list[Any] = []
    for one in parts:
        if one["type"] == "Digits":
            plain.append(_split(r"\p{N}" if one.get("individual_digits") else r"\p{N}+"))
        elif one["type"] == "ByteLevel" and one.get("use_regex", True):
            plain += [_split(BYTE_LEVEL), {**one, "use_regex": False}]
        else:
            plain.append(one)
    return {**part, "pretokenizers": plain}


def _split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def _read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return found


def _write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
