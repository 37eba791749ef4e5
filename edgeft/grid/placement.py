"""Which tensor of a GGUF file each parameter of a checkpoint became, and which of its rows.

The converter renames, permutes rows (the rotary layout of llama's queries and keys, fused query-key-value layers),
transposes (GPT-2) and adds one to some norms (Gemma). None of that is taken from a table of architectures: gguf-py's
table of names proposes a tensor, and the numbers decide. What the numbers do not prove is not placed.
"""

from __future__ import annotations

import logging
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeft.errors import DataError, StageError
from edgeft.llamacpp import runtime
from edgeft.llamacpp.header import Header, Tensor, read

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

    Rows = NDArray[np.int64]

log = logging.getLogger(__name__)

_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_HELD = 1 << 24
"""Numbers of a tensor in memory at once."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Placed:
    """Where one parameter stands in the file."""

    tensor: str
    """The GGUF tensor's name."""
    rows: Rows | None = None
    """`file[rows]` has the parameter's own order; None when the order is the same. Of a vector: its elements."""
    transposed: bool = False
    """The checkpoint keeps the matrix as (in, out); a file's row, and `rows`, go by out."""
    added: float = 0.0
    """What the converter added to each number: 1 for Gemma's norms."""


@dataclass(frozen=True, kw_only=True)
class Placement:
    """A checkpoint's parameters in a GGUF file."""

    placed: Mapping[str, Placed]
    """By the name in the safetensors files."""
    unplaced: Mapping[str, str]
    """Parameters that could not be led back, and a sentence on why."""
    unclaimed: tuple[str, ...]
    """The file's tensors that no parameter became: what the converter computed, or made of an unplaced one."""

    def of(self, name: str) -> Placed:
        """Where the parameter stands. Raises StageError with the reason when that is not known."""
        if name in self.placed:
            return self.placed[name]
        reason = self.unplaced.get(name, f"{name} is no tensor of the checkpoint by itself")
        raise StageError(
            f"{reason}, so the file's blocks cannot be trained",
            hint='train.method = "qlora" or "lora" needs no such correspondence',
        )


def placement(checkpoint: Path, plain: Path) -> Placement:
    """Lead every tensor of the `checkpoint` folder to what it became in `plain`, its 16- or 32-bit GGUF file.

    Both are read once, a part at a time. Two equal rows could be told apart by nothing, and training would make them
    different; an order with such rows is taken only if it is that of the layer's weight, of the same layer in other
    blocks, or the file's own. Raises DataError when either cannot be read.
    """
    header = read(plain)
    tensors = {t.name: t for t in header.tensors}
    names = _Names(header)
    found: dict[str, _Match] = {}
    unplaced: dict[str, str] = {}
    for name, stored in _stored(checkpoint):
        candidates = [tensors[n] for n in names.of(name) if n in tensors]
        if not candidates:
            unplaced[name] = f"{name} has no tensor of its own in {plain.name}"
            continue
        match = next(filter(None, (_match(stored, plain, header, tensor) for tensor in candidates)), None)
        if match is None:
            unplaced[name] = f"{name} and {candidates[0].name} of {plain.name} do not hold the same rows"
            continue
        found[name] = match
    placed = {}
    for name, match in found.items():
        if (rows := _order(name, match, found)) is None:
            unplaced[name] = f"{name} has equal rows, and nothing tells their order in {match.tensor}"
            continue
        straight = bool((rows == range(len(rows))).all())
        placed[name] = Placed(
            tensor=match.tensor,
            rows=None if straight else rows,
            transposed=match.transposed,
            added=match.added,
        )
    for why in unplaced.values():
        log.debug("not placed: %s", why)
    claimed = {p.tensor for p in placed.values()}
    return Placement(
        placed=placed, unplaced=unplaced, unclaimed=tuple(t.name for t in header.tensors if t.name not in claimed)
    )  # fmt: skip


