"""A root file system as a folder: unpacked from Debian's tar without what an image does not need, and packed as a squashfs."""

from __future__ import annotations

import fnmatch
import os
import shutil
import tarfile
from pathlib import Path, PurePosixPath

from edgeft import tool
from edgeft.errors import StageError
from edgeft.export.files import EPOCH

MKSQUASHFS = tool.Tool(name="mksquashfs", hint="sudo apt install squashfs-tools")
_LEFT_OUT = (
    "dev/*", "var/*", "run/*", "etc/apt/*", "etc/dpkg/*", "etc/init.d/*", "etc/rc?.d/*", "etc/cron*", "etc/default/grub*",
    "etc/kernel/*", "etc/initramfs-tools/*", "etc/sv/*", "etc/runit/*", "etc/ufw/*", "etc/hostname", "etc/resolv.conf",
    "boot/System.map-*", "boot/config-*",
    "usr/share/initramfs-tools/*", "usr/share/i18n/*", "usr/share/perl*", "usr/share/bug/*", "usr/share/debconf/*",
    "usr/share/runit/*", "usr/share/polkit-1/*", "usr/share/doc-base/*", "usr/share/menu/*", "usr/share/applications/*",
    "usr/share/python3/debpython/*", "usr/share/readline/*", "usr/share/pixmaps/*", "usr/share/icons/*",
    "usr/lib/valgrind/*", "usr/lib/udev/hwdb.d/*", "usr/lib/klibc/*", "usr/lib/initramfs-tools/*", "usr/lib/dpkg/*", "usr/lib/apt/*",
    "usr/lib/python3*/test/*", "usr/lib/python3*/idlelib/*", "usr/lib/python3*/lib2to3/*", "usr/lib/python3*/ensurepip/*",
    "usr/lib/python3*/pydoc_data/*", "usr/lib/python3*/distutils/*",
    "usr/bin/perl*", "usr/bin/dpkg*", "usr/bin/apt*", "usr/bin/ssh-keyscan",
)  # fmt: skip
"""Patterns of names below the root; `*` also matches slashes. No package manager: an image is replaced as a whole."""
FOLDERS = (
    "boot",
    "dev",
    "etc/edgeft",
    "mnt",
    "opt",
    "proc",
    "root",
    "run",
    "srv",
    "sys",
    "tmp",
    "usr/local/bin",
    "var",
)


def unpack(archive: Path, root: Path) -> None:
    """Debian's tar (zstd) into the new folder `root`, without what _LEFT_OUT names. Owners are not kept: everything in an image
    is root's. Raises StageError for a member that would land outside."""
    import zstandard

    root.mkdir(parents=True)
    folders: list[tuple[Path, int]] = []
    with (
        archive.open("rb") as raw,
        zstandard.ZstdDecompressor().stream_reader(raw) as stream,
        tarfile.open(fileobj=stream, mode="r|") as tar,
    ):
        for member in tar:
            name = str(PurePosixPath(member.name.removeprefix("./")))
            if name in {".", ""} or _left_out(name):
                continue
            path = root / name
            if ".." in PurePosixPath(name).parts or not _inside(root, path.parent):
                raise StageError(f"the archive of packages holds {member.name!r}, which lies outside of it")
            path.parent.mkdir(parents=True, exist_ok=True)
            if member.isdir():
                path.mkdir(exist_ok=True)
                folders.append((path, member.mode))
            elif member.issym():
                path.symlink_to(member.linkname)
            elif member.islnk():
                os.link(root / member.linkname.removeprefix("./"), path)
            elif member.isreg() and (file := tar.extractfile(member)):
                with path.open("wb") as out:
                    shutil.copyfileobj(file, out, 1 << 20)
                path.chmod(member.mode)
    for path, mode in folders:
        path.chmod(mode)
    for name in FOLDERS:
        (root / name).mkdir(parents=True, exist_ok=True)
    (root / "tmp").chmod(0o1777)
    (root / "root").chmod(0o700)


def squash(root: Path, out: Path) -> int:
    """Pack the folder as a squashfs (zstd, blocks of 256 KiB): root owns everything, one time for all, the same bytes from the
    same files whatever the number of processors. Returns its size in bytes."""
    out.unlink(missing_ok=True)
    tool.run(
        [
            MKSQUASHFS.find(), str(root), str(out), "-noappend", "-no-progress", "-quiet", "-no-xattrs", "-all-root",
            "-comp", "zstd", "-Xcompression-level", "9", "-b", "256K",
        ],
        # Becomes the time of the file system and of all that was written since (mksquashfs(1)).
        env={"SOURCE_DATE_EPOCH": str(EPOCH)},
    )  # fmt: skip
    return out.stat().st_size


def _left_out(name: str) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in _LEFT_OUT)


def _inside(root: Path, folder: Path) -> bool:
    real = folder.resolve()
    return real == root.resolve() or root.resolve() in real.parents
