"""The tensors of a checkpoint folder or of a GGUF file, a block of numbers at a time, as float32.

Nothing here judges. What is held is one block, however large the tensor. GGUF blocks are widened by ggml's own
`to_float`, which is what the runtime makes of them.
"""

from __future__ import annotations

import ctypes
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeft.errors import DataError
from edgeft.llamacpp import runtime
from edgeft.llamacpp.header import GGML_TYPES, Header, Tensor

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

BLOCK = 1 << 20
"""Numbers held at once; a multiple of every ggml block size."""


@dataclass(frozen=True, kw_only=True)
class Stored:
    """A tensor of a checkpoint, and where it stands."""

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
        """Numbers in a row, where a row is all but the first axis; 1 of a vector."""
        return math.prod(self.shape[1:])


def in_checkpoint(folder: Path) -> dict[str, Stored]:
    """The tensors of all `*.safetensors` files in `folder`, by name.

    Raises DataError when there is none, when a file is not complete, or when two files hold the same tensor.
    """
    found: dict[str, Stored] = {}
    for file in sorted(folder.glob("*.safetensors")):
        for name, stored in _header(file).items():
            if name in found:
                raise DataError(f"{name} stands in {found[name].file.name} and in {file.name}")
            found[name] = stored
    if not found:
        raise DataError(f"{folder} holds no *.safetensors file")
    return found


def _header(file: Path) -> dict[str, Stored]:
    """Eight bytes with the length of a JSON header, the header, the tensors' bytes (README of safetensors).

    Read here and not by `safe_open`, which maps the whole file: its pages count as this process's memory.
    """
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        try:
            entries: dict[str, Any] = json.loads(stream.read(length)) if length < 1 << 30 else {}
        except ValueError:
            entries = {}
    found = {
        name: Stored(
            file=file, dtype=entry["dtype"], shape=tuple(entry["shape"]),
            start=8 + length + entry["data_offsets"][0], size=entry["data_offsets"][1] - entry["data_offsets"][0],
        )
        for name, entry in entries.items() if name != "__metadata__"
    }  # fmt: skip
    if not found or max(s.start + s.size for s in found.values()) > file.stat().st_size:
        raise DataError(f"{file} is not a complete safetensors file")
    return found


def rows(stored: Stored, count: int = 0) -> Iterator[tuple[int, torch.Tensor]]:
    """A tensor in blocks of whole rows, as stored, each (rows, columns), and each block's first row.

    `count` rows a block; 0 means as many as BLOCK holds, one at least.
    """
    import torch

    dtype = getattr(torch, _TORCH.get(stored.dtype, "uint8"))
    height = stored.shape[0] if stored.shape else 1
    step = count or max(1, BLOCK // max(1, stored.columns))
    with stored.file.open("rb") as stream:
        stream.seek(stored.start)
        for row in range(0, height, step):
            now = min(step, height - row)
            raw = bytearray(stream.read(stored.size // height * now))
            yield row, torch.frombuffer(raw, dtype=dtype).reshape(now, -1)


_TORCH = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32",
    "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip
"""torch's name of a safetensors type; any other is read as bytes."""


def config(folder: Path) -> dict[str, Any]:
    """A checkpoint's config.json, with the language model's own part on top where it is nested in `text_config`."""
    path = folder / "config.json"
    whole: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return {**whole, **whole.get("text_config", {})}


def numbers(path: Path, header: Header, tensor: Tensor) -> Iterator[NDArray[np.float32]]:
    """The weights of a GGUF tensor in file order, at most BLOCK at a time. Raises DataError when the file ends early."""
    import numpy as np

    kind, per_block, size = _layout(tensor.type)
    widen = None if tensor.type in _PLAIN else _to_float(kind)
    with path.open("rb") as stream:
        stream.seek(header.data_offset + tensor.offset)
        for start in range(0, tensor.weights, BLOCK):
            count = min(BLOCK, tensor.weights - start)
            raw = stream.read(count // per_block * size)
            if len(raw) < count // per_block * size:
                raise DataError(f"{path} ends inside its tensor {tensor.name}")
            if widen is None:
                yield np.frombuffer(raw, _PLAIN[tensor.type]).astype(np.float32, copy=False)
                continue
            block = np.empty(count, np.float32)
            widen(raw, block.ctypes.data, count)
            yield block


def raw_bytes(path: Path, header: Header, tensor: Tensor) -> bytes:
    """All bytes of a GGUF tensor at once: for small ones."""
    with path.open("rb") as stream:
        stream.seek(header.data_offset + tensor.offset)
        return stream.read(tensor.bytes)


def requantized(values: NDArray[np.float32], like: Tensor) -> bytes:
    """What ggml makes of `values` (all of the tensor's weights) in `like`'s type, without an importance matrix.

    The bytes are those that llama.cpp's quantizer writes (measured for Q4_0, Q5_0, Q8_0 and the K-quants).
    """
    kind, _, _ = _layout(like.type)
    out = ctypes.create_string_buffer(like.bytes)
    chunk = runtime.ggml()["ggml_quantize_chunk"]
    chunk.restype = ctypes.c_size_t
    chunk.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * 3, ctypes.c_void_p]
    chunk(kind, values.ctypes.data, out, 0, like.weights // like.shape[0], like.shape[0], None)
    return out.raw


_PLAIN = {"F32": "<f4", "F64": "<f8", "I8": "i1", "I16": "<i2", "I32": "<i4", "I64": "<i8"}
"""Types that numpy reads, and ggml has no function for."""


class _Traits(ctypes.Structure):
    """struct ggml_type_traits of ggml.h."""

    _fields_ = (
        ("type_name", ctypes.c_char_p),
        ("blck_size", ctypes.c_int64),
        ("blck_size_interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.c_void_p, ctypes.c_int64)),
        ("from_float_ref", ctypes.c_void_p),
    )


@cache
def _layout(name: str) -> tuple[int, int, int]:
    """A type's number, weights a block, bytes a block."""
    return next((n, block, size) for n, (known, block, size) in GGML_TYPES.items() if known == name)


@cache
def _to_float(kind: int) -> Any:
    """ggml's function (bytes, float32 out, count) for a type."""
    find = runtime.ggml()[
        "ggml_get_type_traits"
    ]  # by item: a function of our own, whose signature no other code sets
    find.restype = ctypes.POINTER(_Traits)
    widen = find(kind).contents.to_float
    if not widen:
        raise DataError(f"ggml cannot widen {GGML_TYPES[kind][0]} to floats")
    return widen
