"""Rebuilds a model from the one on the device and a delta. Standard library only, a few MB of memory, no numpy.

The format, all numbers little-endian:

    8 bytes   EDGEFTD1
    u64, 32   size and sha256 of the base
    u64, 32   size and sha256 of the result
    frames    one after another, each makes the next bytes of the result:
      u8 1  COPY   u64 offset, u64 length                 those bytes of the base
      u8 2  NEW    u64 0,      u32 records, u8 n, n planes    records as the planes have them
      u8 3  ADD    u64 offset, u32 records, u8 n, n planes    the same, added bytewise modulo 256 to the base from offset on
      u8 0  END    nothing follows
    plane     u16 width, u8 method, u32 packed; the n packed planes follow the frame's head

A record is one block of a quantized tensor. A plane holds the same `width` bytes of every record of the frame (scales
apart from codes, since they compress differently), and the widths of a frame add up to the record. Methods: 0 zeros,
1 stored, 2 deflate without header, 3 LZMA2 without container. No frame makes more than 4 MiB, except COPY.
"""

from __future__ import annotations

import hashlib
import lzma
import os
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

MAGIC = b"EDGEFTD1"
END, COPY, NEW, ADD = 0, 1, 2, 3
ZEROS, STORED, DEFLATE, LZMA2 = 0, 1, 2, 3
HEAD = struct.Struct("<8sQ32sQ32s")
OP = struct.Struct("<B")
RANGE = struct.Struct("<QQ")
RECORDS = struct.Struct("<QIB")
PLANE = struct.Struct("<HBI")
FRAME_BYTES = 4 << 20
FILTERS: list[dict[str, Any]] = [{"id": lzma.FILTER_LZMA2, "dict_size": 1 << 16, "lc": 3, "lp": 0, "pb": 0}]
"""What method 3 is unpacked with. The dictionary bounds the memory; differences repeat nothing that is far away."""
_BLOCK = 1 << 20
_LANES = 1 << 15
"""Bytes added at once: as one integer of that size, which is quicker than larger and smaller ones (measured)."""


class DeltaError(ValueError):
    """A delta that is damaged, is for another base, or does not give the promised file."""


@dataclass(frozen=True)
class Promise:
    """What a delta says of its base and of its result."""

    base_bytes: int
    base_sha256: str
    bytes: int
    sha256: str


def apply(base: Path, delta: Path | IO[bytes], out: Path) -> None:
    """Write to `out` the file that `delta` makes of `base`; it is flushed to the disk, and gone again on any failure.

    `delta` may be a stream that can only be read forwards. Raises DeltaError when it is malformed or cut off, when the
    base is not the file it was made for, and when the result has not the promised size and sha256; OSError as the disk
    has it.
    """
    if isinstance(delta, Path):
        with delta.open("rb") as stream:
            apply(base, stream, out)
        return
    promise = inspect(delta)
    with base.open("rb") as old:
        _check_base(old, promise, base)
        try:
            with out.open("wb") as new:
                _rebuild(old, delta, new, promise)
                new.flush()
                os.fsync(new.fileno())
        except BaseException:
            out.unlink(missing_ok=True)
            raise


def inspect(delta: IO[bytes]) -> Promise:
    """The promise at a delta's start; the stream then stands at its first frame. Raises DeltaError."""
    magic, base_bytes, base, size, result = HEAD.unpack(_exactly(delta, HEAD.size))
    if magic != MAGIC:
        raise DeltaError(f"this is no delta of edgeft: it starts with {magic!r}")
    return Promise(base_bytes, base.hex(), size, result.hex())


def _check_base(old: IO[bytes], promise: Promise, path: Path) -> None:
    if (size := os.fstat(old.fileno()).st_size) != promise.base_bytes:
        raise DeltaError(f"the delta is for a base of {promise.base_bytes} bytes, {path} has {size}")
    digest = hashlib.sha256()
    while block := old.read(_BLOCK):
        digest.update(block)
    if digest.hexdigest() != promise.base_sha256:
        raise DeltaError(
            f"the delta is for the base with sha256 {promise.base_sha256}, {path} has {digest.hexdigest()}"
        )


def _rebuild(old: IO[bytes], delta: IO[bytes], new: IO[bytes], promise: Promise) -> None:
    digest, left = hashlib.sha256(), promise.bytes
    for piece in _pieces(old, delta, promise):
        left -= len(piece)
        if left < 0:
            raise DeltaError(f"the delta makes more than the {promise.bytes} bytes it promises")
        digest.update(piece)
        new.write(piece)
    if left:
        raise DeltaError(f"the delta makes {left} bytes less than the {promise.bytes} it promises")
    if digest.hexdigest() != promise.sha256:
        raise DeltaError(
            f"the delta makes a file with sha256 {digest.hexdigest()} and promises {promise.sha256}: it is damaged"
        )


