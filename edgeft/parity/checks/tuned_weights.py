"""Exact checks on a file whose codes were trained (`training.tune`), against the quantized file that it started from."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from edgeft.llamacpp.header import Header, Tensor, read
from edgeft.parity.checks.check import Check

_PIECE = 1 << 24


def tuned(start: Path, file: Path) -> list[Check]:
    """Nothing but blocks of the layers' matrices may differ, and every number is finite.

    Checks: same header (C-20, C-32, C-34), trained tensors (C-38), finite weights (C-35). Reads both files once, 16 MiB
    at a time. Raises DataError when either is no complete GGUF file.
    """
    before, after = read(start), read(file)
    same = _head(start, before) == _head(file, after)
    checks = [
        _check("same header", ("C-20", "C-32", "C-34"), same,
               "keys, tensor list and types are the quantized file's, byte for byte" if same
               else f"the header of {file.name} is not that of the file it was trained from"),
    ]  # fmt: skip
    if not same:
        return checks
    changed = [t for t in after.tensors if _differ(start, before, file, after, t)]
    strange = [t.name for t in changed if not _trainable(t)]
    said = f"{len(changed)} of {len(after.tensors)} tensors hold other codes than before"
    if strange:
        said = f"{len(strange)} tensors changed that were not trained, the first is {strange[0]}"
    broken = [t.name for t in changed if not _finite(file, after, t)]
    return [
        *checks,
        _check("trained tensors", ("C-38",), bool(changed) and not strange, said),
        _check("finite tuned weights", ("C-35",), not broken,
               f"{broken[0]} holds a number that is not finite" if broken
               else f"every number of {len(changed)} tensors is finite"),
    ]  # fmt: skip


def _check(name: str, codes: tuple[str, ...], ok: bool, said: str) -> Check:
    return Check(step="quantized", name=name, codes=codes, ok=ok, said=said)


def _trainable(tensor: Tensor) -> bool:
    return len(tensor.shape) > 1 and tensor.name.startswith("blk.")


def _head(path: Path, header: Header) -> bytes:
    with path.open("rb") as f:
        return f.read(header.data_offset)


def _pieces(path: Path, header: Header, tensor: Tensor, size: int = _PIECE) -> Iterator[bytes]:
    with path.open("rb") as f:
        f.seek(header.data_offset + tensor.offset)
        for at in range(0, tensor.bytes, size):
            yield f.read(min(size, tensor.bytes - at))


def _differ(start: Path, before: Header, file: Path, after: Header, tensor: Tensor) -> bool:
    pairs = zip(_pieces(start, before, tensor), _pieces(file, after, tensor), strict=True)
    return any(a != b for a, b in pairs)


def _finite(path: Path, header: Header, tensor: Tensor) -> bool:
    import torch

    from edgeft.grid import formats

    kind = formats.of(tensor.type)
    for raw in _pieces(path, header, tensor, (1 << 15) * kind.bytes):
        blocks = torch.frombuffer(bytearray(raw), dtype=torch.uint8).reshape(-1, kind.bytes)
        if not bool(torch.isfinite(kind.dequantize(blocks)).all()):
            return False
    return True
