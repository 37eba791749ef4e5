"""Makes the delta between two models: tensors aligned by name, subtracted block by block, packed plane by plane.

edgeft/agent/delta.py describes the format and reads it. The two files may differ in their keys, in the order of their
tensors and in which tensors they have; what has no counterpart goes along whole. Any file is allowed: one that is no GGUF
has no counterparts.
"""

from __future__ import annotations

import hashlib
import lzma
import os
import zlib
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from edgeft import progress
from edgeft.agent import delta as format_
from edgeft.errors import DataError, StageError
from edgeft.llamacpp import header
from edgeft.llamacpp.threads import default_threads

if TYPE_CHECKING:
    import numpy

FIELDS: Mapping[str, tuple[int, ...]] = {
    "Q4_0": (1, 1, 16), "Q4_1": (1, 1, 1, 1, 16), "Q5_0": (1, 1, 4, 16), "Q5_1": (1, 1, 1, 1, 4, 16), "Q8_0": (1, 1, 32),
    "Q2_K": (16, 64, 1, 1, 1, 1), "Q3_K": (32, 64, 12, 1, 1), "Q4_K": (1, 1, 1, 1, 12, 128),
    "Q5_K": (1, 1, 1, 1, 12, 32, 128), "Q6_K": (128, 64, 16, 1, 1), "IQ4_NL": (1, 1, 16), "IQ4_XS": (1, 1, 2, 4, 128),
    "MXFP4": (1, 16), "TQ1_0": (48, 4, 1, 1), "TQ2_0": (64, 1, 1), "F16": (1, 1), "BF16": (1, 1), "F32": (1, 1, 1, 1),
}  # fmt: skip
"""Bytes of a block that belong together, in their order (ggml-common.h): float16 scales byte by byte, block scales, upper
bits, codes. A type that is not named is one plane."""
_FRAME = 1 << 20
_LZMA = [
    {"id": lzma.FILTER_LZMA2, "dict_size": 1 << 12, "lc": 3, "lp": 0, "pb": 0, "mode": lzma.MODE_NORMAL,
     "mf": lzma.MF_HC4, "nice_len": 32, "depth": 2},
]  # fmt: skip
"""A dictionary of 4 KiB: four times as quick as 1 MiB, and the result is smaller, for what looks like a repetition in
differences is chance and costs more than it saves (measured, docs/updates.md)."""
_WORTH = 0.98
"""LZMA is taken where it beats deflate by more: it unpacks at a tenth of the speed."""


@dataclass(frozen=True, kw_only=True)
class Size:
    """What came of a delta."""

    bytes: int
    whole: int
    """Bytes of the new file."""
    aligned: int
    """Bytes of it that have a counterpart in the old one."""
    same: int
    """Bytes of it that were copied."""

    @property
    def share(self) -> float:
        return self.bytes / self.whole if self.whole else 1.0


@dataclass(frozen=True, kw_only=True)
class _Piece:
    """Bytes start to end of the new file, and where their counterpart begins in the old one."""

    start: int
    end: int
    old: int | None = None
    fields: tuple[int, ...] = (1,)
    same: bool = False
    """Known to be equal, so that nobody needs to look."""


def make(old: Path, new: Path, out: Path) -> Size:
    """Write the delta that makes `new` of `old`, and apply it once: a delta that does not give `new` never leaves here.

    `out` appears by rename. The same files give the same bytes with the same zlib and liblzma. Raises DataError for an
    empty file and a GGUF file that is cut off, StageError when the delta does not give the new file.
    """
    import numpy

    for path in (old, new):
        if not path.stat().st_size:
            raise DataError(f"{path} is empty")
    aside = out.with_name(f".{out.name}.{os.getpid()}")
    a, b = (numpy.memmap(path, numpy.uint8, "r") for path in (old, new))
    same = aligned = 0
    try:
        with aside.open("wb") as file:
            file.write(format_.HEAD.pack(format_.MAGIC, len(a), _sha256(old), len(b), _sha256(new)))
            for piece, frame in _packed(a, b, _joined(_frames(_pieces(old, new), a, b))):
                progress.report("make the delta", piece.end, len(b), unit="bytes")
                file.write(frame)
                aligned += piece.end - piece.start if piece.old is not None else 0
                same += piece.end - piece.start if piece.same else 0
            file.write(format_.OP.pack(format_.END))
            file.flush()
            os.fsync(file.fileno())
        _prove(old, aside, new)
        aside.replace(out)
    finally:
        aside.unlink(missing_ok=True)
    return Size(bytes=out.stat().st_size, whole=len(b), aligned=aligned, same=same)


def _prove(old: Path, delta: Path, new: Path) -> None:
    result = delta.with_name(delta.name + ".result")
    try:
        format_.apply(old, delta, result)  # which compares size and sha256
    except format_.DeltaError as error:
        raise StageError(f"the delta from {old} to {new} cannot be used: {error}") from error
    finally:
        result.unlink(missing_ok=True)


def _pieces(old: Path, new: Path) -> Iterator[_Piece]:
    """The new file from its first byte to its last, with what each part corresponds to."""
    size = new.stat().st_size
    try:
        was, now = header.read(old), header.read(new)
    except DataError:
        if _is_gguf(old) and _is_gguf(new):
            raise
        yield from _filled([], size)
        return
    found = [*_header_pieces(old, was, new, now), *_tensor_pieces(was, now)]
    yield from _filled(sorted(found, key=lambda p: p.start), size)


