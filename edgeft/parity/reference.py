"""What the model said at the end of training: logits on held-out windows, in llama.cpp's own base-file format.

The windows follow llama.cpp's perplexity convention (non-overlapping, second half scored), on the chat-templated
held-out conversations joined end to end, so that the stock `llama-perplexity --kl-divergence` can read the same file.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeft import progress
from edgeft.errors import DataError
from edgeft.llamacpp import score

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Windows:
    """Token windows [n][n_ctx], and for each scored token whether it belongs to an answer [n, scored]."""

    n_ctx: int
    ids: list[list[int]]
    answers: NDArray[np.bool_]


def windows(
    rows: Sequence[tuple[Sequence[int], Sequence[int]]], n_ctx: int, limit: int, *, bos: int | None
) -> Windows:
    """Join (ids, labels) rows end to end and cut them into at most `limit` windows of `n_ctx` tokens.

    With `bos`, the first token of each window is replaced by it, as llama.cpp does for vocabularies that add one.
    A stream shorter than one window shortens the window. Raises DataError below 32 tokens.
    """
    import numpy as np

    ids = [i for row, _ in rows for i in row]
    labels = [i for _, row in rows for i in row]
    n_ctx = min(n_ctx, len(ids) // 2 * 2)
    if n_ctx < 32:
        raise DataError(
            f"the held-out split has {len(ids)} tokens; at least 32 are needed to compare models on them",
            hint="hold out more rows: [data] holdout",
        )
    count = min(limit, len(ids) // n_ctx)
    marked = np.array(labels[: count * n_ctx]).reshape(count, n_ctx) != -100
    first = n_ctx // 2
    # logits at position t predict token t+1: llama.cpp scores t = n_ctx/2 .. n_ctx-2
    return Windows(
        n_ctx=n_ctx, ids=score.windows(ids, n_ctx, bos=bos)[:count], answers=marked[:, first + 1 :]
    )


@dataclass(frozen=True, kw_only=True)
class Losses:
    """Negative log-likelihoods in nats, [windows, scored tokens], of the trained model and of its base."""

    trained: NDArray[np.float64]
    base: NDArray[np.float64]


def write(model: Any, cut: Windows, n_vocab: int, out: Path) -> Losses:
    """Run the trained model over the windows, write its log-probabilities to `out`, and measure the base beside it.

    `model` is a PEFT model whose adapter can be switched off. Only one window's logits are ever in memory.
    """
    import numpy as np

    trained: list[NDArray[np.float64]] = []
    base: list[NDArray[np.float64]] = []

    def scored() -> Iterator[NDArray[np.float32]]:
        for i, ids in enumerate(cut.ids):
            progress.report("score the trained model", i, len(cut.ids), unit="windows")
            with model.disable_adapter():
                base.append(_nll(_logits(model, ids), ids))
            logits = _logits(model, ids)
            trained.append(_nll(logits, ids))
            yield logits

    score.write_base(out, n_ctx=cut.n_ctx, n_vocab=n_vocab, chunks=cut.ids, logits=scored())
    return Losses(trained=np.stack(trained), base=np.stack(base))


def answer(model: Any, tokenizer: Any, ids: Sequence[int], max_tokens: int) -> str:
    """The greedy answer to a rendered prompt."""
    import torch

    device = next(model.parameters()).device
    prompt = torch.tensor([list(ids)], device=device)
    with torch.inference_mode():
        out = model.generate(
            input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=max_tokens, do_sample=False,
            temperature=None, top_p=None, top_k=None, pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
        )  # fmt: skip
    text: str = tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True)
    return text.strip()


def _logits(model: Any, ids: Sequence[int]) -> NDArray[np.float32]:
    """Logits of the scored positions, [scored, n_vocab] float32."""
    import numpy as np
    import torch

    device = next(model.parameters()).device
    first = len(ids) // 2
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([list(ids)], device=device)).logits[0, first : len(ids) - 1]
    return np.ascontiguousarray(logits.float().cpu().numpy())


def _nll(logits: NDArray[np.float32], ids: Sequence[int]) -> NDArray[np.float64]:
    import numpy as np
    import torch

    logp = torch.from_numpy(logits).double().log_softmax(-1).numpy()
    true = np.array(ids[len(ids) // 2 + 1 :])
    nll: NDArray[np.float64] = -logp[np.arange(len(true)), true]
    return nll
