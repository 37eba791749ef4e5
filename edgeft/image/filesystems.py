"""FAT and ext4 file systems with given contents, without mounts, loop devices or root; the same contents, the same bytes.

What changes from one run to the next is taken out: mtools takes times from the files, so they are staged with a fixed one;
mke2fs 1.47.0's own `-d` copies the building machine's times and owners, so an empty file system is filled by debugfs,
name by name in sorted order, and every time, owner and mode in it is then set.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from edgeft.errors import SetupError, ToolError
from edgeft.export.files import EPOCH, Files
from edgeft.image.partitions import identity
from edgeft.tool import run


@dataclass(frozen=True)
class _System:
    """A program that lives in /usr/sbin, which is on no user's PATH in Debian."""

    name: str
    package: str
    pin: str = ""

    def find(self) -> str:
        """Where it is. Raises SetupError with the Debian package that has it."""
        if found := shutil.which(self.name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"):
            return found
        raise SetupError(f"{self.name} is not installed", hint=f"sudo apt install {self.package}")


MKFS_VFAT = _System("mkfs.vfat", "dosfstools")
MCOPY = _System("mcopy", "mtools")
MKE2FS = _System("mke2fs", "e2fsprogs")
DEBUGFS = _System("debugfs", "e2fsprogs")
E2FSCK = _System("e2fsck", "e2fsprogs")
TOOLS = (MKFS_VFAT, MCOPY, MKE2FS, DEBUGFS, E2FSCK)

_FEATURES = ("none,has_journal,ext_attr,resize_inode,dir_index,filetype,extent,64bit,flex_bg,metadata_csum,sparse_super,"
             "large_file,huge_file,dir_nlink,extra_isize")  # fmt: skip
"""Named, because /etc/mke2fs.conf of the building machine would choose otherwise."""
_TIMES = ("atime", "ctime", "mtime", "crtime")


def fat(out: Path, files: Files, *, size: int, label: str) -> None:
    """A FAT32 file system of `size` bytes (at least 33 MiB, else it would be no FAT32) in the new file `out`.

    Raises ToolError when the files do not fit, SetupError when dosfstools or mtools is missing.
    """
    _empty(out, size)
    environment = {
        "SOURCE_DATE_EPOCH": str(EPOCH),
        "TZ": "UTC",
        "MTOOLS_SKIP_CHECK": "1",
        "LC_ALL": "C.UTF-8",
    }
    number = f"{identity(f'fat/{label}').int & 0xFFFFFFFF:08x}"
    run(
        [MKFS_VFAT.find(), "-F", "32", "-i", number, "-n", label, "--invariant", os.fspath(out)],
        env=environment,
    )
    with tempfile.TemporaryDirectory(dir=out.parent) as folder:
        stage = Path(folder)
        for name, entry in files.items():
            path = stage / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(entry.content, bytes):
                path.write_bytes(entry.content)
            else:
                shutil.copyfile(entry.content, path)
        for path in (*stage.rglob("*"), stage):
            os.utime(path, (EPOCH, EPOCH))
        for path in sorted(stage.iterdir()):
            # -s: folders too; -p, -m: attributes and times; -Q: end at the first error.
            run([MCOPY.find(), "-spmQ", "-i", os.fspath(out), os.fspath(path), "::/"], env=environment)


def ext4(
    out: Path, files: Files, *, size: int, label: str, folders: Mapping[str, int], links: Mapping[str, str]
) -> None:
    """An ext4 file system of `size` bytes in the new file `out`; everything in it belongs to root.

    `folders` adds folders with their modes (parents of files that are not named get 0755), `links` symbolic links with
    their targets. It is checked by e2fsck. Raises ToolError when something does not fit, SetupError when e2fsprogs is missing.
    """
    _empty(out, size)
    name = str(identity(f"ext4/{label}"))
    # The time of day of mke2fs and debugfs alike: superblock, journal, every new inode.
    environment = {"E2FSPROGS_FAKE_TIME": str(EPOCH), "SOURCE_DATE_EPOCH": str(EPOCH), "MKE2FS_CONFIG": os.devnull,
                   "LC_ALL": "C.UTF-8", "TZ": "UTC"}  # fmt: skip
    run(
        [MKE2FS.find(), "-q", "-F", "-t", "ext4", "-b", "4096", "-I", "256", "-m", "0", "-O", _FEATURES, "-L", label, "-U", name,
         "-E", f"hash_seed={name},lazy_itable_init=0,lazy_journal_init=0,nodiscard", os.fspath(out)],
        env=environment,
    )  # fmt: skip
    with tempfile.TemporaryDirectory(dir=out.parent) as folder:
        script = Path(folder) / "script"
        script.write_text(
            "".join(f"{line}\n" for line in _commands(files, folders, links, Path(folder))), encoding="utf-8"
        )
        said = run([DEBUGFS.find(), "-w", "-f", os.fspath(script), os.fspath(out)], env=environment)
    # debugfs ends with 0 whatever happened.
    wrong = [
        line for line in said.splitlines() if line and not line.startswith(("debugfs", "Allocated inode"))
    ]
    if wrong:
        raise ToolError(f"debugfs could not fill the file system {label}: {wrong[0]}")
    run([E2FSCK.find(), "-fn", os.fspath(out)], env=environment)


def room(files: Files, *, block: int = 4096) -> int:
    """Bytes that files occupy in whole blocks, without what the file system needs for itself."""
    lengths = (
        len(e.content) if isinstance(e.content, bytes) else e.content.stat().st_size for e in files.values()
    )
    return sum(-(-length // block) * block for length in lengths)


def _commands(
    files: Files, folders: Mapping[str, int], links: Mapping[str, str], scratch: Path
) -> Iterable[str]:
    modes = dict.fromkeys(
        (str(p) for name in (*files, *folders, *links) for p in PurePosixPath(name).parents if p.name), 0o755
    )
    modes |= folders
    for name in sorted(modes):
        yield f"mkdir {_quoted('/' + name)}"
    for i, (name, entry) in enumerate(sorted(files.items())):
        source = entry.content if isinstance(entry.content, Path) else scratch / str(i)
        if isinstance(entry.content, bytes):
            source.write_bytes(entry.content)
        at = PurePosixPath("/") / name
        yield f"cd {_quoted(str(at.parent))}"  # `write` takes a name in the current folder, no path
        yield f"write {_quoted(os.fspath(source.resolve()))} {_quoted(at.name)}"
    yield "cd /"
    for name, target in sorted(links.items()):
        yield f"symlink {_quoted('/' + name)} {_quoted(target)}"
    kinds = {
        "": 0o040755, "lost+found": 0o040700, **{name: 0o040000 | mode for name, mode in modes.items()},
        **{name: 0o100000 | entry.mode for name, entry in files.items()}, **dict.fromkeys(links, 0o120777),
    }  # fmt: skip
    for name, mode in sorted(kinds.items()):
        inode = f"sif {_quoted('/' + name)}"
        yield f"{inode} mode 0{mode:o}"
        yield from (f"{inode} {field} 0" for field in ("uid", "gid"))
        yield from (f"{inode} {field} @{EPOCH}" for field in _TIMES)
        yield from (f"{inode} {field}_extra 0" for field in _TIMES)


def _quoted(text: str) -> str:
    """For debugfs, which knows quotation marks around an argument and no escapes."""
    if '"' in text or "\n" in text:
        raise ToolError(f"debugfs cannot take the name {text!r}")
    return f'"{text}"'


def _empty(out: Path, size: int) -> None:
    out.unlink(missing_ok=True)
    with out.open("wb") as file:
        file.truncate(size)
