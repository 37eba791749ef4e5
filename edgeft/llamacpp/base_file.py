"""llama.cpp's file of base log-probabilities, which `llama-perplexity --kl-divergence` compares a model with.

Layout (tools/perplexity/perplexity.cpp): `_logits_`, int32 n_ctx, n_vocab, n_chunk, int32 tokens[n_chunk * n_ctx], and
for each scored token float scale, float least, uint16[n_vocab padded to an even count]: log p = least + scale * step.
Log-probabilities are cut off 16 below the largest logit, so numbers against such a file differ from exact ones in the
third digit (PPL) and have a floor (KLD): do not mix the two in one table.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from edgeft.errors import DataError
from edgeft.llamacpp.threads import default_threads

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

T = TypeVar("T")

MAGIC = b"_logits_"
BLOCK = 1 << 18
"""Numbers that are worked on at once: 1 MB in float32 stays in a core's own cache, whatever the vocabulary. Measured on
49,152 x 255 numbers, one thread: 54 ms a comparison, 71 ms with blocks four times as large."""


def first_scored(n_ctx: int) -> int:
    """The position of the first scored logits: half of the window is context."""
    return n_ctx // 2


def write_base(
    path: Path,
    *,
    n_ctx: int,
    n_vocab: int,
    chunks: Sequence[Sequence[int]],
    logits: Iterable[NDArray[np.float32]],
) -> None:
    """Write a base file as `llama-perplexity --save-all-logits` does.

    `logits` yields, window by window, what `score.scored_logits` gives, from whatever model: a torch model's logits
    make the stock tool compare a GGUF with the model as it was trained. One window's are held at a time. Appears by
    rename. Raises DataError when windows differ in length or logits in shape.
    """
    import numpy as np

    if other := {len(chunk) for chunk in chunks} - {n_ctx}:
        raise DataError(f"all windows of a base file have {n_ctx} tokens, not {min(other)}")
    expected = (n_ctx - 1 - first_scored(n_ctx), n_vocab)
    aside = path.with_name(path.name + ".part")
    written = 0
    with aside.open("wb") as stream:
        stream.write(MAGIC + struct.pack("<iii", n_ctx, n_vocab, len(chunks)))
        stream.write(np.asarray(chunks, "<i4").tobytes())
        for rows in logits:
            if rows.shape != expected:
                raise DataError(f"logits of window {written} have the shape {rows.shape}, not {expected}")
            for packed in in_blocks(partial(_pack, rows), *expected):
                stream.write(packed)
            written += 1
        stream.flush()
        os.fsync(stream.fileno())
    if written != len(chunks):
        aside.unlink()
        raise DataError(f"{written} windows of logits came for {len(chunks)} windows of tokens")
    aside.replace(path)


@dataclass(frozen=True, kw_only=True)
class Base:
    """A base file's header; its rows are read window by window."""

    path: Path
    n_ctx: int
    n_vocab: int
    windows: list[list[int]]

    @property
    def scored(self) -> int:
        """Scored tokens of a window."""
        return self.n_ctx - 1 - first_scored(self.n_ctx)

    def packed(self, window: int) -> NDArray[np.uint16]:
        """The 16-bit rows of one window [scored, width], read from the disk."""
        import numpy as np

        width = _width(self.n_vocab)
        start = len(MAGIC) + 12 + 4 * self.n_ctx * len(self.windows)
        with self.path.open("rb") as stream:
            stream.seek(start + 2 * window * self.scored * width)
            rows = np.fromfile(stream, "<u2", self.scored * width)
        return rows.reshape(self.scored, width)

    def unpack(self, rows: NDArray[np.uint16]) -> NDArray[np.float32]:
        """Log-probabilities [rows, n_vocab] of packed rows."""
        import numpy as np

        scale, least = rows[:, :4].copy().view("<f4").T
        result: NDArray[np.float32] = rows[:, 4 : 4 + self.n_vocab].astype(np.float32)
        result *= scale[:, None]
        result += least[:, None]
        return result

    def log_probabilities(self) -> Iterator[NDArray[np.float32]]:
        """Log-probabilities [scored, n_vocab] of each window in turn."""
        for window in range(len(self.windows)):
            yield self.unpack(self.packed(window))