def _is_gguf(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"GGUF"


def _header_pieces(old: Path, was: header.Header, new: Path, now: header.Header) -> Iterator[_Piece]:
    """Keys, and the tensor list, that are the same in both, wherever they stand."""
    with old.open("rb") as a, new.open("rb") as b:
        known = {_digest(a, start, end): start for start, end in _parts(was)}
        for start, end in _parts(now):
            if (there := known.get(_digest(b, start, end))) is not None:
                yield _Piece(start=start, end=end, old=there, same=True)


def _parts(found: header.Header) -> list[tuple[int, int]]:
    """Where each key, and the list of tensors with the padding behind it, begins and ends."""
    last = max((end for _, end in found.spans.values()), default=24)
    return [*found.spans.values(), (last, found.data_offset)]


def _digest(file: IO[bytes], start: int, end: int) -> bytes:
    file.seek(start)
    return hashlib.sha256(file.read(end - start)).digest()


def _tensor_pieces(was: header.Header, now: header.Header) -> Iterator[_Piece]:
    """Tensors of the same name, type and row. Where the number of rows differs, the rows that both have."""
    before = {t.name: t for t in was.tensors}
    for tensor in now.tensors:
        t, fields = before.get(tensor.name), FIELDS.get(tensor.type, ())
        start = now.data_offset + tensor.offset
        width = next(size for name, _, size in header.GGML_TYPES.values() if name == tensor.type)
        shared = 0
        if t and t.type == tensor.type and t.shape[:1] == tensor.shape[:1]:
            shared = min(t.bytes, tensor.bytes)
            yield _Piece(
                start=start, end=start + shared, old=was.data_offset + t.offset, fields=fields or (width,)
            )
        if shared < tensor.bytes:
            yield _Piece(start=start + shared, end=start + tensor.bytes, fields=fields or (width,))


def _filled(found: list[_Piece], size: int) -> Iterator[_Piece]:
    """The pieces, and what lies between them. Those that overlap others, as no sound file has them, are left out."""
    at = 0
    for piece in found:
        if piece.start < at or piece.end > size or piece.start == piece.end:
            continue
        if piece.start > at:
            yield _Piece(start=at, end=piece.start)
        yield piece
        at = piece.end
    if at < size:
        yield _Piece(start=at, end=size)


def _frames(
    pieces: Iterator[_Piece], a: numpy.ndarray[Any, Any], b: numpy.ndarray[Any, Any]
) -> Iterator[_Piece]:
    """Pieces cut to what a frame takes; those that turn out equal are marked."""
    import numpy

    for piece in pieces:
        if piece.same:
            yield piece
            continue
        record = sum(piece.fields)
        step = max(1, _FRAME // record) * record
        for start in range(piece.start, piece.end, step):
            end = min(start + step, piece.end)
            there = None if piece.old is None else piece.old + start - piece.start
            same = there is not None and numpy.array_equal(a[there : there + end - start], b[start:end])
            yield replace(piece, start=start, end=end, old=there, same=bool(same))


def _joined(pieces: Iterator[_Piece]) -> Iterator[_Piece]:
    """Equal pieces that follow one another in both files become one."""
    held: _Piece | None = None
    for piece in pieces:
        if held and held.same and piece.same and piece.old == (held.old or 0) + held.end - held.start:
            held = replace(held, end=piece.end)
            continue
        if held:
            yield held
        held = piece
    if held:
        yield held


def _packed(
    a: numpy.ndarray[Any, Any], b: numpy.ndarray[Any, Any], pieces: Iterator[_Piece]
) -> Iterator[tuple[_Piece, bytes]]:
    """Each piece with its frame, in order, packed by several threads, a few ahead of the writer."""
    threads = default_threads()
    waiting: deque[tuple[_Piece, Future[bytes]]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        for piece in pieces:
            waiting.append((piece, pool.submit(_frame, a, b, piece)))
            if len(waiting) > 2 * threads:
                done, future = waiting.popleft()
                yield done, future.result()
        for done, future in waiting:
            yield done, future.result()


def _frame(a: numpy.ndarray[Any, Any], b: numpy.ndarray[Any, Any], piece: _Piece) -> bytes:
    length = piece.end - piece.start
    if piece.same and piece.old is not None:
        return format_.OP.pack(format_.COPY) + format_.RANGE.pack(piece.old, length)
    now = b[piece.start : piece.end]
    if piece.old is None:
        return _planes(format_.NEW, 0, now, piece.fields)
    # Differences of bytes are again bytes, modulo 256.
    added = _planes(format_.ADD, piece.old, now - a[piece.old : piece.old + length], piece.fields)
    return added if len(added) < length else _planes(format_.NEW, 0, now, piece.fields)


def _planes(op: int, offset: int, data: numpy.ndarray[Any, Any], fields: tuple[int, ...]) -> bytes:
    if len(data) % sum(fields):
        fields = (1,)
    records = data.reshape(-1, sum(fields))
    head = [format_.OP.pack(op), format_.RECORDS.pack(offset, len(records), len(fields))]
    bodies, at = [], 0
    for width in fields:
        method, packed = _pack(records[:, at : at + width].tobytes())
        head.append(format_.PLANE.pack(width, method, len(packed)))
        bodies.append(packed)
        at += width
    return b"".join(head + bodies)


def _pack(plane: bytes) -> tuple[int, bytes]:
    """The smallest of the ways to store a plane. Deflate here only counts bytes (no search for repetitions)."""
    if plane.count(0) == len(plane):
        return format_.ZEROS, b""
    deflater = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zlib.Z_HUFFMAN_ONLY)
    method, best = format_.DEFLATE, deflater.compress(plane) + deflater.flush()
    if len(best) >= len(plane):
        method, best = format_.STORED, plane
    tried = lzma.compress(plane, format=lzma.FORMAT_RAW, filters=_LZMA)
    return (format_.LZMA2, tried) if len(tried) < _WORTH * len(best) else (method, best)


def _sha256(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()
