"""What a dynamic ELF program asks the system for: its libraries, and the glibc whose functions it calls.

Layouts: elf(5), "Dynamic tags"; the version tables are those of the Linux Standard Base, "Symbol Versioning".
"""

from __future__ import annotations

import mmap
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from edgeft.errors import DataError

_LOAD, _DYNAMIC = 1, 2
_END, _NEEDED, _STRINGS, _VERSIONS, _VERSION_COUNT = 0, 1, 5, 0x6FFFFFFE, 0x6FFFFFFF
_SEARCHED = (15, 29)
"""DT_RPATH, DT_RUNPATH."""


@dataclass(frozen=True, kw_only=True)
class Needs:
    """Of one program, or of several together. Empty for static ones."""

    libraries: tuple[str, ...] = ()
    """Their names, sorted: libc.so.6, libvulkan.so.1."""
    glibc: str = ""
    """The oldest that has all the functions, as 2.34; "" without a libc."""
    searched: tuple[str, ...] = ()
    """The folders that it looks for them in before the system's: on another machine somebody else's."""

    def __or__(self, other: Needs) -> Needs:
        return Needs(
            libraries=tuple(sorted({*self.libraries, *other.libraries})),
            glibc=max(self.glibc, other.glibc, key=_number),
            searched=tuple(sorted({*self.searched, *other.searched})),
        )


def read_needs(file: Path) -> Needs:
    """Raises DataError when the file cannot be read or its tables point outside of it."""
    try:
        with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _parse(data)
    except (OSError, struct.error, IndexError, ValueError) as error:
        raise DataError(f"{file} is a damaged ELF file, or none: {error}") from None


def _parse(data: mmap.mmap) -> Needs:
    offset = struct.unpack_from("<Q", data, 32)[0]
    count = struct.unpack_from("<H", data, 56)[0]
    headers = [struct.unpack_from("<IIQQQQQQ", data, offset + i * 56) for i in range(count)]
    dynamic = next((h for h in headers if h[0] == _DYNAMIC), None)
    if dynamic is None:
        return Needs()

    def where(address: int) -> int:
        for kind, _, at, start, _, length, _, _ in headers:
            if kind == _LOAD and start <= address < start + length:
                return int(at + address - start)
        raise ValueError("a table lies outside of the file")

    tags: dict[int, int] = {}
    names, searched = [], []
    for tag, value in _pairs(data, dynamic[2], dynamic[5]):
        if tag == _NEEDED:
            names.append(value)
        elif tag in _SEARCHED:
            searched.append(value)
        else:
            tags[tag] = value
    if _STRINGS not in tags:
        return Needs()
    strings = where(tags[_STRINGS])

    def text(at: int) -> str:
        end = data.find(b"\0", strings + at)
        if end < 0:
            raise ValueError("a name has no end")
        return data[strings + at : end].decode()

    versions = []
    if _VERSIONS in tags:
        versions = [text(at) for at in _wanted(data, where(tags[_VERSIONS]), tags.get(_VERSION_COUNT, 0))]
    glibc = [found[1] for name in versions if (found := re.fullmatch(r"GLIBC_(\d+\.\d+(?:\.\d+)?)", name))]
    return Needs(
        libraries=tuple(sorted({text(at) for at in names})), glibc=max(glibc, key=_number, default=""),
        searched=tuple(sorted({folder for at in searched for folder in text(at).split(":") if folder})),
    )  # fmt: skip


def _pairs(data: mmap.mmap, at: int, length: int) -> Iterator[tuple[int, int]]:
    """The dynamic section: tag and value, up to its end."""
    for i in range(length // 16):
        tag, value = struct.unpack_from("<QQ", data, at + 16 * i)
        if tag == _END:
            return
        yield tag, value


def _wanted(data: mmap.mmap, at: int, count: int) -> Iterator[int]:
    """Where the names of the versions stand that are asked of each library (Elfxx_Verneed, Elfxx_Vernaux)."""
    for _ in range(count):
        _, entries, _, first, following = struct.unpack_from("<HHIII", data, at)
        entry = at + first
        for _ in range(entries):
            _, _, _, name, skip = struct.unpack_from("<IHHII", data, entry)
            yield name
            entry += skip
        at += following


def _number(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part)