def read_base(path: Path) -> Base:
    """Open a base file. Raises DataError when it is none, or is cut off."""
    import numpy as np

    with path.open("rb") as stream:
        if stream.read(len(MAGIC)) != MAGIC:
            raise DataError(f"{path} holds no log-probabilities of llama-perplexity")
        n_ctx, n_vocab, count = struct.unpack("<iii", stream.read(12))
        tokens = np.frombuffer(stream.read(4 * n_ctx * count), "<i4")
    rows = count * (n_ctx - 1 - first_scored(n_ctx))
    size = len(MAGIC) + 12 + 4 * n_ctx * count + 2 * rows * _width(n_vocab)
    if path.stat().st_size != size:
        raise DataError(f"{path} has {path.stat().st_size} bytes; {count} windows of {n_ctx} need {size}")
    return Base(path=path, n_ctx=n_ctx, n_vocab=n_vocab, windows=tokens.reshape(count, n_ctx).tolist())


def cut(path: Path, out: Path, windows: int) -> Base:
    """Write the first `windows` windows of a base file as a base file of their own, for machines that are slow.

    Appears by rename. Raises DataError when `path` is none, or has not as many.
    """
    whole = read_base(path)
    if not 0 < windows <= len(whole.windows):
        raise DataError(f"{path.name} has {len(whole.windows)} windows, so {windows} cannot be taken of it")
    aside = out.with_name(out.name + ".part")
    with aside.open("wb") as stream:
        stream.write(MAGIC + struct.pack("<iii", whole.n_ctx, whole.n_vocab, windows))
        for tokens in whole.windows[:windows]:
            stream.write(struct.pack(f"<{whole.n_ctx}i", *tokens))
        for number in range(windows):
            stream.write(whole.packed(number).tobytes())
        stream.flush()
        os.fsync(stream.fileno())
    aside.replace(out)
    return read_base(out)


def blocks(rows: int, columns: int) -> Iterator[slice]:
    """Slices of rows that hold about BLOCK numbers each."""
    step = max(1, BLOCK // max(1, columns))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def in_blocks(work: Callable[[slice], T], rows: int, columns: int) -> list[T]:
    """`work` for each block of an array, in order of the blocks; numpy's loops run on all processors meanwhile."""
    parts = list(blocks(rows, columns))
    if len(parts) == 1:
        return [work(parts[0])]
    return list(_pool().map(work, parts))


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(default_threads(), thread_name_prefix="edgeft-score")


def _width(n_vocab: int) -> int:
    return 2 * ((n_vocab + 1) // 2) + 4


def _pack(rows: NDArray[np.float32], block: slice) -> bytes:
    """Each row: float scale, float least log-probability, then a uint16 for every token, padded to an even count."""
    import numpy as np

    logits = rows[block]
    most = logits.max(-1, keepdims=True)
    least = np.maximum(logits.min(-1, keepdims=True), most - np.float32(16))
    total = np.log(np.exp(logits - most).sum(-1, keepdims=True, dtype=np.float64)).astype(np.float32)
    scale = (most - least) / np.float32(65535)
    inverse = np.divide(np.float32(1), scale, out=np.zeros_like(scale), where=scale > 0)
    n_rows, n_vocab = logits.shape
    packed: NDArray[Any] = np.zeros((n_rows, _width(n_vocab)), "<u2")
    packed[:, :4] = np.concatenate([scale, least - most - total], 1).astype("<f4").view("<u2")
    packed[:, 4 : 4 + n_vocab] = np.rint(inverse * np.maximum(logits - least, 0))
    return packed.tobytes()
