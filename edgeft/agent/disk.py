"""Writing so that it is on the disk, and in one piece: aside, fsync, rename, fsync of the folder."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from edgeft.agent.errors import DiskFault, NoRoom

CHUNK = 1 << 20
RESERVE = 16 << 20
"""Bytes of the disk that an update leaves free: for its state, and for the system's own logs."""
ASIDE = ".tmp"
"""How a folder's name ends that is not whole, or no longer; whatever has it may be deleted."""
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@contextmanager
def sentences() -> Iterator[None]:
    """What the system says of the disk, as one of the agent's own errors."""
    try:
        yield
    except OSError as error:
        where = f" at {error.filename}" if error.filename else ""
        if error.errno in _FULL:
            raise NoRoom(f"the disk filled up while writing{where} ({error.strerror})") from error
        raise DiskFault(f"the disk refused{where}: {error.strerror or error}") from error


def write_whole(path: Path, content: bytes) -> None:
    """Replace a small file: afterwards it is the old or the new one, whatever happens."""
    aside = path.with_name(path.name + ASIDE)
    with suppress(FileNotFoundError):
        aside.unlink()
    try:
        write_new(aside, [content])
        aside.replace(path)
    except OSError:
        aside.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_new(path: Path, chunks: Iterable[bytes], *, executable: bool = False) -> None:
    """Write a file that must not exist yet, and wait until its bytes are on the disk."""
    mode = 0o755 if executable else 0o644
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, mode)
    try:
        os.fchmod(handle, mode)  # whatever the umask
        for chunk in chunks:
            rest = memoryview(chunk)
            while rest:
                rest = rest[os.write(handle, rest) :]
        os.fsync(handle)
    finally:
        os.close(handle)


def make_folder(path: Path) -> None:
    """A folder and its parents, readable by all, each of them on the disk."""
    missing = [p for p in (path, *path.parents) if not p.exists()]
    for folder in reversed(missing):
        folder.mkdir(0o755)
        folder.chmod(0o755)
        sync_folder(folder.parent)


def sync_file(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_folder(path: Path) -> None:
    """Wait until the names in a folder are on the disk."""
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def publish(aside: Path, whole: Path) -> None:
    """Give a folder its name, once all of it is on the disk."""
    for folder, _, _ in os.walk(aside):
        sync_folder(Path(folder))
    aside.rename(whole)
    sync_folder(whole.parent)


def switch(link: Path, target: str) -> None:
    """Point a link elsewhere; "" takes it away. At every instant it points to the old or to the new place."""
    if not target:
        with suppress(FileNotFoundError):
            link.unlink()
    else:
        prepare(link, target).replace(link)
    sync_folder(link.parent)


def prepare(link: Path, target: str) -> Path:
    """The link that `switch` to this target will put in place: then a disk that is full does not keep it from that."""
    number = target.rpartition("/")[2]
    aside = link.with_name(f"{link.name}.{number}{ASIDE}")
    if not aside.is_symlink() or os.readlink(aside) != target:  # noqa: PTH115  its text, not a path
        with suppress(FileNotFoundError):
            aside.unlink()
        aside.symlink_to(target)
    return aside


def discard(folder: Path) -> None:
    """Delete a folder. One that is deleted by half has no name under which anybody would use it: the new name is on
    the disk before the first file goes."""
    if not folder.name.endswith(ASIDE):
        aside = folder.with_name(folder.name + ASIDE)
        if aside.exists():
            _remove(aside)
        folder.rename(aside)
        sync_folder(folder.parent)
        folder = aside
    _remove(folder)
    sync_folder(folder.parent)


def digest(path: Path, *, from_disk: bool = False) -> str:
    """The sha256 of a file; `from_disk`: read again from the medium, not from memory, where the system can."""
    with path.open("rb") as file:
        if from_disk:
            with suppress(OSError):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return digest_of(file)


def digest_of(file: BinaryIO) -> str:
    found = hashlib.sha256()
    for chunk in chunks(file):
        found.update(chunk)
    return found.hexdigest()


def chunks(file: BinaryIO) -> Iterator[bytes]:
    """The rest of a file, in pieces that fit into a small memory."""
    while chunk := file.read(CHUNK):
        yield chunk


def free(folder: Path) -> int:
    """Bytes that can be written below a folder."""
    found = os.statvfs(folder)
    return found.f_bavail * found.f_frsize


def held(folder: Path) -> int:
    """Bytes that would come free with a folder: files that no other version shares."""
    files = (Path(at) / name for at, _, names in os.walk(folder) for name in names)
    return sum(s.st_blocks * 512 for s in map(os.lstat, files) if s.st_nlink == 1)


def _remove(folder: Path) -> None:
    if folder.is_symlink() or not folder.is_dir():
        folder.unlink()
        return
    for at, folders, names in os.walk(folder, topdown=False):
        for name in names:
            (Path(at) / name).unlink()
        for name in folders:
            inner = Path(at) / name
            (inner.unlink if inner.is_symlink() else inner.rmdir)()
    folder.rmdir()
