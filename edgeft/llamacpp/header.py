"""Reads a GGUF file's header (keys and tensor list, no data) and replaces keys in it.

The layout is docs/gguf.md of ggml, version 3, little-endian. Pure Python and quick: a vocabulary of 49,152 tokens
with its merges takes a tenth of a second, and nothing is imported for it.
"""

from __future__ import annotations

import mmap
import os
import shutil
import struct
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeft.errors import DataError

GGML_TYPES: Mapping[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 9: ("Q8_1", 32, 36), 10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210), 15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98), 19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110), 22: ("IQ2_S", 256, 82), 23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1), 25: ("I16", 1, 2), 26: ("I32", 1, 4), 27: ("I64", 1, 8), 28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56), 30: ("BF16", 1, 2), 34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17), 40: ("NVFP4", 64, 36), 41: ("Q1_0", 128, 18), 42: ("Q2_0", 64, 18),
}  # fmt: skip
"""ggml_type id: name, weights a block, bytes a block (ggml.c, type_traits)."""

Scalar = str | bool | int | float
Value = Scalar | list[Scalar]

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_SHORT = 1024
"""Longer arrays (vocabularies) are walked over, not kept, unless asked for."""


@dataclass(frozen=True, kw_only=True)
class Tensor:
    """One row of the tensor list."""

    name: str
    shape: tuple[int, ...]
    """ggml's order: the row length first."""
    type: str
    weights: int
    bytes: int
    offset: int
    """Bytes from the header's data_offset."""


@dataclass(frozen=True, kw_only=True)
class Header:
    """What stands before a GGUF file's data."""

    keys: Mapping[str, Value | None]
    """Every key; None for an array too long to keep."""
    lengths: Mapping[str, int]
    """How long each array is, kept or not."""
    tensors: tuple[Tensor, ...]
    data_offset: int
    """Where the tensor data starts, in bytes from the start of the file."""
    spans: Mapping[str, tuple[int, int]]
    """Where each key's bytes lie."""


def read(path: Path, *, arrays: Collection[str] = ()) -> Header:
    """The header of a GGUF file; `arrays` names the long arrays to keep, such as the token list.

    Raises DataError when it is not a GGUF file, or is cut off.
    """
    with path.open("rb") as stream:
        if (magic := stream.read(4)) != b"GGUF":
            raise DataError(f"{path} is not a GGUF file: it starts with {magic!r}")
    try:
        with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Cursor(data).header(arrays)
    except (struct.error, ValueError, KeyError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is not a complete GGUF file: {error}") from error


def set_keys(path: Path, keys: Mapping[str, Value]) -> None:
    """Add keys to a GGUF file, or replace their values; the data stays byte for byte what it was.

    The new file replaces the old one by rename. An int becomes uint32, a float float32.
    """
    header = read(path)
    kept = [span for name, span in header.spans.items() if name not in keys]
    alignment = header.keys.get("general.alignment", 32)
    assert isinstance(alignment, int)
    end_of_keys = max((end for _, end in header.spans.values()), default=24)
    aside = path.with_name(path.name + ".part")
    with path.open("rb") as old, aside.open("wb") as new:
        magic, version, tensors, _ = struct.unpack("<4sIQQ", old.read(24))
        new.write(struct.pack("<4sIQQ", magic, version, tensors, len(kept) + len(keys)))
        for start, end in kept:
            old.seek(start)
            new.write(old.read(end - start))
        for name, value in keys.items():
            new.write(_string(name) + _encode(value))
        old.seek(end_of_keys)
        new.write(old.read(_infos_end(path, end_of_keys, tensors) - end_of_keys))
        new.write(bytes(-new.tell() % alignment))
        old.seek(header.data_offset)
        shutil.copyfileobj(old, new, 2**20)
        new.flush()
        os.fsync(new.fileno())
    aside.replace(path)


def write(
    path: Path,
    keys: Mapping[str, Value],
    tensors: Mapping[str, tuple[tuple[int, ...], bytes]],
    copied: Sequence[bytes] = (),
) -> None:
    """Write a GGUF file of F32 tensors: name to shape (ggml's order) and little-endian data. Appears by rename.

    `copied` are further keys as another file's bytes hold them, such as a vocabulary.
    """
    alignment = 32
    aside = path.with_name(path.name + ".part")
    with aside.open("wb") as new:
        new.write(struct.pack("<4sIQQ", b"GGUF", 3, len(tensors), len(keys) + len(copied)))
        for name, value in keys.items():
            new.write(_string(name) + _encode(value))
        new.writelines(copied)
        offset = 0
        for name, (shape, data) in tensors.items():
            new.write(_string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, 0, offset))
            offset += len(data) + -len(data) % alignment
        new.write(bytes(-new.tell() % alignment))
        for _, data in tensors.values():
            new.write(data + bytes(-len(data) % alignment))
        new.flush()
        os.fsync(new.fileno())
    aside.replace(path)


