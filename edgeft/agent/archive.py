"""Reading an update file: a plain tar whose every part is known by place and size before any of it is used.

Nobody has signed the tar itself, so nothing of it is trusted but what the signed metadata says: no member is ever written
under the name it has in there, only regular members with names of the known form are taken, and memory is bounded. That
is why headers are read one by one here, and not by `tarfile`, which takes as much memory as a long name asks for.
"""

from __future__ import annotations

import io
import os
import re
import stat
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from edgeft.agent import disk
from edgeft.agent.errors import Damaged

TEXT = 1 << 20
"""What metadata and update.json may occupy, bytes each."""
MEMBERS = 512
ROOTS = 64
PAYLOAD = "payload/"
_NAME = re.compile(
    r"metadata/[1-9][0-9]{0,8}\.root\.json|metadata/targets\.json|payload/[A-Za-z0-9_][A-Za-z0-9_./+-]{0,90}"
)
_BLOCK = 512


@dataclass(frozen=True, kw_only=True)
class Member:
    offset: int
    size: int


@dataclass(frozen=True, kw_only=True)
class Archive:
    """An open update file."""

    path: Path
    file: BinaryIO
    members: dict[str, Member]

    @property
    def roots(self) -> list[tuple[int, bytes]]:
        """Version and content of every root metadata file, ascending."""
        names = [name for name in self.members if name.endswith(".root.json")]
        return sorted((int(name[len("metadata/") : -len(".root.json")]), self.text(name)) for name in names)

    @property
    def targets(self) -> bytes:
        return self.text("metadata/targets.json")

    @property
    def payloads(self) -> set[str]:
        return {name[len(PAYLOAD) :] for name in self.members if name.startswith(PAYLOAD)}

    def text(self, name: str) -> bytes:
        """A small member. Raises Damaged when it is missing or not small."""
        if name not in self.members:
            raise Damaged(f"{self.path.name} is no update file: it has no {name}")
        if self.members[name].size > TEXT:
            raise Damaged(f"{name} in {self.path.name} is larger than {TEXT} bytes")
        return self.open(name).read()

    def open(self, name: str) -> BinaryIO:
        """A member as a file of its own, to be read from its beginning to its end."""
        return io.BufferedReader(_Bytes(self, name), disk.CHUNK)

    def check(self, name: str, *, length: int, sha256: str) -> None:
        """Read a member to its end. Raises Damaged when it is not what was signed."""
        if self.members[name].size != length:
            raise Damaged(
                f"{name} in {self.path.name} has {self.members[name].size} bytes; {length} were signed"
            )
        if disk.digest_of(self.open(name)) != sha256:
            raise Damaged(f"{name} in {self.path.name} is damaged: its sha256 is not the one that was signed")


class _Bytes(io.RawIOBase):
    """A member's bytes, in order."""

    def __init__(self, archive: Archive, name: str) -> None:
        member = archive.members[name]
        self._file, self._at, self._end = archive.file, member.offset, member.offset + member.size
        self._name = archive.path.name

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        size = min(len(buffer), self._end - self._at)
        try:
            self._file.seek(self._at)
            found = self._file.read(size)
        except OSError as error:
            raise Damaged(f"{self._name} cannot be read: {error.strerror}") from None
        if len(found) != size:
            raise Damaged(f"{self._name} was cut off while it was read")
        buffer[:size] = found
        self._at += size
        return size


@contextmanager
def open_update(path: Path) -> Iterator[Archive]:
    """An update file with its table of members; no content is read yet. Raises Damaged with a sentence."""
    try:
        file = path.open("rb")
    except OSError as error:
        raise Damaged(f"{path} cannot be read: {error.strerror}") from None
    with file:
        info = os.fstat(file.fileno())
        if not stat.S_ISREG(info.st_mode):
            raise Damaged(f"{path} is not a file")
        try:
            members = _members(file, info.st_size, path.name)
        except OSError as error:
            raise Damaged(f"{path} cannot be read: {error.strerror}") from None
        yield Archive(path=path, file=file, members=members)


def _members(file: BinaryIO, size: int, name: str) -> dict[str, Member]:
    found: dict[str, Member] = {}
    at = 0
    while True:
        file.seek(at)
        block = file.read(_BLOCK)
        if len(block) < _BLOCK:
            raise Damaged(f"{name} is cut off, or no update file: it ends without the end of a tar")
        if not any(block):
            break
        try:
            info = tarfile.TarInfo.frombuf(block, "ascii", "strict")
        except (tarfile.HeaderError, ValueError) as error:
            raise Damaged(f"{name} is damaged, or no update file: {error} at byte {at}") from None
        at += _BLOCK
        if info.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or info.linkname:
            raise Damaged(f"{name} holds {info.name!r}, which is no plain file")
        if not _NAME.fullmatch(info.name) or any(part in ("", ".", "..") for part in info.name.split("/")):
            raise Damaged(f"{name} holds {info.name!r}, which has no place in an update file")
        if info.name in found or len(found) == MEMBERS:
            raise Damaged(f"{name} holds {info.name!r} twice, or more than {MEMBERS} members")
        if info.size < 0 or at + info.size > size:
            raise Damaged(f"{name} is cut off within {info.name}")
        found[info.name] = Member(offset=at, size=info.size)
        at += info.size
        file.seek(at)
        gap = -at % _BLOCK
        if any(file.read(gap)):
            raise Damaged(f"{name} is damaged after {info.name}")
        at += gap
    if sum(n.endswith(".root.json") for n in found) > ROOTS:
        raise Damaged(f"{name} holds more than {ROOTS} root files")
    _nothing_after(file, at, size, name)
    return found


def _nothing_after(file: BinaryIO, at: int, size: int, name: str) -> None:
    if size - at > 1 << 20 or any(file.read(size - at)):
        raise Damaged(f"{name} goes on after its end")
