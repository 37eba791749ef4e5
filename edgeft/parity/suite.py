"""The texts that models are compared on, as token windows, with the tokens that count.

Domain text is the held-out split, chat-templated and joined end to end; only the answers count. General text is plain
text on which drift outside the domain shows; all of it counts. Both follow llama.cpp's perplexity convention, so that
the stock `llama-perplexity` can score the same windows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeft.errors import DataError
from edgeft.llamacpp import score

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

GENERAL = Path(__file__).with_name("general.txt")
"""English prose, code, tables, sums and a little of other languages, written for this purpose; CC0-1.0."""

FEW = 8
"""A bootstrap over fewer windows says little: a short text is cut into shorter windows instead."""


@dataclass(frozen=True, kw_only=True)
class Text:
    """Windows of one text."""

    name: str
    """"domain" or "general"."""
    n_ctx: int
    ids: list[list[int]]
    counted: NDArray[np.bool_]
    """[windows, n_ctx - 1 - n_ctx//2]: which scored tokens the numbers are about."""

    @property
    def sha256(self) -> str:
        """Of the token ids: two certificates with the same one were measured on the same windows."""
        import numpy as np

        return hashlib.sha256(np.asarray(self.ids, "<i4").tobytes()).hexdigest()

    def facts(self) -> dict[str, Any]:
        """What it is, for the certificate."""
        return {"name": self.name, "windows": len(self.ids), "n_ctx": self.n_ctx, "scored": int(self.counted.size),
                "counted": int(self.counted.sum()), "sha256": self.sha256}  # fmt: skip

    def arrays(self) -> dict[str, Any]:
        """For `numpy.savez`."""
        import numpy as np

        return {"ids": np.asarray(self.ids, np.int32), "counted": self.counted}

    @classmethod
    def of(cls, name: str, arrays: Any) -> Text:
        """What `arrays` wrote."""
        ids = arrays["ids"]
        return cls(name=name, n_ctx=int(ids.shape[1]), ids=ids.tolist(), counted=arrays["counted"])


def domain(
    rows: Sequence[tuple[Sequence[int], Sequence[int]]], n_ctx: int, limit: int, *, bos: int | None
) -> Text:
    """Join (ids, labels) rows end to end and cut them into at most `limit` windows of `n_ctx` tokens.

    What has a label counts. With `bos`, the first token of each window is replaced by it, as llama.cpp does for
    vocabularies that add one. A short stream shortens the windows, down to 32 tokens. Raises DataError below that, or
    when no window holds an answer.
    """
    ids = [i for row, _ in rows for i in row]
    labels = [i for _, row in rows for i in row]
    text = _cut("domain", ids, [label != -100 for label in labels], n_ctx, limit, bos)
    if not text.counted.any():
        raise DataError(f"none of the {len(text.ids)} held-out windows holds a token of an answer")
    return text


def plain(tokens: Sequence[int], n_ctx: int, limit: int, *, bos: int | None, name: str = "general") -> Text:
    """Windows of a plain text's tokens; every scored token counts. Raises DataError as `domain` does."""
    return _cut(name, tokens, [True] * len(tokens), n_ctx, limit, bos)


def _cut(
    name: str, ids: Sequence[int], marked: Sequence[bool], n_ctx: int, limit: int, bos: int | None
) -> Text:
    import numpy as np

    if len(ids) < 32:
        raise DataError(
            f"the {name} text has {len(ids)} tokens; at least 32 are needed to compare models on it",
            hint="hold out more rows: [data] holdout" if name == "domain" else "",
        )
    n_ctx = min(n_ctx, max(32, len(ids) // min(FEW, limit) // 2 * 2))
    count = min(limit, len(ids) // n_ctx)
    counted = np.array(marked[: count * n_ctx], bool).reshape(count, n_ctx)
    # logits at position t predict token t+1: llama.cpp scores t = n_ctx/2 .. n_ctx-2
    return Text(
        name=name, n_ctx=n_ctx, ids=score.windows(ids, n_ctx, bos=bos)[:count],
        counted=counted[:, score.first_scored(n_ctx) + 1 :],
    )  # fmt: skip
