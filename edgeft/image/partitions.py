"""Partition tables, byte by byte: GPT, and the old MBR.

Sources: UEFI specification 2.10, chapter 5 (both, with their fields). What is random elsewhere is derived from names, so
that equal disks are equal bytes.
"""

from __future__ import annotations

import struct
import uuid
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

SECTOR = 512
MIB = 1 << 20
_ENTRIES, _ENTRY = 128, 128
_TAIL = 33
"""Sectors of the second copy: 32 of entries and the header."""
_LARGE = b"\xfe\xff\xff"
"""A cylinder-head-sector address beyond what those fields can hold: only the sector numbers count."""


@dataclass(frozen=True, kw_only=True)
class Type:
    """What a partition holds, in both tables' words."""

    gpt: str
    mbr: int


ESP = Type(gpt="c12a7328-f81f-11d2-ba4b-00a0c93ec93b", mbr=0x0C)
"""FAT with what the firmware reads. In an MBR plain FAT32: a Pi 3's boot ROM knows no other."""
LINUX = Type(gpt="0fc63daf-8483-4772-8e79-3d69d8477de4", mbr=0x83)


@dataclass(frozen=True, kw_only=True)
class Partition:
    name: str
    size: int
    """Bytes, a multiple of a MiB."""
    type: Type = LINUX


@dataclass(frozen=True, kw_only=True)
class Table:
    """Where everything lies, and the bytes that say so."""

    starts: tuple[int, ...]
    """Offset of each partition, bytes."""
    size: int
    """Of the whole disk, bytes."""
    pieces: tuple[tuple[int, bytes], ...]
    """(offset, bytes) of the table itself."""


def identity(name: str) -> uuid.UUID:
    """The UUID that a name always gets."""
    return uuid.uuid5(uuid.NAMESPACE_URL, f"https://edgeft/{name}")


def gpt(partitions: Sequence[Partition]) -> Table:
    """A GPT with its copy at the end and the protective MBR before it; partitions lie on whole MiB, one after the other."""
    starts, end = _placed(partitions)
    size = end + MIB
    sectors = size // SECTOR
    entries = b"".join(
        struct.pack(
            "<16s16sQQQ72s", uuid.UUID(p.type.gpt).bytes_le, identity(f"partition/{p.name}").bytes_le, start // SECTOR,
            (start + p.size) // SECTOR - 1, 0, p.name.encode("utf-16-le"),
        )
        for p, start in zip(partitions, starts, strict=True)
    ).ljust(_ENTRIES * _ENTRY, b"\0")  # fmt: skip
    first = _header(entries, at=1, other=sectors - 1, entries_at=2, sectors=sectors)
    second = _header(entries, at=sectors - 1, other=1, entries_at=sectors - _TAIL, sectors=sectors)
    protective = _mbr([_mbr_entry(0xEE, 1, min(sectors - 1, 0xFFFFFFFF))], 0)
    tail = (sectors - _TAIL) * SECTOR
    return Table(
        starts=starts, size=size,
        pieces=((0, protective + first + entries), (tail, entries + second)),
    )  # fmt: skip


def mbr(partitions: Sequence[Partition], name: str) -> Table:
    """An MBR of at most four partitions; they lie as a GPT's do. `name` decides the disk's signature."""
    if len(partitions) > 4:
        raise ValueError(f"an MBR has room for 4 partitions, not {len(partitions)}")
    starts, end = _placed(partitions)
    entries = [
        _mbr_entry(p.type.mbr, start // SECTOR, p.size // SECTOR)
        for p, start in zip(partitions, starts, strict=True)
    ]
    return Table(starts=starts, size=end, pieces=((0, _mbr(entries, signature(name))),))


def signature(name: str) -> int:
    """The 32 bits by which Linux names the partitions of an MBR: PARTUUID is signature-number."""
    return identity(f"disk/{name}").int & 0xFFFFFFFF


def _header(entries: bytes, *, at: int, other: int, entries_at: int, sectors: int) -> bytes:
    """One sector with the header; its checksum is computed over itself with the checksum zero."""

    def packed(checksum: int) -> bytes:
        return struct.pack(
            "<8sIIIIQQQQ16sQIII", b"EFI PART", 0x00010000, 92, checksum, 0, at, other, 2 + _TAIL - 1,
            sectors - _TAIL - 1, identity("disk").bytes_le, entries_at, _ENTRIES, _ENTRY, zlib.crc32(entries),
        )  # fmt: skip

    return packed(zlib.crc32(packed(0))).ljust(SECTOR, b"\0")


def _mbr_entry(kind: int, start: int, sectors: int) -> bytes:
    return struct.pack("<B3sB3sII", 0, _LARGE, kind, _LARGE, start, sectors)


def _mbr(entries: Sequence[bytes], signature: int) -> bytes:
    return struct.pack("<440sIH64sH", b"", signature, 0, b"".join(entries), 0xAA55)


def _placed(partitions: Sequence[Partition]) -> tuple[tuple[int, ...], int]:
    """Where each begins, from 1 MiB on, and where the last one ends."""
    starts, end = [], MIB
    for partition in partitions:
        if partition.size % MIB or not partition.size:
            raise ValueError(f"{partition.name}: {partition.size} bytes are no whole number of MiB")
        starts.append(end)
        end += partition.size
    return tuple(starts), end
