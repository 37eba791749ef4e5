"""What a reference model says about a text: its log-probabilities as llama.cpp's base file, and its exact losses."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeft import progress
from edgeft.llamacpp import score
from edgeft.llamacpp.base_file import write_base
from edgeft.parity.speakers import Speaker
from edgeft.parity.suite import Text

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from edgeft.parity.statistics import Array


def write(speaker: Speaker, text: Text, out: Path, *, doing: str = "score the reference") -> Array:
    """Write what `speaker` says about `text` to the base file `out`, and return its exact losses [windows, scored].

    Only one window's logits are ever in memory. The stock `llama-perplexity --kl-divergence` reads the file.
    """
    import numpy as np

    found: list[Array] = []

    def scored() -> Iterator[NDArray[np.float32]]:
        for number, window in enumerate(text.ids):
            progress.report(f"{doing}: {text.name} text", number, len(text.ids), unit="windows")
            logits = speaker.logits(window)
            found.append(score.nll(logits, window[score.first_scored(text.n_ctx) + 1 :]))
            yield logits

    write_base(out, n_ctx=text.n_ctx, n_vocab=speaker.n_vocab, chunks=text.ids, logits=scored())
    return np.stack(found)


def losses(speaker: Speaker, text: Text, *, doing: str) -> Array:
    """The exact losses [windows, scored] of a model, nats per token."""
    import numpy as np

    found = []
    for number, window in enumerate(text.ids):
        progress.report(f"{doing}: {text.name} text", number, len(text.ids), unit="windows")
        found.append(score.nll(speaker.logits(window), window[score.first_scored(text.n_ctx) + 1 :]))
    return np.stack(found)


def bos(tokenizer: Any) -> int | None:
    """The id llama.cpp would put in front of a window, for tokenizers that add one."""
    encoded = tokenizer.encode("a")
    found: int | None = tokenizer.bos_token_id
    return found if found is not None and encoded[:1] == [found] else None
