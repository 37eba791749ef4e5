"""The ELF note by which a runtime says who it is: for which processor it was compiled, and from which pin.

x86-64 programs can carry the level they need (GNU_PROPERTY_X86_ISA_1_NEEDED); AArch64 has nothing of the kind, and 64-bit
Arm programs no build attributes: one that needs dotprod looks like one that does not. So every runtime gets a note of ours,
linked in: the section .note.edgeft, inside the loaded segment PT_NOTE, which strip leaves alone.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping

OWNER = b"edgeft\0"
TYPE = 1
"""Of the notes of this owner: UTF-8 JSON, an object of strings: runtime, arch, isa, pin."""


def note(said: Mapping[str, str]) -> bytes:
    """The note's bytes: three little-endian words, owner and text, each padded to four bytes (elf(5), "Notes (Nhdr)")."""
    text = json.dumps(dict(sorted(said.items())), ensure_ascii=True, separators=(",", ":")).encode()
    return struct.pack("<III", len(OWNER), len(text), TYPE) + _padded(OWNER) + _padded(text)


def assembler(said: Mapping[str, str]) -> str:
    """A source file for GNU as with nothing but the note; the second section keeps the stack from becoming executable."""
    values = ",".join(str(byte) for byte in note(said))
    return (
        f'.section .note.edgeft,"a",%note\n.balign 4\n.byte {values}\n.section .note.GNU-stack,"",%progbits\n'
    )


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)
