"""Reads the header of a GGUF file: its metadata and the list of its tensors, never the tensor data.

The format is https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (versions 2 and 3, little-endian).
Kept apart from the `gguf` package because planning must stay light: this needs no numpy and reads a header
of 150,000 tokens in a fraction of a second.
"""

from __future__ import annotations

import struct
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from edgeft.errors import DataError

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MOST = 1 << 32
"""No count or length in a sane header is larger; a larger one means a damaged file."""


@dataclass(frozen=True, kw_only=True)
class Tensor:
    """One line of the tensor list."""

    name: str
    dimensions: tuple[int, ...]
    """As in the file: the row length first."""
    type_id: int
    """The number of a ggml_type."""


@dataclass(frozen=True, kw_only=True)
class Header:
    """What stands before the data."""

    metadata: dict[str, Any]
    """Every scalar and string; of the arrays only the numeric ones up to 1024 long and those asked for."""
    array_lengths: dict[str, int]
    """The length of every array, kept or not."""
    tensors: tuple[Tensor, ...]


def read_header(path: Path, *, arrays: Collection[str] = ()) -> Header:
    """Read the header of a GGUF file; `arrays` names the long arrays to keep, such as the token list.

    Raises DataError when the file is not GGUF, is of version 1, or ends within its header.
    """
    with path.open("rb") as file:
        magic, version = file.read(4), file.read(4)
        if magic != b"GGUF" or len(version) < 4:
            raise DataError(f"{path} is not a GGUF file: it starts with {magic!r}")
        if (number := int.from_bytes(version, "little")) not in (2, 3):
            raise DataError(f"{path} is GGUF version {number}; versions 2 and 3 (little-endian) can be read")
        try:
            return _body(file, arrays)
        except (struct.error, EOFError, UnicodeDecodeError, KeyError) as e:
            raise DataError(
                f"{path} has a damaged GGUF header: {type(e).__name__}: {e}",
                hint="the file may be cut off; fetch or build it again",
            ) from None


def _body(file: BinaryIO, arrays: Collection[str]) -> Header:
    n_tensors, n_values = _number(file, "Q"), _number(file, "Q")
    metadata: dict[str, Any] = {}
    lengths: dict[str, int] = {}
    for _ in range(_sane(n_values)):
        key, kind = _string(file), _number(file, "I")
        if kind != _ARRAY:
            metadata[key] = _string(file) if kind == _STRING else _number(file, _SCALARS[kind])
            continue
        inner, length = _number(file, "I"), _sane(_number(file, "Q"))
        lengths[key] = length
        values = _array(file, inner, length, keep=key in arrays or (inner in _SCALARS and length <= 1024))
        if values is not None:
            metadata[key] = values
    tensors = []
    for _ in range(_sane(n_tensors)):
        name, rank = _string(file), _number(file, "I")
        if rank > 8:
            raise EOFError(f"tensor {name} has {rank} dimensions")
        dimensions = tuple(_number(file, "Q") for _ in range(rank))
        tensors.append(Tensor(name=name, dimensions=dimensions, type_id=_number(file, "I")))
        _number(file, "Q")
    return Header(metadata=metadata, array_lengths=lengths, tensors=tuple(tensors))


def _array(file: BinaryIO, kind: int, length: int, *, keep: bool) -> list[Any] | None:
    if kind in _SCALARS:
        size = struct.calcsize("<" + _SCALARS[kind]) * length
        if keep:
            return list(struct.unpack(f"<{length}{_SCALARS[kind]}", _exactly(file, size)))
        _skip(file, size)
        return None
    if kind == _STRING and keep:
        return [_string(file) for _ in range(length)]
    for _ in range(length):
        if kind == _STRING:
            _skip(file, _sane(_number(file, "Q")))
        elif kind == _ARRAY:
            _array(file, _number(file, "I"), _sane(_number(file, "Q")), keep=False)
        else:
            raise KeyError(f"value type {kind}")
    return None


def _number(file: BinaryIO, code: str) -> Any:
    return struct.unpack("<" + code, _exactly(file, struct.calcsize("<" + code)))[0]


def _string(file: BinaryIO) -> str:
    return _exactly(file, _sane(_number(file, "Q"))).decode("utf-8", errors="replace")


def _exactly(file: BinaryIO, size: int) -> bytes:
    data = file.read(size)
    if len(data) < size:
        raise EOFError("the file ends within its header")
    return data


def _skip(file: BinaryIO, size: int) -> None:
    file.seek(size, 1)


def _sane(count: int) -> int:
    if count > _MOST:
        raise EOFError(f"a length of {count} is impossible")
    return count