def _infos_end(path: Path, start: int, tensors: int) -> int:
    with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
        cursor = _Cursor(data, start)
        for _ in range(tensors):
            cursor.tensor()
        return cursor.at


def _string(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def _encode(value: Value) -> bytes:
    if isinstance(value, list):
        items = [_encode(item) for item in value]
        kind = items[0][:4] if items else struct.pack("<I", _STRING)
        return (
            struct.pack("<I", _ARRAY) + kind + struct.pack("<Q", len(items)) + b"".join(i[4:] for i in items)
        )
    if isinstance(value, str):
        return struct.pack("<I", _STRING) + _string(value)
    if isinstance(value, bool):
        return struct.pack("<I?", 7, value)
    return struct.pack("<II", 4, value) if isinstance(value, int) else struct.pack("<If", 6, value)


class _Cursor:
    """A place in the header's bytes."""

    def __init__(self, data: mmap.mmap, at: int = 0) -> None:
        self.data, self.at = data, at

    def header(self, arrays: Collection[str] = ()) -> Header:
        _, version, n_tensors, n_keys = self.take("4sIQQ")
        if version not in (2, 3):
            raise ValueError(f"GGUF version {version}")
        keys: dict[str, Value | None] = {}
        spans: dict[str, tuple[int, int]] = {}
        lengths: dict[str, int] = {}
        for _ in range(n_keys):
            start, name = self.at, self.string()
            kind = self.take("I")[0]
            if kind == _ARRAY:
                lengths[name] = self.peek_length()
            keys[name] = self.value(kind, keep=name in arrays)
            spans[name] = (start, self.at)
        tensors = tuple(self.tensor() for _ in range(n_tensors))
        alignment = keys.get("general.alignment", 32)
        assert isinstance(alignment, int)
        offset = self.at + -self.at % alignment
        if tensors and offset + sum(t.bytes for t in tensors) > len(self.data):
            raise ValueError(f"{len(self.data)} bytes are fewer than its tensors need")
        return Header(keys=keys, lengths=lengths, tensors=tensors, data_offset=offset, spans=spans)

    def tensor(self) -> Tensor:
        name = self.string()
        shape = self.take(f"{self.take('I')[0]}Q")
        kind, offset = self.take("IQ")
        if kind not in GGML_TYPES:
            raise ValueError(f"tensor {name} has the unknown type {kind}")
        label, block, size = GGML_TYPES[kind]
        weights = 1
        for length in shape:
            weights *= length
        size *= weights // block
        return Tensor(name=name, shape=shape, type=label, weights=weights, bytes=size, offset=offset)

    def peek_length(self) -> int:
        """The length of the array that begins here, behind its element type."""
        return int.from_bytes(self.data[self.at + 4 : self.at + 12], "little")

    def value(self, kind: int, *, keep: bool = False) -> Value | None:
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            scalar: Scalar = self.take(_SCALARS[kind])[0]
            return scalar
        inner, count = self.take("IQ")
        if inner in _SCALARS and count > _SHORT and not keep:
            self.at += count * struct.calcsize(_SCALARS[inner])
            return None
        if inner == _STRING and count > _SHORT and not keep:
            for _ in range(count):
                self.at += 8 + int.from_bytes(self.data[self.at : self.at + 8], "little")
            return None
        items = [self.value(inner) for _ in range(count)]
        return [item for item in items if isinstance(item, str | bool | int | float)]

    def string(self) -> str:
        (length,) = self.take("Q")
        if self.at + length > len(self.data):
            raise ValueError("it ends inside its header")
        text = self.data[self.at : self.at + length].decode()
        self.at += length
        return text

    def take(self, layout: str) -> tuple[Any, ...]:
        fields: tuple[Any, ...] = struct.unpack_from("<" + layout, self.data, self.at)
        self.at += struct.calcsize("<" + layout)
        return fields
