"""The version that is on the device, out of whatever of it was kept: an update, a bundle, a .deb, a folder or a file."""

from __future__ import annotations

import hashlib
import shutil
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from edgeft import bundle
from edgeft.agent import archive, delta, description
from edgeft.agent.errors import AgentError
from edgeft.errors import DataError
from edgeft.llamacpp.adapter import ADAPTER, MODEL
from edgeft.tool import Tool

WANTED = (MODEL, ADAPTER)
"""What a delta or an adapter can build on; everything else is small and goes along."""
_DPKG_DEB = Tool(
    name="dpkg-deb", hint="sudo apt install dpkg, or give the model.gguf that was in the package"
)


@dataclass(frozen=True, kw_only=True)
class Older:
    """What is known of the version on the device."""

    files: dict[str, Path] = field(default_factory=dict)
    """model.gguf and adapter.gguf, as far as they are there."""
    sequence: int = 0
    """Its number, where it is an update; 0 is what came with the device."""
    name: str = ""
    """Of the model, where it is an update."""


def read(sources: Sequence[Path], scratch: Path) -> Older:
    """The version that `sources` make, the oldest first: an update that is a delta needs what it builds on before it.

    What has to be unpacked goes into `scratch`. Raises DataError for anything that is none of them, or is damaged.
    """
    found = Older()
    for i, source in enumerate(sources):
        place = scratch / str(i)
        place.mkdir(parents=True)
        found = _one(source, found, place)
    return found


def _one(source: Path, before: Older, place: Path) -> Older:
    if source.is_dir():
        files = {name: source / name for name in WANTED if (source / name).is_file()}
    elif not source.is_file():
        raise DataError(f"{source} does not exist")
    else:
        with source.open("rb") as file:
            start = file.read(8)
        if start[:4] == b"GGUF":
            files = {MODEL: source}
        elif start == b"!<arch>\n":
            files = _deb(source, place)
        elif start[:4] == b"\x28\xb5\x2f\xfd":
            files = _bundle(source, place)
        else:
            return _update(source, before, place)
    if MODEL not in files:
        raise DataError(f"{source} holds no {MODEL}")
    return Older(files=files)


def _deb(source: Path, place: Path) -> dict[str, Path]:
    _DPKG_DEB("-x", source, place)
    folders = [path.parent for path in sorted(place.glob(f"usr/share/edgeft/*/{MODEL}"))]
    if len(folders) != 1:
        raise DataError(
            f"{source} holds {len(folders)} models", hint="give the package with the model, model.deb"
        )
    return {name: folders[0] / name for name in WANTED if (folders[0] / name).is_file()}


def _bundle(source: Path, place: Path) -> dict[str, Path]:
    import zstandard

    manifest = bundle.verify_bundle(source)
    with (
        source.open("rb") as raw,
        zstandard.ZstdDecompressor().stream_reader(raw) as unpacked,
        tarfile.open(fileobj=unpacked, mode="r|") as tar,
    ):
        for member in tar:
            if member.name in WANTED and (inside := tar.extractfile(member)):
                with (place / member.name).open("wb") as out:
                    shutil.copyfileobj(inside, out, 1 << 20)
    return {name: place / name for name in WANTED if name in manifest["files"]}


def _update(source: Path, before: Older, place: Path) -> Older:
    """The files that an update makes, which may be made of those of the version before it."""
    try:
        with archive.open_update(source) as opened:
            said = description.read(opened.text(archive.PAYLOAD + description.FILE))
            files = {
                name: _part(opened, name, said.files[name], before, place)
                for name in WANTED if name in said.files
            }  # fmt: skip
    except AgentError as error:
        raise DataError(f"{source} is no update, bundle, .deb or GGUF file: {error}") from None
    except delta.DeltaError as error:
        raise DataError(f"{source} cannot be followed: {error}") from None
    return Older(files=files, sequence=said.sequence, name=said.name)


def _part(opened: archive.Archive, name: str, part: description.Part, before: Older, place: Path) -> Path:
    out = place / name
    if part.how != "whole" and name not in before.files:
        raise DataError(
            f"{opened.path} changes {name} and does not hold it whole",
            hint="name what it builds on before it: --from OLDER --from THIS",
        )
    if part.how == "base":
        out = before.files[name]
    elif part.how == "delta":
        delta.apply(before.files[name], opened.open(archive.PAYLOAD + part.target), out)
    else:
        with out.open("wb") as file:
            shutil.copyfileobj(opened.open(archive.PAYLOAD + part.target), file, 1 << 20)
    with out.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != part.sha256:
            raise DataError(
                f"{name} of {opened.path} is damaged, or is built on another version than the one before it"
            )
    return out
