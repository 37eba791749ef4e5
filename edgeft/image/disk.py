"""The disk: four partitions from their contents, one raw file, and that file compressed.

1  FAT    what the firmware reads; both systems' kernels
2  A      the system, a squashfs, never written to
3  B      the same system; where a new one is put
4  data   ext4, the device's /var: models, settings, logs; grows to the disk's end at the first start
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeft import progress
from edgeft.export.files import Files, size
from edgeft.image import filesystems, partitions, pi, uefi
from edgeft.image.kinds import Kind
from edgeft.image.partitions import MIB, Partition

BOOT_LABEL, DATA_LABEL = "EDGEFT", "edgeft-data"
SLOTS = ("a", "b")
LOG_ROOM = 96 * MIB
"""Room on the data partition beside the model, before it has grown."""
_NAME = "edgeft"
_CHUNK = MIB


@dataclass(frozen=True, kw_only=True)
class Contents:
    """What comes onto the disk."""

    kind: Kind
    root: Path
    """The squashfs."""
    kernel: Path
    initrd: Path
    firmware: Path
    """Folder with what the boot loader or firmware needs (`sources`)."""
    options: str
    """The kernel's command line, without the root."""
    data: Files
    """Files of the data partition, relative to the device's /var."""
    folders: Mapping[str, int]
    links: Mapping[str, str]
    data_bytes: int = 0
    """Least size of the data partition; 0: as its files need."""


def sources(kind: Kind) -> dict[str, str]:
    """What the boot loader needs from the Debian root: name below `Contents.firmware` -> path or glob there."""
    return uefi.sources(kind) if kind.firmware == "uefi" else pi.sources(kind)


def assemble(contents: Contents, out: Path) -> list[dict[str, Any]]:
    """Write the disk into the new, sparse file `out`, and return what lies where.

    The same contents give the same bytes. Needs no privileges, mounts or loop devices. Raises ToolError when something does
    not fit, SetupError when a tool is missing.
    """
    kind, folder = contents.kind, out.parent
    boot = _boot_files(contents)
    data_size = _mib(max(contents.data_bytes, round(1.03 * filesystems.room(contents.data)) + LOG_ROOM))
    slot = _mib(round(1.25 * contents.root.stat().st_size) + 8 * MIB)
    layout = [
        # A kernel of a later system beside those two that are there.
        Partition(name="edgeft-boot", size=_mib(max(64 * MIB, round(1.6 * size(boot)))), type=partitions.ESP),
        *(Partition(name=f"edgeft-{letter}", size=slot) for letter in SLOTS),
        Partition(name="edgeft-data", size=data_size),
    ]
    table = partitions.gpt(layout) if kind.gpt else partitions.mbr(layout, _NAME)
    fat, data = folder / "boot.fat", folder / "data.ext4"
    try:
        progress.report("boot partition")
        filesystems.fat(fat, boot, size=layout[0].size, label=BOOT_LABEL)
        progress.report("data partition")
        filesystems.ext4(
            data,
            contents.data,
            size=data_size,
            label=DATA_LABEL,
            folders=contents.folders,
            links=contents.links,
        )
        parts = [fat, *(contents.root for _ in SLOTS), data]
        with out.open("wb") as disk:
            disk.truncate(table.size)
            for at, piece in table.pieces:
                disk.seek(at)
                disk.write(piece)
            for start, part in zip(table.starts, parts, strict=True):
                _copy(part, disk.fileno(), start)
        return [
            {"name": p.name, "number": n, "start": start, "size": p.size, "used": part.stat().st_size,
             "sha256": _sha256(part)}
            for n, (p, start, part) in enumerate(zip(layout, table.starts, parts, strict=True), 1)
        ]  # fmt: skip
    finally:
        fat.unlink(missing_ok=True)
        data.unlink(missing_ok=True)


def pack(raw: Path, out: Path, *, level: int = 6) -> dict[str, Any]:
    """Compress `raw` into `out` (zstd, one thread, a window of 128 MiB, which every decoder takes), and return the sizes
    and sha256 of both. `out` appears under its name only when it is whole.

    The long window finds system B to be system A again, as far as A is not larger.
    """
    import zstandard

    parameters = zstandard.ZstdCompressionParameters.from_level(
        level, window_log=27, enable_ldm=True, write_checksum=True, threads=0
    )
    compressor = zstandard.ZstdCompressor(compression_params=parameters)
    aside = out.with_name(f".{out.name}.{os.getpid()}")
    plain, packed, done, total = hashlib.sha256(), hashlib.sha256(), 0, raw.stat().st_size
    try:
        with raw.open("rb") as source, aside.open("wb") as file:
            for piece in compressor.read_to_iter(_hashed(source, plain), size=total):
                packed.update(piece)
                file.write(piece)
                if source.tell() - done > 32 * MIB:
                    done = source.tell()
                    progress.report("compress the image", done, total, unit="bytes")
            file.flush()
            os.fsync(file.fileno())
            length = file.tell()
        aside.replace(out)
    finally:
        aside.unlink(missing_ok=True)
    return {
        "raw_bytes": total, "raw_sha256": plain.hexdigest(), "bytes": length, "sha256": packed.hexdigest(),
    }  # fmt: skip


def unpack(packed: Path, out: Path) -> None:
    """Decompress an image into the new file `out`, with holes where it is empty."""
    import zstandard

    with packed.open("rb") as source, out.open("wb") as disk:
        at = 0
        for piece in zstandard.ZstdDecompressor(max_window_size=1 << 27).read_to_iter(source, write_size=MIB):
            at += len(piece)
            if piece.count(0) == len(piece):
                disk.seek(at)
            else:
                disk.write(piece)
        disk.truncate(at)


def command_line(kind: Kind, slot: str, options: str) -> str:
    """The kernel's command line of system A or B."""
    number = 2 + SLOTS.index(slot)
    root = (
        f"PARTLABEL=edgeft-{slot}" if kind.gpt else f"PARTUUID={partitions.signature(_NAME):08x}-{number:02d}"
    )
    return " ".join(["root=" + root, options, *(f"console={name}" for name in kind.console)])


def _boot_files(contents: Contents) -> Files:
    lines = {slot: command_line(contents.kind, slot, contents.options) for slot in SLOTS}
    make = uefi.boot_files if contents.kind.firmware == "uefi" else pi.boot_files
    return make(contents.kernel, contents.initrd, contents.firmware, lines)


def _copy(source: Path, disk: int, start: int) -> None:
    """Copy a file to an offset; where it is empty the disk keeps its hole."""
    with source.open("rb") as file:
        while piece := file.read(_CHUNK):
            if piece.count(0) != len(piece):
                os.pwrite(disk, piece, start)
            start += len(piece)


def _hashed(source: Any, into: Any) -> Any:
    class Reader:
        """What the compressor reads from."""

        def read(self, count: int) -> bytes:
            piece: bytes = source.read(count)
            into.update(piece)
            return piece

    return Reader()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _mib(count: int) -> int:
    return -(-count // MIB) * MIB


__all__ = ["MIB", "Contents", "assemble", "command_line", "pack", "sources", "unpack"]