def raw(path: Path, header: Header, tensor: Tensor) -> NDArray[np.uint8]:
    """The bytes of a tensor of a GGUF file, mapped, not read: uint8 [rows, bytes a row]; one row for a vector."""
    import numpy as np

    if not tensor.bytes:
        raise DataError(f"{tensor.name} of {path} is empty")
    start, height = header.data_offset + tensor.offset, tensor.weights // tensor.shape[0]
    if start + tensor.bytes > path.stat().st_size:
        raise DataError(f"{path} ends inside its tensor {tensor.name}")
    mapped = np.memmap(path, np.uint8, "r", offset=start, shape=(tensor.bytes,))
    return mapped.reshape(height, tensor.bytes // height)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Match:
    """The same rows, in orders that remain to be settled where some are equal."""

    tensor: str
    ours: list[bytes]
    """A digest of each row of the parameter, in its order."""
    theirs: list[bytes]
    """The same of the file's tensor."""
    transposed: bool = False
    added: float = 0.0

    @property
    def ambiguous(self) -> bool:
        return len(set(self.ours)) < len(self.ours)

    def fits(self, rows: Sequence[int] | Rows) -> bool:
        """Whether the file's rows in this order are the parameter's."""
        return len(rows) == len(self.ours) and all(
            self.theirs[i] == own for i, own in zip(rows, self.ours, strict=True)
        )

    def pairing(self) -> Rows:
        """The file's row for each of ours; equal ones in the file's order."""
        import numpy as np

        places: dict[bytes, list[int]] = defaultdict(list)
        for i in reversed(range(len(self.theirs))):
            places[self.theirs[i]].append(i)
        return np.array([places[digest].pop() for digest in self.ours], np.int64)


def _order(name: str, match: _Match, found: Mapping[str, _Match]) -> Rows | None:
    """The file's row for each row of the parameter, or None when equal rows leave it open."""
    import numpy as np

    if not match.ambiguous:
        return match.pairing()
    # A zero bias says nothing of the order its layer is in, but the layer's weight does; likewise for a layer whose
    # rows were pruned to zero and the same layer in another block, and for a norm inside attention.
    stem, parent, role = name.rpartition(".")[0], _parent(name), _role(name)
    kin = [
        f"{stem}.weight",
        *(n for n in found if _role(n) == role),
        *(n for n in found if _parent(n) == parent),
    ]
    for other in dict.fromkeys(kin):
        sure = found.get(other)
        if sure is None or sure.ambiguous or len(sure.ours) != len(match.ours):
            continue
        rows = sure.pairing()
        if match.fits(rows):
            return rows
    straight = np.arange(len(match.ours))
    return straight if match.fits(straight) else None


def _role(name: str) -> str:
    return re.sub(r"\.\d+\.", ".*.", name)


def _parent(name: str) -> str:
    """`model.layers.3.self_attn` of `model.layers.3.self_attn.q_proj.weight`."""
    return name.rpartition(".")[0].rpartition(".")[0]


def _match(stored: torch.Tensor, plain: Path, header: Header, tensor: Tensor) -> _Match | None:
    """The parameter and the tensor, if one is the other with its rows in some order."""
    shape = tuple(n for n in stored.shape if n != 1) or (1,)
    theirs_shape = tuple(n for n in reversed(tensor.shape) if n != 1) or (1,)
    if tensor.type not in _DTYPES or len(shape) > 2:
        return None
    if len(shape) == 1:
        return _match_vector(stored.reshape(-1), plain, header, tensor) if shape == theirs_shape else None
    theirs = _digests(_file_rows(plain, header, tensor))
    for transposed in (False, True):
        matrix = stored.reshape(shape).T if transposed else stored.reshape(shape)
        if tuple(matrix.shape) != theirs_shape:
            continue
        ours = _digests(_our_rows(matrix, tensor.type))
        if sorted(ours) == sorted(theirs):
            return _Match(tensor=tensor.name, ours=ours, theirs=theirs, transposed=transposed)
    return None


def _match_vector(stored: torch.Tensor, plain: Path, header: Header, tensor: Tensor) -> _Match | None:
    import torch

    mapped = torch.from_numpy(raw(plain, header, tensor).reshape(-1).copy())
    file = mapped.view(getattr(torch, _DTYPES[tensor.type])).float()
    # The converter computes in float16 what is stored in it, and everything else in float32 (conversion/base.py).
    wide = stored if stored.dtype is torch.float16 else stored.float()
    theirs = _digests([file.view(torch.uint8).reshape(-1, 4).numpy()])
    for added in (0.0, 1.0):
        shifted = (wide + added).float() if added else wide.float()
        ours = _digests([shifted.contiguous().view(torch.uint8).reshape(-1, 4).numpy()])
        if ours == theirs or (not added and sorted(ours) == sorted(theirs)):
            return _Match(tensor=tensor.name, ours=ours, theirs=theirs, added=added)
    return None


def _digests(parts: Iterator[NDArray[np.uint8]] | Sequence[NDArray[np.uint8]]) -> list[bytes]:
    return [blake2b(row, digest_size=16).digest() for part in parts for row in part]


def _file_rows(path: Path, header: Header, tensor: Tensor) -> Iterator[NDArray[np.uint8]]:
    import numpy as np

    rows = raw(path, header, tensor)
    step = max(1, _HELD // rows.shape[1])
    for start in range(0, len(rows), step):
        yield np.ascontiguousarray(rows[start : start + step])


def _our_rows(matrix: torch.Tensor, kind: str) -> Iterator[NDArray[np.uint8]]:
    """The matrix as the converter writes it: through float32, rounded to nearest."""
    import torch

    step = max(1, _HELD // matrix.shape[1])
    for start in range(0, len(matrix), step):
        part = matrix[start : start + step].float().to(getattr(torch, _DTYPES[kind])).contiguous()
        yield part.view(torch.uint8).numpy()


def _stored(checkpoint: Path) -> Iterator[tuple[str, torch.Tensor]]:
    from safetensors import safe_open

    files = sorted(checkpoint.glob("*.safetensors"))
    if not files:
        raise DataError(f"{checkpoint} holds no *.safetensors file")
    for file in files:
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118  it is no mapping
                tensor = opened.get_tensor(name)
                if tensor.is_floating_point():
                    yield name, tensor


class _Names:
    """gguf-py's table: the file's names that a parameter's name may have become."""

    def __init__(self, header: Header) -> None:
        package = runtime.gguf()
        architecture = header.keys.get("general.architecture")
        kind = next((k for k, name in package.MODEL_ARCH_NAMES.items() if name == architecture), None)
        blocks = header.keys.get(f"{architecture}.block_count")
        if kind is None or not isinstance(blocks, int):
            raise DataError(f"gguf-py knows no architecture {architecture!r}")
        self._table: Any = package.get_tensor_name_map(kind, blocks)

    def of(self, name: str) -> list[str]:
        # Some converters take a prefix off, or put one on, before they look a name up.
        spellings = [name, name.partition(".")[2], f"model.{name}"]
        got = [self._table.get_name(key=s, try_suffixes=(".weight", ".bias")) for s in spellings]
        # The converter drops an output layer that repeats the embedding; llama.cpp then uses the embedding.
        tied = ["token_embd.weight"] if "output.weight" in got else []
        return list(dict.fromkeys(n for n in [*got, *tied] if n))
