"""Perplexity and KL divergence by llama.cpp's own conventions, token by token, for whatever model gives logits.

Conventions (tools/perplexity/perplexity.cpp): windows do not overlap and a short tail is dropped; where the
vocabulary asks for BOS, it replaces a window's first token; positions n_ctx/2 .. n_ctx-2 are scored, each for the
token after it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeft import progress
from edgeft.errors import DataError
from edgeft.llamacpp.base_file import Base, first_scored, in_blocks, read_base, write_base
from edgeft.llamacpp.decode import Decoder

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Logits = Callable[[Sequence[int]], NDArray[np.float32]]
    """From a window of tokens to the logits [n_ctx - 1 - n_ctx//2, n_vocab] of its scored positions."""

__all__ = [
    "Scores", "compare", "compare_logits", "first_scored", "log_softmax", "nll", "perplexity", "read_base", "scored_logits",
    "windows", "write_base",
]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Scores:
    """What one model says about each scored token beside a reference; all arrays are [windows, scored]."""

    nll_base: NDArray[np.float64]
    """Negative log-likelihood of the true token under the reference, nats."""
    nll: NDArray[np.float64]
    kld: NDArray[np.float64]
    """KL(reference ‖ this), nats."""
    target: NDArray[np.int64]
    """The true token."""
    top_base: NDArray[np.int64]
    """The token that the reference finds most probable."""
    top: NDArray[np.int64]
    entropy_base: NDArray[np.float64]
    """Of the next-token distribution, nats."""
    entropy: NDArray[np.float64]

    @property
    def same_top(self) -> NDArray[np.bool_]:
        """Both find the same token most probable."""
        result: NDArray[np.bool_] = self.top == self.top_base
        return result

    @property
    def right_base(self) -> NDArray[np.bool_]:
        """The reference finds the true token most probable."""
        result: NDArray[np.bool_] = self.top_base == self.target
        return result

    @property
    def right(self) -> NDArray[np.bool_]:
        """The model does."""
        result: NDArray[np.bool_] = self.top == self.target
        return result

    def first(self, windows: int) -> Scores:
        """The scores of the first windows only."""
        return Scores(**{name: getattr(self, name)[:windows] for name in self.__dataclass_fields__})

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

    def arrays(self, prefix: str = "") -> dict[str, Any]:
        """The arrays by name, for `numpy.savez`."""
        return {f"{prefix}{name}": getattr(self, name) for name in self.__dataclass_fields__}

    @classmethod
    def of(cls, arrays: Any, prefix: str = "") -> Scores:
        """What `arrays` wrote, from an opened .npz file or a dict."""
        return cls(**{name: arrays[f"{prefix}{name}"] for name in cls.__dataclass_fields__})


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


def scored_logits(decoder: Decoder, window: Sequence[int]) -> NDArray[np.float32]:
    """Logits [n_ctx - 1 - n_ctx//2, n_vocab] of a window's scored positions, BOS put in where the model wants it."""
    ids = list(window)
    if decoder.add_bos and decoder.bos is not None:
        ids[0] = decoder.bos
    return decoder.logits(ids, first=first_scored(len(ids)))[:-1]


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """Row-wise, float32, with the sum taken in float64 as llama.cpp does."""
    import numpy as np

    result: NDArray[np.float32] = logits - logits.max(-1, keepdims=True)
    total = np.exp(result).sum(-1, keepdims=True, dtype=np.float64)
    result -= np.log(total).astype(np.float32)
    return result


def nll(logits: NDArray[np.float32], targets: Sequence[int]) -> NDArray[np.float64]:
    """Negative log-likelihood [n] of each target under its row of logits [n, n_vocab]."""
    import numpy as np

    wanted = np.asarray(targets)

    def of(block: slice) -> NDArray[np.float64]:
        rows = log_softmax(logits[block])
        found: NDArray[np.float64] = -rows[np.arange(len(rows)), wanted[block]].astype(np.float64)
        return found

    return np.concatenate(in_blocks(of, *logits.shape))


def perplexity(decoder: Decoder, parts: Sequence[Sequence[int]]) -> NDArray[np.float64]:
    """Negative log-likelihoods of every scored token of the windows; exp of their mean is the perplexity."""
    import numpy as np

    found = []
    for number, window in enumerate(parts):
        progress.report("perplexity", number, len(parts), unit="windows")
        found.append(nll(scored_logits(decoder, window), window[first_scored(len(window)) + 1 :]))
    return np.concatenate(found)


def compare(base: Base | Path, logits: Logits | Decoder, *, doing: str = "KL divergence") -> Scores:
    """Score a model against a base file, as `llama-perplexity --kl-divergence` does: its 16-bit floor included.

    One window's logits are in memory at a time. Raises DataError when the vocabularies differ.
    """
    import numpy as np

    base = base if isinstance(base, Base) else read_base(base)
    speak: Logits = (lambda w: scored_logits(logits, w)) if isinstance(logits, Decoder) else logits
    found = []
    for number, window in enumerate(base.windows):
        progress.report(doing, number, len(base.windows), unit="windows")
        rows = speak(window)
        if rows.shape != (base.scored, base.n_vocab):
            raise DataError(
                f"{base.path} holds {base.scored} x {base.n_vocab} log-probabilities a window; this model gave "
                f"{' x '.join(map(str, rows.shape))}"
            )
        packed, targets = base.packed(number), np.asarray(window[first_scored(base.n_ctx) + 1 :])
        work = partial(_block, base, packed, rows, targets)
        parts = in_blocks(work, *rows.shape)
        found.append({name: np.concatenate([p[name] for p in parts]) for name in parts[0]})
    return Scores(**{name: np.stack([f[name] for f in found]) for name in found[0]})


def _block(
    base: Base, packed: NDArray[np.uint16], rows: NDArray[np.float32], targets: NDArray[Any], block: slice
) -> dict[str, Any]:
    return _scores(base.unpack(packed[block]), log_softmax(rows[block]), targets[block], floor=-16.0)


def compare_logits(base: NDArray[np.float32], other: NDArray[np.float32], targets: Sequence[int]) -> Scores:
    """Score `other` [n, n_vocab] against `base` at full precision, as one window."""
    import numpy as np

    found = _scores(log_softmax(base), log_softmax(other), np.asarray(targets))
    return Scores(**{name: values[None] for name, values in found.items()})


def _scores(
    a: NDArray[np.float32], b: NDArray[np.float32], targets: NDArray[Any], floor: float | None = None
) -> dict[str, Any]:
    """Per token, from log-probabilities; base ones at or below `floor` are left out of the KLD, as llama.cpp does."""
    import numpy as np

    rows = np.arange(len(targets))
    p = np.exp(a)
    if floor is not None:
        p *= a > floor  # ten times as fast as writing zeros through a mask, and the same bits
    entropy = -np.einsum("ij,ij->i", p, a, dtype=np.float64)
    q = np.exp(b)
    return {
        "nll_base": -a[rows, targets].astype(np.float64),
        "nll": -b[rows, targets].astype(np.float64),
        "kld": np.einsum("ij,ij->i", p, a - b, dtype=np.float64),
        "target": targets.astype(np.int64),
        "top_base": a.argmax(-1),
        "top": b.argmax(-1),
        "entropy_base": entropy,
        "entropy": -np.einsum("ij,ij->i", q, b, dtype=np.float64),
    }
