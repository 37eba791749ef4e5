"""What an ELF program says about the processor it was compiled for, read from its header and its notes.

Layouts: elf(5). x86-64 levels: GNU_PROPERTY_X86_ISA_1_NEEDED of the x86-64 psABI, "Program Property". AArch64 programs say
nothing below "AArch64": neither a property for it nor 64-bit build attributes exist, so ours carry a note of their own
(edgeft.llamacpp.note), and a program without one is not taken for any processor.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from edgeft.errors import DataError
from edgeft.llamacpp.note import OWNER, TYPE
from edgeft.runtimes.isa import Isa

_MACHINES = {"arm64": 183, "amd64": 62}
"""e_machine: EM_AARCH64, EM_X86_64."""
_OTHERS = {3: "32-bit x86", 40: "32-bit Arm", 243: "RISC-V", 21: "PowerPC", 22: "S/390"}
_INTERP, _NOTE = 3, 4
_PROPERTIES = b"GNU\0", 5
"""NT_GNU_PROPERTY_TYPE_0."""
_X86_ISA_NEEDED = 0xC0008002
_MOST = 1 << 16
"""No sane program has a longer interpreter path or note segment."""


@dataclass(frozen=True, kw_only=True)
class Elf:
    """A 64-bit little-endian program."""

    arch: str
    """arm64 or amd64; "" for any other."""
    machine: int
    """e_machine."""
    interpreter: str
    """The loader it asks for; "" for a static program, which needs nothing but the kernel."""
    x86_isa: str
    """The x86-64 level its linker says it needs; "" when it says nothing."""
    note: Mapping[str, str] | None
    """edgeft's own: runtime, arch, isa, pin; None when it has none."""


def read_elf(file: Path) -> Elf:
    """Raises DataError when the file is missing, no ELF program, cut off, 32-bit or big-endian."""
    try:
        with file.open("rb") as stream:
            data = stream.read(1 << 20)  # linkers put program headers, interpreter and notes in front
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror}") from None
    if data[:4] != b"\x7fELF":
        raise DataError(f"{file} is no program: it does not start as an ELF file does")
    if data[4:6] != b"\x02\x01":
        bits = {1: "32-bit", 2: "64-bit"}.get(data[4] if len(data) > 4 else 0, "of no known width")
        order = {1: "little-endian", 2: "big-endian"}.get(
            data[5] if len(data) > 5 else 0, "of no known order"
        )
        raise DataError(f"{file} is {bits} and {order}; the devices are 64-bit and little-endian")
    try:
        return _parse(data)
    except (struct.error, IndexError, ValueError) as error:
        raise DataError(f"{file} is a damaged ELF file: {error}") from None


def check_elf(file: Path, arch: str, isa: str) -> Elf:
    """What the file says, when that is that it runs on a processor of `arch` with `isa` (as in targets/*.toml).

    Raises DataError, with the reason, when it is for another processor, when it needs instructions that this one lacks, or
    when it does not say which ones it needs.
    """
    device, elf = Isa.parse(arch, isa), read_elf(file)
    if elf.arch != arch:
        found = elf.arch or _OTHERS.get(elf.machine, f"machine {elf.machine}")
        raise DataError(f"{file} is a program for {found}, and the device is {arch}")
    said = {}
    if elf.x86_isa:
        said["its x86 ISA note"] = elf.x86_isa
    if elf.note is not None:
        if elf.note.get("arch") != arch or "isa" not in elf.note:
            raise DataError(
                f"{file} says in its edgeft note that it is {dict(elf.note)}, in its header {arch}"
            )
        said["its edgeft note"] = elf.note["isa"]
    if not said:
        raise DataError(
            f"{file} does not say which instructions it needs, so it might stop on {isa} with an illegal one",
            hint="let edgeft compile it: its runtimes carry a note",
        )
    for where, needs in said.items():
        if not Isa.parse(arch, needs).runs_on(device):
            raise DataError(f"{file} needs {needs}, as {where} says, and the device has {isa}")
    return elf


def _parse(data: bytes) -> Elf:
    machine = struct.unpack_from("<H", data, 18)[0]
    offset = struct.unpack_from("<Q", data, 32)[0]
    size, count = struct.unpack_from("<HH", data, 54)
    if size != 56:
        raise ValueError(f"program headers of {size} bytes, 56 are usual")
    interpreter, x86_isa, note = "", "", None
    for i in range(count):
        kind, _, at, _, _, length, _, align = struct.unpack_from("<IIQQQQQQ", data, offset + i * size)
        if kind in (_INTERP, _NOTE) and (length > _MOST or at + length > len(data)):
            raise ValueError("a header points beyond the file")
        if kind == _INTERP:
            interpreter = data[at : at + length].rstrip(b"\0").decode()
        elif kind == _NOTE:
            for owner, number, text in _notes(data[at : at + length], 8 if align == 8 else 4):
                if (owner, number) == _PROPERTIES:
                    x86_isa = _x86_isa(text) or x86_isa if machine == _MACHINES["amd64"] else ""
                elif (owner, number) == (OWNER, TYPE):
                    note = _ours(text)
    arch = next((name for name, number in _MACHINES.items() if number == machine), "")
    return Elf(arch=arch, machine=machine, interpreter=interpreter, x86_isa=x86_isa, note=note)


def _notes(data: bytes, align: int) -> Iterator[tuple[bytes, int, bytes]]:
    """Owner, type and text of each; the text starts and ends on the segment's alignment."""
    at = 0
    while at + 12 <= len(data):
        names, texts, number = struct.unpack_from("<III", data, at)
        start = _up(at + 12 + names, align)
        if start + texts > len(data):
            raise ValueError("a note is longer than its segment")
        yield data[at + 12 : at + 12 + names], number, data[start : start + texts]
        at = _up(start + texts, align)


def _x86_isa(properties: bytes) -> str:
    """The highest level of the bit mask: 1 is x86-64, 2 is v2, 4 is v3, 8 is v4."""
    at = 0
    while at + 8 <= len(properties):
        kind, length = struct.unpack_from("<II", properties, at)
        if kind == _X86_ISA_NEEDED and (mask := struct.unpack_from("<I", properties, at + 8)[0]):
            return "x86-64" if mask == 1 else f"x86-64-v{mask.bit_length()}"
        at = _up(at + 8 + length, 8)
    return ""


def _ours(text: bytes) -> dict[str, str]:
    said = json.loads(text)
    if not isinstance(said, dict) or not all(isinstance(value, str) for value in said.values()):
        raise ValueError("its edgeft note is no table of texts")
    return said


def _up(at: int, align: int) -> int:
    return -(-at // align) * align
