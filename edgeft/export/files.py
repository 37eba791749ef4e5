"""The files of a package or an image layer, by their place on the device, and how they become a folder or a tar."""

from __future__ import annotations

import io
import os
import shutil
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

EPOCH = 1577836800
"""The time of every file, 2020-01-01: the same contents shall give the same bytes. (lintian takes 1970 for a mistake.)"""


@dataclass(frozen=True, kw_only=True)
class Entry:
    content: Path | bytes
    mode: int = 0o644


Files = Mapping[str, Entry]
"""Name -> file. Names are relative to the device's root and have no "..": `usr/lib/edgeft/llama-server`."""


def plain(contents: Mapping[str, Path | bytes], under: str) -> dict[str, Entry]:
    """Contents of a bundle as files below a folder; a shell script is executable."""
    return {
        f"{under}/{name}": Entry(content=content, mode=0o755 if name.endswith(".sh") else 0o644)
        for name, content in contents.items()
    }


def write_folder(folder: Path, files: Files) -> None:
    """Lay the files out below `folder`. A large file that has the wanted mode becomes a second name of itself, so that
    a model is not copied; times are left to whoever packs the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o755)
    for name, entry in sorted(files.items()):
        path = folder / name
        for parent in reversed(path.relative_to(folder).parents[:-1]):
            (folder / parent).mkdir(exist_ok=True)
            (folder / parent).chmod(0o755)
        if isinstance(entry.content, bytes):
            path.write_bytes(entry.content)
            path.chmod(entry.mode)
        else:
            _place(entry.content, path, entry.mode)


def write_tar(out: IO[bytes], files: Files, folders: Mapping[str, int] | None = None) -> None:
    """A tar with parent folders, sorted, owned by root. `folders` adds empty ones with their modes."""
    modes = dict.fromkeys((str(p) for name in files for p in PurePosixPath(name).parents if p.name), 0o755)
    modes |= folders or {}
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name in sorted({*modes, *files}):
            info = tarfile.TarInfo(name)
            info.mtime = EPOCH
            if name in modes:
                info.type, info.mode = tarfile.DIRTYPE, modes[name]
                tar.addfile(info)
                continue
            entry = files[name]
            info.mode = entry.mode
            if isinstance(entry.content, bytes):
                info.size = len(entry.content)
                tar.addfile(info, io.BytesIO(entry.content))
            else:
                info.size = entry.content.stat().st_size
                with entry.content.open("rb") as file:
                    tar.addfile(info, file)


def size(files: Files) -> int:
    """Bytes of all files together."""
    return sum(
        len(e.content) if isinstance(e.content, bytes) else e.content.stat().st_size for e in files.values()
    )


def _place(source: Path, path: Path, mode: int) -> None:
    if source.stat().st_mode & 0o7777 == mode:
        try:
            os.link(source, path)
            return
        except OSError:
            pass
    shutil.copyfile(source, path)
    path.chmod(mode)