def _pieces(old: IO[bytes], delta: IO[bytes], promise: Promise) -> Iterator[bytes | bytearray]:
    """The result's bytes, frame after frame."""
    while True:
        (op,) = OP.unpack(_exactly(delta, OP.size))
        if op == END:
            if delta.read(1):
                raise DeltaError("something follows the end of the delta")
            return
        if op == COPY:
            offset, length = RANGE.unpack(_exactly(delta, RANGE.size))
            _inside(offset, length, promise)
            old.seek(offset)
            while length:
                block = _exactly(old, min(_BLOCK, length), "the base")
                length -= len(block)
                yield block
        elif op in (NEW, ADD):
            offset, records = _records(delta)
            if op == NEW:
                yield records
                continue
            _inside(offset, len(records), promise)
            old.seek(offset)
            yield _sum(_exactly(old, len(records), "the base"), records)
        else:
            raise DeltaError(f"the delta has a frame of the unknown kind {op}")


def _inside(offset: int, length: int, promise: Promise) -> None:
    if offset + length > promise.base_bytes:
        raise DeltaError(f"the delta reads up to byte {offset + length} of a base of {promise.base_bytes}")


def _records(delta: IO[bytes]) -> tuple[int, bytearray]:
    """Offset and records of a frame, the planes put back in their order."""
    offset, count, n = RECORDS.unpack(_exactly(delta, RECORDS.size))
    planes = [PLANE.unpack(_exactly(delta, PLANE.size)) for _ in range(n)]
    size = sum(width for width, _, _ in planes)
    if not 0 < size * count <= FRAME_BYTES:
        raise DeltaError(f"the delta has a frame of {count} records of {size} bytes")
    records, at = bytearray(size * count), 0
    for width, method, packed in planes:
        if packed > FRAME_BYTES:
            raise DeltaError(f"the delta has a plane of {packed} packed bytes")
        plane = _unpack(method, _exactly(delta, packed), width * count)
        if plane and width == size:
            records[:] = plane
        elif plane:
            for i in range(width):
                records[at + i :: size] = plane[i::width]
        at += width
    return offset, records


def _unpack(method: int, packed: bytes, length: int) -> bytes:
    """One plane of `length` bytes; b"" for zeros. Never more memory than the plane takes."""
    if method == ZEROS and not packed:
        return b""
    if method == STORED and len(packed) == length:
        return packed
    try:
        if method == DEFLATE:
            inflate = zlib.decompressobj(-15)
            plane = inflate.decompress(packed, length + 1)
            whole = inflate.eof and not inflate.unused_data
        elif method == LZMA2:
            decoder = lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=FILTERS)
            plane = decoder.decompress(packed, length + 1)
            whole = not decoder.unused_data
        else:
            raise DeltaError(
                f"the delta has a plane of {len(packed)} bytes, packed in the unknown way {method}"
            )
    except (zlib.error, lzma.LZMAError, EOFError) as error:
        raise DeltaError(f"the delta is damaged: {error}") from None
    if len(plane) != length or not whole:
        raise DeltaError(f"the delta is damaged: a plane of {length} bytes has another length")
    return plane


def _sum(old: bytes, records: bytearray) -> bytearray:
    """Bytewise sum modulo 256. Each byte's upper bit is added apart, so that none carries into its neighbour."""
    for start in range(0, len(records), _LANES):
        end = min(start + _LANES, len(records))
        low, high = _masks(end - start)
        a, b = int.from_bytes(old[start:end], "little"), int.from_bytes(records[start:end], "little")
        records[start:end] = (((a & low) + (b & low)) ^ ((a ^ b) & high)).to_bytes(end - start, "little")
    return records


@lru_cache(maxsize=4)
def _masks(length: int) -> tuple[int, int]:
    return int.from_bytes(b"\x7f" * length, "little"), int.from_bytes(b"\x80" * length, "little")


def _exactly(stream: IO[bytes], length: int, what: str = "the delta") -> bytes:
    """The next `length` bytes, also from a stream that gives fewer at a time."""
    found = stream.read(length)
    while len(found) < length and (more := stream.read(length - len(found))):
        found += more
    if len(found) < length:
        raise DeltaError(f"{what} is cut off")
    return found
