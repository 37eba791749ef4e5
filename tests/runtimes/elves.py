"""ELF programs made by hand: a header, program headers, and what they point to; nothing that could run."""

from __future__ import annotations

import json
import struct

from edgeft.llamacpp.note import note

ARM64, AMD64 = 183, 62


def elf(machine: int = ARM64, *, segments: tuple[tuple[int, bytes, int], ...] = (), bits=2, order=1) -> bytes:
    """Segments are (type, contents, alignment)."""
    header = bytes([0x7F, *b"ELF", bits, order, 1]) + bytes(9)
    at = 64 + 56 * len(segments)
    header += struct.pack("<HHIQQQIHHHHHH", 2, machine, 1, 0, 64, 0, 0, 64, 56, len(segments), 0, 0, 0)
    table, contents = b"", b""
    for kind, data, align in segments:
        where = at + len(contents)
        table += struct.pack("<IIQQQQQQ", kind, 4, where, where, where, len(data), len(data), align)
        contents += data + bytes(-len(data) % 8)
    return header + table + contents


def interpreter(path: str) -> tuple[int, bytes, int]:
    return 3, path.encode() + b"\0", 1


def ours(**said: str) -> tuple[int, bytes, int]:
    return 4, note(said), 4


def x86(mask: int, *, before: bytes = b"") -> tuple[int, bytes, int]:
    """A GNU property note with the levels of the mask as needed; `before` are other properties."""
    properties = before + struct.pack("<IIII", 0xC0008002, 4, mask, 0)
    return 4, struct.pack("<III", 4, len(properties), 5) + b"GNU\0" + properties, 8


def raw_note(text: object) -> tuple[int, bytes, int]:
    data = json.dumps(text).encode()
    return 4, struct.pack("<III", 7, len(data), 1) + b"edgeft\0\0" + data + bytes(-len(data) % 4), 4
