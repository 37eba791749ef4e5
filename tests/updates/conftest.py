"""Keys in a folder, and small GGUF files of any type whose bytes a test chooses."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from pathlib import Path

import pytest

from edgeft.llamacpp.header import GGML_TYPES
from edgeft.updates import custody

TYPES = {name: (number, weights, size) for number, (name, weights, size) in GGML_TYPES.items()}


def no_passphrase(path: Path) -> bytes:
    raise AssertionError(f"{path} is not encrypted")


@pytest.fixture
def keys(tmp_path) -> Path:
    """A folder with one root key and one targets key."""
    return custody.new(tmp_path / "keys").folder


def write_gguf(path: Path, keys: Mapping[str, str], tensors: Mapping[str, tuple[str, int, bytes]]) -> Path:
    """A GGUF file of version 3: text keys, and for each tensor its type, its row length, and its bytes."""

    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value.encode())) + value.encode()

    head = [struct.pack("<4sIQQ", b"GGUF", 3, len(tensors), len(keys))]
    head += [text(key) + struct.pack("<I", 8) + text(value) for key, value in keys.items()]
    offset = 0
    for name, (kind, row, data) in tensors.items():
        number, weights, size = TYPES[kind]
        rows = len(data) // size * weights // row
        head.append(text(name) + struct.pack("<IQQIQ", 2, row, rows, number, offset))
        offset += len(data) + -len(data) % 32
    whole = b"".join(head)
    whole += bytes(-len(whole) % 32)
    path.write_bytes(whole + b"".join(data + bytes(-len(data) % 32) for _, _, data in tensors.values()))
    return path
