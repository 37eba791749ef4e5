"""The update file: chooses what goes along whole, as a difference or not at all, signs the list, and packs it.

    NAME-SEQUENCE.edgeft        a plain tar, the same bytes for the same files, keys and number
      metadata/N.root.json      every root so far, so that a device of any age finds its way to the newest key
      metadata/targets.json     size and sha256 of everything below payload/; its version is the sequence number
      payload/update.json       name, number, and of every file of the new version: size, sha256, and what it is made of
      payload/files/…           whole files
      payload/delta/…           differences (edgeft/agent/delta.py)

A file is read back with the agent's own code before it gets its name.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import tarfile
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from edgeft import progress
from edgeft.agent import archive, description
from edgeft.agent.errors import AgentError
from edgeft.bundle import Content
from edgeft.errors import DataError, StageError
from edgeft.llamacpp.adapter import ADAPTER, MODEL
from edgeft.updates import custody, delta, ledger, metadata
from edgeft.updates.keys import Ask

Kind = Literal["auto", "full", "adapter", "delta"]
WORTH = 0.7
"""A delta is taken where it is smaller than this share of the file: it makes the update depend on one version, and the
device reads as much as before and computes besides."""
_PLAIN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_./+-]{0,79}")


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What an update is to be."""

    name: str
    """The model's name on the device."""
    label: str = ""
    """The version, for people."""
    sequence: int = 0
    """Its number; 0: the one that these contents have, or else the next."""
    above: int = 0
    """The highest number that the device is known to have had."""
    kind: Kind = "auto"
    canaries: Sequence[Mapping[str, Any]] = ()
    """Questions that the new version must answer on the device: prompt, max_tokens, contains."""


@dataclass(frozen=True, kw_only=True)
class Made:
    """An update file."""

    path: Path
    name: str
    bytes: int
    sequence: int
    kind: str
    base: dict[str, str]
    """sha256 of the files that a device must have; empty where it needs none."""
    how: dict[str, str]
    """Of every file of the version: whole, base or delta."""
    sizes: dict[str, int]
    """Bytes in the update, by file."""


@dataclass(kw_only=True)
class _Parts:
    """What the update consists of, while it is put together."""

    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    base: dict[str, str] = field(default_factory=dict)
    payload: dict[str, Content] = field(default_factory=dict)
    """Target name -> its bytes."""


def make(
    contents: Mapping[str, Content],
    wanted: Wanted,
    keys: Path,
    ask: Ask,
    *,
    out: Path | None = None,
    folder: Path = Path(),
    old: Mapping[str, Path] | None = None,
    board: Mapping[str, str] | None = None,
) -> Made:
    """Write the update that makes a device's model consist of `contents` (name -> file or bytes).

    `old`: model.gguf and adapter.gguf of the version on the device, where they are at hand; `board`: their sha256 there,
    where that is all that is known. `out`: NAME-SEQUENCE.edgeft in `folder` by default. Raises SetupError for
    keys that are not there and numbers that are taken, DataError where the wanted kind does not apply.
    """
    signer = custody.targets_signer(keys, ask)
    there = {**{name: _sha256(path)[1] for name, path in (old or {}).items()}, **(board or {})}
    meant = ledger.fingerprint(
        wanted.label, {name: _sha256(content)[1] for name, content in contents.items()}
    )
    with ledger.held(keys) as issued:  # a number that is taken is said before the work, not after it
        issued.sequence(wanted.name, meant, wanted=wanted.sequence, above=wanted.above)
    with tempfile.TemporaryDirectory(prefix=".update-", dir=out.parent if out else folder) as scratch:
        parts = _chosen(contents, wanted.kind, old or {}, there, Path(scratch))
        with ledger.held(keys) as issued:
            number = issued.sequence(wanted.name, meant, wanted=wanted.sequence, above=wanted.above)
            kind = _word(parts)
            path = out or folder / f"{wanted.name}-{number}.edgeft"
            members = _members(parts, _description(wanted, number, kind, parts), number, keys, signer)
            _write(path, members, keys)
            issued.note(wanted.name, number, {
                "contents": meant, "label": wanted.label,
                "files": {name: parts.files[name]["sha256"] for name in (MODEL, ADAPTER) if name in parts.files},
            })  # fmt: skip
        sizes = {
            name: _size(parts.payload[part["target"]]) if "target" in part else 0
            for name, part in parts.files.items()
        }
        return Made(
            path=path, name=wanted.name, bytes=path.stat().st_size, sequence=number, kind=kind, base=parts.base,
            how={name: part["how"] for name, part in parts.files.items()}, sizes=sizes,
        )  # fmt: skip


