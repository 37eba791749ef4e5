"""safetensors files read and written piece by piece, so that no more than one piece is ever in memory.

The format, after the safetensors project's README: eight bytes little-endian with the header's length, the header as
JSON (`{"name": {"dtype", "shape", "data_offsets": [from, to]}, "__metadata__": {...}}`), then the tensors' bytes, which
the offsets count from the header's end.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeft.errors import StageError

if TYPE_CHECKING:
    import torch

CHUNK = 1 << 24
"""Bytes of a tensor that are held at once while it is copied or compared: 16 MiB."""

_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}


@dataclass(frozen=True, kw_only=True)
class Entry:
    """Where a tensor stands in which file."""

    file: Path
    dtype: str
    """safetensors' name: F32, F16, BF16, ..."""
    shape: tuple[int, ...]
    start: int
    """First byte, counted from the file's beginning."""
    size: int
    """Bytes."""

    @property
    def columns(self) -> int:
        """Numbers in a row, where a row is all but the first axis."""
        count = 1
        for length in self.shape[1:]:
            count *= length
        return count


def read_header(file: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """The tensors of a file, in the order of their bytes, and its metadata. Raises StageError when it is no such file."""
    with file.open("rb") as f:
        raw = f.read(8)
        length = struct.unpack("<Q", raw)[0] if len(raw) == 8 else 0
        try:
            header: dict[str, Any] = json.loads(f.read(length)) if 0 < length < 1 << 30 else {}
        except ValueError:
            header = {}
    if not header:
        raise StageError(f"{file.name} is not a safetensors file")
    metadata = header.pop("__metadata__", {})
    entries = {}
    for name, found in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        start, end = found["data_offsets"]
        entries[name] = Entry(
            file=file, dtype=found["dtype"], shape=tuple(found["shape"]), start=8 + length + start, size=end - start
        )  # fmt: skip
    last = max((entry.start + entry.size for entry in entries.values()), default=0)
    if last > file.stat().st_size:
        raise StageError(f"{file.name} is cut short: {file.stat().st_size} bytes of {last}")
    return entries, metadata


def read_checkpoint(folder: Path) -> tuple[dict[str, Entry], dict[Path, dict[str, str]]]:
    """The tensors of all files of a checkpoint, and each file's metadata. Raises StageError without a file, or when a
    tensor stands in two of them."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise StageError(f"{folder.name} holds no *.safetensors file to merge into")
    entries: dict[str, Entry] = {}
    metadata = {}
    for file in files:
        found, metadata[file] = read_header(file)
        if twice := entries.keys() & found.keys():
            raise StageError(f"tensor {min(twice)} stands in two files of the base")
        entries |= found
    return entries, metadata


def pieces(entry: Entry) -> Iterator[bytes]:
    """A tensor's bytes in CHUNKs."""
    with entry.file.open("rb") as f:
        f.seek(entry.start)
        left = entry.size
        while left:
            piece = f.read(min(CHUNK, left))
            if not piece:
                raise StageError(f"{entry.file.name} ended before its last tensor")
            left -= len(piece)
            yield piece


def row_blocks(entry: Entry, most: int) -> Iterator[tuple[int, torch.Tensor]]:
    """A matrix in blocks of whole rows with at most `most` numbers each (one row at least), and each one's first row."""
    import torch

    count = max(1, most // max(1, entry.columns))
    rows = entry.shape[0] if entry.shape else 1
    with entry.file.open("rb") as f:
        f.seek(entry.start)
        for row in range(0, rows, count):
            now = min(count, rows - row)
            raw = bytearray(f.read(now * entry.columns * _BYTES[entry.dtype]))
            yield row, torch.frombuffer(raw, dtype=torch_dtype(entry.dtype)).reshape(now, entry.columns)


def write(
    file: Path,
    entries: Mapping[str, tuple[str, tuple[int, ...]]],
    metadata: Mapping[str, str],
    body: Callable[[str], Iterator[bytes]],
) -> None:
    """Write a file of `entries` (name -> dtype, shape) in their order; `body(name)` gives a tensor's bytes in pieces.

    The file is flushed to the disk. The same input gives the same bytes.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    at = 0
    for name, (dtype, shape) in entries.items():
        size = _BYTES[dtype]
        for length in shape:
            size *= length
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format wants the tensors aligned to eight bytes
    with file.open("wb") as f:
        f.write(struct.pack("<Q", len(text)) + text)
        for name in entries:
            for piece in body(name):
                f.write(piece)
        if f.tell() != 8 + len(text) + at:
            raise StageError(
                f"{file.name}: {f.tell()} bytes were written, {8 + len(text) + at} were announced"
            )
        f.flush()
        os.fsync(f.fileno())


def torch_dtype(name: str) -> torch.dtype:
    """torch's dtype for safetensors' name of it. Raises StageError for one edgeft cannot compute with."""
    import torch

    known = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    if name not in known:
        raise StageError(f"tensors of type {name} cannot be merged into; 16-bit or 32-bit floats can")
    return known[name]


def raw_bytes(tensor: torch.Tensor) -> bytes:
    """A tensor's bytes, little-endian."""
    import torch

    return tensor.contiguous().view(torch.uint8).numpy().tobytes()
