"""Where a chat begins and where an answer ends: template, BOS, EOS and end-of-turn, of a file against its origin.

Each function returns what is wrong, as a sentence or "", and what to say when nothing is.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeft.corpus import template
from edgeft.errors import EdgeftError
from edgeft.llamacpp.decode import Decoder
from edgeft.parity.checks.corpus import chats
from edgeft.parity.checks.prompts import Prompts, served_ids

Answer = tuple[str, str]


def same_template(trained: Prompts, file: Decoder) -> Answer:
    """C-17, C-20: the file must carry the template that was trained, to the byte."""
    ours, theirs = trained.template, file.chat_template
    right = f"the same {len(ours)} characters" if ours else "neither has one"
    if ours == theirs:
        return "", right
    what = f"carries another chat template than {trained.owner}" if theirs else "carries no chat template"
    return f"the file {what} ({len(theirs)} characters, {len(ours)} expected)", right


@dataclass(frozen=True, kw_only=True)
class Seen:
    """One chat as a model sees it."""

    text: str
    trained: list[int]
    served: list[int]


def seen(trained: Prompts, file: Decoder, texts: Sequence[str]) -> list[Seen]:
    """Over a hundred chats (those that the template does not refuse) in training and, as ids, in llama-server."""
    written = [
        text for messages in chats(texts, trained.form) if (text := trained.text(messages)) is not None
    ]
    return [Seen(text=text, trained=trained.encode(text), served=served_ids(file, text)) for text in written]


def same_chats(written: Sequence[Seen], names: tuple[str, str]) -> Answer:
    """C-04: chats must have the ids they were trained with."""
    for chat in written:
        if chat.trained != chat.served:
            where = difference(names, chat.trained, chat.served)
            return f"the prompt that ends in {chat.text[-60:]!r} has other tokens: {where}", ""
    return "", f"{len(written)} templated chats have the ids they were trained with"


def same_bos(written: Sequence[Seen], trained: Prompts, file: Decoder) -> Answer:
    """C-24: the trained number of BOS, and of EOS, which a vocabulary may append to every prompt."""
    watched = [("BOS", trained.bos), ("BOS", file.bos), ("EOS", file.eos)]
    for name, token in watched:
        if token is None:
            continue
        for chat in written:
            ours, theirs = chat.trained.count(token), chat.served.count(token)
            if ours != theirs:
                flag = "asks for" if file.add_bos else "does not ask for"
                return (
                    f"the prompt that begins with {chat.text[:40]!r} has {ours} {name} (token {token}) as {trained.owner} "
                    f"knows it and {theirs} as llama-server decodes it; the file's vocabulary {flag} a BOS"
                ), ""
    if trained.bos is None or not written:
        return "", "no BOS is known"
    return "", f"{len(written)} chats, the first with {written[0].trained.count(trained.bos)} BOS as trained"


def same_special_ids(tokenizer: Any, file: Decoder) -> Answer:
    """C-21: the ids of BOS, EOS and padding."""
    pad = file.meta("tokenizer.ggml.padding_token_id")
    pairs = (
        ("end-of-sequence", tokenizer.eos_token_id, file.eos),
        ("begin-of-sequence", tokenizer.bos_token_id, file.bos),
        ("padding", tokenizer.pad_token_id, int(pad) if pad else None),
    )
    wrong = [
        f"the {name} id is {theirs} in the file and {ours} in the checkpoint"
        for name, ours, theirs in pairs
        if ours is not None and theirs not in (ours, None)
    ]
    if tokenizer.eos_token_id is not None and file.eos is None:
        wrong.append(f"the file has no end-of-sequence id; the checkpoint has {tokenizer.eos_token_id}")
    return "; ".join(wrong), ", ".join(f"{name} {theirs}" for name, _, theirs in pairs)


def same_special_ids_as(reference: Decoder, file: Decoder, added: Mapping[int, str]) -> Answer:
    """C-21, C-24: the same and what is added to a prompt, between two files; `added` are tokens that may end answers."""
    pairs: list[tuple[str, Any, Any]] = [
        *((name, getattr(reference, name), getattr(file, name)) for name in ("bos", "eos", "eot", "add_bos")),
        ("added to a prompt", _added_to_a_prompt(reference), _added_to_a_prompt(file)),
        (
            "ends of an answer",
            [i for i in added if reference.is_end(i)],
            [i for i in added if file.is_end(i)],
        ),
    ]
    wrong = [
        f"{name} is {b} in the shipped file and {a} in the reference file" for name, a, b in pairs if a != b
    ]
    return "; ".join(wrong), ", ".join(f"{name} {a}" for name, a, _ in pairs)


def same_ends(checkpoint: Path, tokenizer: Any, trained: Prompts, file: Decoder) -> Answer:
    """C-21, C-22: llama.cpp must stop generating wherever the trained model does."""
    wanted, said = ends(checkpoint, tokenizer, trained)
    for token, why in wanted.items():
        if token >= file.n_vocab or not file.is_end(token):
            text = tokenizer.convert_ids_to_tokens(token)
            return f"llama.cpp does not stop at token {token} {text!r}, {why}", ""
    return "", f"llama.cpp stops at {sorted(wanted)}{said}"


def ends(checkpoint: Path, tokenizer: Any, trained: Prompts) -> tuple[dict[int, str], str]:
    """The tokens that end an answer of the trained model, each with the reason; and what could not be found out."""
    wanted: dict[int, str] = {}
    opening = _opening(trained)  # Phi-3 lists the token that opens an answer among those that end one
    for token in named_ends(checkpoint):
        if token not in opening:
            wanted[token] = "which generation_config.json names as an end"
    if tokenizer.eos_token_id is not None:
        wanted[tokenizer.eos_token_id] = "the checkpoint's end of sequence"
    said = ""
    if trained.template:
        try:
            wanted[template.inspect(tokenizer).end_of_turn_id] = "which the template writes after an answer"
        except EdgeftError as e:
            said = f"; {e}"
    return wanted, said


def named_ends(folder: Path) -> list[int]:
    """The end-of-sequence ids that a folder's generation_config.json names."""
    config = folder / "generation_config.json"
    listed = json.loads(config.read_text(encoding="utf-8")).get("eos_token_id") if config.is_file() else None
    return [i for i in (listed if isinstance(listed, list) else [listed]) if i is not None]


def difference(names: tuple[str, str], a: Sequence[int], b: Sequence[int]) -> str:
    """Where two lists of ids part, in words."""
    at = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    return f"at token {at} {names[0]} has {list(a[at : at + 4])}, {names[1]} {list(b[at : at + 4])}"


def _opening(trained: Prompts) -> list[int]:
    """The tokens that the template writes to begin an answer."""
    ask = [{"role": "user", "content": "a"}]
    without, whole = trained.text(ask, generation_prompt=False), trained.text(ask)
    return trained.encode(whole.removeprefix(without)) if without and whole else []


def _added_to_a_prompt(file: Decoder) -> list[int]:
    return file.tokenize("", add_special=True, parse_special=True)
