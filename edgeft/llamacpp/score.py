"""Perplexity and KL divergence by llama.cpp's own conventions, and its file of base log-probabilities.

Conventions (tools/perplexity/perplexity.cpp): windows do not overlap and a short tail is dropped; where the
vocabulary asks for BOS, it replaces a window's first token; positions n_ctx/2 .. n_ctx-2 are scored, each for the
token after it. The base file holds 16-bit log-probabilities cut off 16 below the largest logit, so its numbers
differ from exact ones in the third digit (PPL) and have a floor (KLD): do not mix the two in one table.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeft import progress
from edgeft.errors import DataError
from edgeft.llamacpp.decode import Decoder

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_MAGIC = b"_logits_"


@dataclass(frozen=True, kw_only=True)
class Scores:
    """One value for each scored token, window after window; float64, nats, and bool for `same_top`."""

    nll_base: NDArray[np.float64]
    nll: NDArray[np.float64]
    kld: NDArray[np.float64]
    """KL(base ‖ other)."""
    same_top: NDArray[np.bool_]
    window: NDArray[np.int64]
    """The window each token belongs to: errors are correlated inside one."""

    def summary(self) -> dict[str, float]:
        """Mean KLD, its 99th percentile and maximum, both perplexities, their ratio, share of equal top tokens."""
        import numpy as np

        return {
            "ppl_base": float(np.exp(self.nll_base.mean())),
            "ppl": float(np.exp(self.nll.mean())),
            "ppl_ratio": float(np.exp((self.nll - self.nll_base).mean())),
            "kld_mean": float(self.kld.mean()),
            "kld_p99": float(np.quantile(self.kld, 0.99)),
            "kld_max": float(self.kld.max()),
            "same_top": float(self.same_top.mean()),
        }


def windows(ids: Sequence[int], n_ctx: int, *, bos: int | None = None, at_most: int = 0) -> list[list[int]]:
    """Cut a token stream into windows of n_ctx; the tail is dropped.

    `bos`, for a vocabulary that adds one, replaces each window's first token. Raises DataError for less than one
    window.
    """
    count = len(ids) // n_ctx
    if not count:
        raise DataError(f"{len(ids)} tokens do not fill one window of {n_ctx}")
    count = min(count, at_most) if at_most else count
    cut = [list(ids[i * n_ctx : (i + 1) * n_ctx]) for i in range(count)]
    return cut if bos is None else [[bos, *window[1:]] for window in cut]


def first_scored(n_ctx: int) -> int:
    """The position of the first scored logits: half of the window is context."""
    return n_ctx // 2


def scored_logits(decoder: Decoder, window: Sequence[int]) -> NDArray[np.float32]:
    """Logits [n_ctx - 1 - n_ctx//2, n_vocab] of a window's scored positions, BOS put in where the model wants it."""
    ids = list(window)
    if decoder.add_bos and decoder.bos is not None:
        ids[0] = decoder.bos
    return decoder.logits(ids, first=first_scored(len(ids)))[:-1]


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """Row-wise, float32, with the sum taken in float64 as llama.cpp does."""
    import numpy as np

    shifted = logits - logits.max(-1, keepdims=True)
    total = np.exp(shifted).sum(-1, keepdims=True, dtype=np.float64)
    result: NDArray[np.float32] = shifted - np.log(total).astype(np.float32)
    return result


def nll(logits: NDArray[np.float32], targets: Sequence[int]) -> NDArray[np.float64]:
    """Negative log-likelihood [n] of each target under its row of logits [n, n_vocab]."""
    import numpy as np

    rows = log_softmax(logits)
    result: NDArray[np.float64] = -rows[np.arange(len(rows)), np.asarray(targets)].astype(np.float64)
    return result


def perplexity(decoder: Decoder, parts: Sequence[Sequence[int]]) -> NDArray[np.float64]:
    """Negative log-likelihoods of every scored token of the windows; exp of their mean is the perplexity."""
    import numpy as np

    found = []
    for number, window in enumerate(parts):
        progress.report("perplexity", number, len(parts), unit="windows")
        found.append(nll(scored_logits(decoder, window), window[first_scored(len(window)) + 1 :]))
    return np.concatenate(found)


def compare_logits(
    base: NDArray[np.float32], other: NDArray[np.float32], targets: Sequence[int], window: int = 0
) -> Scores:
    """Scores of two models' logits [n, n_vocab] at the same positions, at full precision."""
    import numpy as np

    a, b = log_softmax(base), log_softmax(other)
    return _scores(a, b, np.asarray(targets), window)


def joined(parts: Sequence[Scores]) -> Scores:
    """The scores of several windows as one."""
    import numpy as np

    return Scores(
        nll_base=np.concatenate([part.nll_base for part in parts]),
        nll=np.concatenate([part.nll for part in parts]),
        kld=np.concatenate([part.kld for part in parts]),
        same_top=np.concatenate([part.same_top for part in parts]),
        window=np.concatenate([part.window for part in parts]),
    )


def write_base(
    path: Path,
    *,
    n_ctx: int,
    n_vocab: int,
    chunks: Sequence[Sequence[int]],
    logits: Iterable[NDArray[np.float32]],
) -> None:
    """Write the file that `llama-perplexity --kl-divergence-base` reads, one window in memory at a time.

    `logits` yields, window by window, what `scored_logits` gives, from whatever model: a torch model's logits make
    the stock tool compare a GGUF with the model as it was trained. Appears by rename.
    Raises DataError when windows differ in length or logits in shape.
    """
    import numpy as np

    if other := {len(chunk) for chunk in chunks} - {n_ctx}:
        raise DataError(f"all windows of a base file have {n_ctx} tokens, not {min(other)}")
    expected = (n_ctx - 1 - first_scored(n_ctx), n_vocab)
    aside = path.with_name(path.name + ".part")
    written = 0
    with aside.open("wb") as stream:
        stream.write(_MAGIC + struct.pack("<iii", n_ctx, n_vocab, len(chunks)))
        stream.write(np.asarray(chunks, "<i4").tobytes())
        for rows in logits:
            if rows.shape != expected:
                raise DataError(f"logits of window {written} have the shape {rows.shape}, not {expected}")
            stream.write(_pack(rows))
            written += 1
        stream.flush()
        os.fsync(stream.fileno())
    if written != len(chunks):
        raise DataError(f"{written} windows of logits came for {len(chunks)} windows of tokens")
    aside.replace(path)


@dataclass(frozen=True, kw_only=True)
class Base:
    """A base file's header; its rows are read window by window."""

    path: Path
    n_ctx: int
    n_vocab: int
    windows: list[list[int]]

    def log_probabilities(self) -> Iterator[NDArray[np.float32]]:
        """Log-probabilities [n_ctx - 1 - n_ctx//2, n_vocab] of each window in turn."""
        import numpy as np

        rows = self.n_ctx - 1 - first_scored(self.n_ctx)
        width = 2 * ((self.n_vocab + 1) // 2) + 4
        with self.path.open("rb") as stream:
            stream.seek(len(_MAGIC) + 12 + 4 * self.n_ctx * len(self.windows))
            for _ in self.windows:
                packed = np.frombuffer(stream.read(2 * rows * width), "<u2").reshape(rows, width)
                scale, least = packed[:, :4].copy().view("<f4").T
                steps = packed[:, 4 : 4 + self.n_vocab].astype(np.float32)
                yield scale[:, None] * steps + least[:, None]


def read_base(path: Path) -> Base:
    """Open a base file. Raises DataError when it is none, or is cut off."""
    import numpy as np

    with path.open("rb") as stream:
        if stream.read(len(_MAGIC)) != _MAGIC:
            raise DataError(f"{path} holds no log-probabilities of llama-perplexity")
        n_ctx, n_vocab, count = struct.unpack("<iii", stream.read(12))
        tokens = np.frombuffer(stream.read(4 * n_ctx * count), "<i4")
    rows = count * (n_ctx - 1 - first_scored(n_ctx))
    size = len(_MAGIC) + 12 + 4 * n_ctx * count + 2 * rows * (2 * ((n_vocab + 1) // 2) + 4)
    if path.stat().st_size != size:
        raise DataError(f"{path} has {path.stat().st_size} bytes; {count} windows of {n_ctx} need {size}")
    return Base(path=path, n_ctx=n_ctx, n_vocab=n_vocab, windows=tokens.reshape(count, n_ctx).tolist())


def compare(base: Base | Path, decoder: Decoder) -> Scores:
    """Score a GGUF against a base file, as `llama-perplexity --kl-divergence` does: its 16-bit floor included."""
    import numpy as np

    base = base if isinstance(base, Base) else read_base(base)
    if decoder.n_vocab != base.n_vocab:
        raise DataError(f"{base.path} is for {base.n_vocab} tokens, {decoder.path} has {decoder.n_vocab}")
    parts = []
    for number, (window, rows) in enumerate(zip(base.windows, base.log_probabilities(), strict=True)):
        progress.report("KL divergence", number, len(base.windows), unit="windows")
        targets = np.asarray(window[first_scored(base.n_ctx) + 1 :])
        other = log_softmax(scored_logits(decoder, window))
        parts.append(_scores(rows, other, targets, number, floor=-16.0))
    return joined(parts)


def _scores(
    a: NDArray[np.float32],
    b: NDArray[np.float32],
    targets: NDArray[Any],
    window: int,
    floor: float | None = None,
) -> Scores:
    """From log-probabilities; base probabilities at or below `floor` are left out of the KLD, as llama.cpp does."""
    import numpy as np

    rows = np.arange(len(targets))
    terms = np.exp(a) * (a - b)
    if floor is not None:
        terms[a <= floor] = 0
    return Scores(
        nll_base=-a[rows, targets].astype(np.float64),
        nll=-b[rows, targets].astype(np.float64),
        kld=terms.sum(-1, dtype=np.float64),
        same_top=a.argmax(-1) == b.argmax(-1),
        window=np.full(len(targets), window, np.int64),
    )


def _pack(logits: NDArray[np.float32]) -> bytes:
    """Each row: float scale, float least log-probability, then a uint16 for every token, padded to an even count."""
    import numpy as np

    most = logits.max(-1, keepdims=True)
    least = np.maximum(logits.min(-1, keepdims=True), most - np.float32(16))
    total = np.log(np.exp(logits - most).sum(-1, keepdims=True, dtype=np.float64)).astype(np.float32)
    scale = (most - least) / np.float32(65535)
    inverse = np.divide(np.float32(1), scale, out=np.zeros_like(scale), where=scale > 0)
    n_rows, n_vocab = logits.shape
    packed = np.zeros((n_rows, 2 * ((n_vocab + 1) // 2) + 4), "<u2")
    packed[:, :4] = np.concatenate([scale, least - most - total], 1).astype("<f4").view("<u2")
    packed[:, 4 : 4 + n_vocab] = np.rint(inverse * np.maximum(logits - least, 0))
    return packed.tobytes()