def _chosen(
    contents: Mapping[str, Content],
    kind: Kind,
    old: Mapping[str, Path],
    there: Mapping[str, str],
    scratch: Path,
) -> _Parts:
    """Each file by the smallest way that the kind allows."""
    parts = _Parts()
    for i, (name, content) in enumerate(sorted(contents.items())):
        size, sha256 = _sha256(content)
        entry: dict[str, Any] = {"bytes": size, "sha256": sha256}
        if name.endswith(".sh"):
            entry["executable"] = True
        large = name in (MODEL, ADAPTER) and kind != "full"
        if large and there.get(name) == sha256:
            entry["how"], parts.base[name] = "base", sha256
        elif large and name == MODEL and (made := _delta(content, kind, old, scratch)):
            entry |= {"how": "delta", "target": f"delta/{name}"}
            parts.base[name], parts.payload[entry["target"]] = there[name], made
        else:
            target = f"files/{name}" if _PLAIN.fullmatch(name) else f"numbered/{i}"
            entry |= {"how": "whole", "target": target}
            parts.payload[target] = content
        parts.files[name] = entry
    _refuse(kind, parts, there)
    return parts


def _delta(content: Content, kind: Kind, old: Mapping[str, Path], scratch: Path) -> Path | None:
    """The difference to the old model, if there is one at hand and it is worth its while."""
    if MODEL not in old or not isinstance(content, Path) or kind == "adapter":
        return None
    made = scratch / "delta"
    size = delta.make(old[MODEL], content, made)
    return made if kind == "delta" or size.share < WORTH else None


def _refuse(kind: Kind, parts: _Parts, there: Mapping[str, str]) -> None:
    how = parts.files[MODEL]["how"]
    if kind == "adapter" and (ADAPTER not in parts.files or how != "base"):
        why = "it has no adapter: its training is part of the model" if ADAPTER not in parts.files else (
            "the base under it is another one than on the device" if MODEL in there else "it is not known what is on the device"
        )  # fmt: skip
        raise DataError(
            f"this build cannot be sent as an adapter: {why}", hint="--kind auto takes what applies"
        )
    if kind == "delta" and how == "whole":
        raise DataError(
            "a delta takes the model that is on the device, and it is not at hand",
            hint="--from OLD: its update file, bundle, .deb, folder or model.gguf",
        )


def _word(parts: _Parts) -> str:
    how = parts.files[MODEL]["how"]
    if how == "base":
        return "adapter" if ADAPTER in parts.files else "delta"
    return "delta" if how == "delta" else "full"


def _description(wanted: Wanted, number: int, kind: str, parts: _Parts) -> bytes:
    said = {
        "format": description.FORMAT, "name": wanted.name, "sequence": number, "label": wanted.label, "kind": kind,
        "base": parts.base, "files": parts.files, "canaries": list(wanted.canaries),
    }  # fmt: skip
    return (json.dumps(said, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode()


def _members(parts: _Parts, said: bytes, number: int, keys: Path, signer: Any) -> dict[str, Content]:
    """The tar's members in their order."""
    payload: dict[str, Content] = {description.FILE: said, **dict(sorted(parts.payload.items()))}
    signed = metadata.targets(number, {name: _sha256(content) for name, content in payload.items()}, signer)
    roots = {f"metadata/{i}.root.json": content for i, (content, _) in enumerate(custody.roots(keys), 1)}
    return {
        **roots, "metadata/targets.json": signed,
        **{archive.PAYLOAD + name: content for name, content in payload.items()},
    }  # fmt: skip


def _write(path: Path, members: Mapping[str, Content], keys: Path) -> None:
    """Pack, read back as a device would, and give it its name."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    total, done = sum(map(_size, members.values())), 0
    try:
        with aside.open("wb") as raw:
            with tarfile.open(fileobj=raw, mode="w", format=tarfile.GNU_FORMAT) as tar:
                for name, content in members.items():
                    progress.report("pack the update", done, total, unit="bytes")
                    info = tarfile.TarInfo(name)
                    info.size, info.mode = _size(content), 0o644
                    if isinstance(content, bytes):
                        tar.addfile(info, io.BytesIO(content))
                    else:
                        with content.open("rb") as file:
                            tar.addfile(info, file)
                    done += info.size
            raw.flush()
            os.fsync(raw.fileno())
        _check(aside, keys)
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def _check(path: Path, keys: Path) -> None:
    """What no device would take never leaves. Raises StageError."""
    try:
        with archive.open_update(path) as opened:
            listed = metadata.verified_targets(opened.targets, custody.roots(keys)[-1][1]).targets
            if opened.payloads != set(listed):
                raise DataError("its list and its contents differ")
            for name, file in listed.items():
                opened.check(archive.PAYLOAD + name, length=file.length, sha256=file.hashes["sha256"])
            description.read(opened.text(archive.PAYLOAD + description.FILE))
    except (AgentError, DataError) as error:
        raise StageError(f"the update cannot be used: {error}") from error


def _size(content: Content) -> int:
    return len(content) if isinstance(content, bytes) else content.stat().st_size


def _sha256(content: Content) -> tuple[int, str]:
    """Bytes and sha256."""
    if isinstance(content, bytes):
        return len(content), hashlib.sha256(content).hexdigest()
    with content.open("rb") as file:
        return content.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()
