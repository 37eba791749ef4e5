"""update.json: what an update makes of the device's model, as the keys' owner signed it."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from edgeft.agent.errors import Damaged
from edgeft.agent.places import NAME

FORMAT = 1
FILE = "update.json"
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, kw_only=True)
class Part:
    """One file of the new version."""

    size: int
    sha256: str
    how: str
    """whole: the target's bytes; base: the file of the same name on the device; delta: the target applied to that."""
    target: str
    """Name below payload/; empty for base."""
    base: str
    """sha256 of the file on the device that it is made from; empty for whole."""
    executable: bool


@dataclass(frozen=True, kw_only=True)
class Canary:
    """A question that the new version must answer."""

    prompt: str
    max_tokens: int = 24
    contains: tuple[str, ...] = ()
    """One of these must stand in the answer, in whatever case; empty: any answer that is one."""


@dataclass(frozen=True, kw_only=True)
class Description:
    name: str
    sequence: int
    label: str
    kind: str
    """full, adapter or delta: a word for people."""
    files: dict[str, Part]
    canaries: tuple[Canary, ...]


def read(content: bytes) -> Description:
    """Raises Damaged with what is wrong: then whoever signed it signed a mistake."""
    try:
        found = json.loads(content)
        if found["format"] != FORMAT:
            raise ValueError(f"format {found['format']!r} is unknown to this agent, which knows {FORMAT}")
        name, sequence = found["name"], found["sequence"]
        if not isinstance(name, str) or not NAME.fullmatch(name):
            raise ValueError(f"name {name!r}")
        if not isinstance(sequence, int) or isinstance(sequence, bool) or not 1 <= sequence < 1 << 53:
            raise ValueError(f"sequence {sequence!r}")
        base = found.get("base") or {}
        parts = {_path(key): _part(key, value, base) for key, value in found["files"].items()}
        if lacking := {"model.gguf", "run.sh"} - set(parts):
            raise ValueError(f"no {min(lacking)} among its files")
        if clash := [a for a in parts for b in parts if b.startswith(a + "/")]:
            raise ValueError(f"{clash[0]} is a file and a folder")
        canaries = tuple(_canary(value) for value in found.get("canaries") or [])
        return Description(name=name, sequence=sequence, label=str(found.get("label") or "")[:64],
                           kind=str(found.get("kind") or "")[:16], files=parts, canaries=canaries)  # fmt: skip
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        missing = "it lacks " if isinstance(error, KeyError) else ""
        raise Damaged(f"{FILE} in the file cannot be followed: {missing}{error}") from None


def _part(name: str, value: dict[str, Any], base: dict[str, Any]) -> Part:
    how, size, sha256 = value["how"], value["bytes"], value["sha256"]
    if how not in ("whole", "base", "delta"):
        raise ValueError(f"{name} is made in an unknown way: {how!r}")
    if not isinstance(size, int) or isinstance(size, bool) or not 0 <= size < 1 << 50:
        raise ValueError(f"{name} has {size!r} bytes")
    source = {"whole": "", "base": sha256, "delta": base.get(name, "")}[how]
    for wanted in (sha256, source) if how != "whole" else (sha256,):
        if not isinstance(wanted, str) or not _SHA256.fullmatch(wanted):
            raise ValueError(f"{name} has {wanted!r} where a sha256 should be")
    target = "" if how == "base" else value["target"]
    if not isinstance(target, str):
        raise TypeError(f"{name} is made from {target!r}")
    executable = value.get("executable", False)
    return Part(size=size, sha256=sha256, how=how, target=target, base=source, executable=executable is True)


def _path(name: str) -> str:
    parts = name.split("/")
    if len(parts) > 8 or not all(map(_is_plain, parts)) or name == FILE:
        raise ValueError(f"{name!r} cannot be a file's name")
    return name


def _is_plain(part: str) -> bool:
    """A part of a name that leads nowhere else. Hidden files are none of a model's, and one name is being made."""
    return (
        0 < len(part.encode()) <= 200 and part.isprintable() and "\\" not in part and not part.startswith(".")
    )


def _canary(value: dict[str, Any]) -> Canary:
    prompt, tokens, contains = value["prompt"], value.get("max_tokens", 24), value.get("contains") or []
    if not isinstance(prompt, str) or not 0 < len(prompt) <= 10000:
        raise ValueError("a canary without a prompt")
    if not isinstance(tokens, int) or not 1 <= tokens <= 256:
        raise ValueError(f"a canary with max_tokens {tokens!r}")
    if not isinstance(contains, list) or not all(isinstance(word, str) for word in contains):
        raise ValueError("a canary whose contains is not a list of texts")
    return Canary(prompt=prompt, max_tokens=tokens, contains=tuple(contains))
