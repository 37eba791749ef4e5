"""The loss on held-out answers, the one number that says whether training helps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from edgeft.errors import StageError
from edgeft.training.model import takes_logits_to_keep
from edgeft.training.rows import Row, collator, token_losses


@dataclass(frozen=True, kw_only=True)
class Heldout:
    """What the held-out rows say of a model."""

    loss: float
    """Mean negative log-likelihood over all supervised tokens, in nats."""
    tokens: int
    end_of_turn_probability: float
    """Mean probability of the end-of-turn token where it is due."""


def measure(model: Any, rows: Sequence[Row], *, end_of_turn: int, batch_size: int) -> Heldout:
    """Score every supervised token of `rows` in eval mode, in float32; the mode is put back afterwards.

    Every token weighs the same, so the result does not depend on the batch size but for rounding.
    Raises StageError when the loss is not a number.
    """
    import torch

    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    collate = collator(answers_only=takes_logits_to_keep(base))
    by_length = sorted(rows, key=lambda row: len(row.ids))
    training = model.training
    model.eval()
    total, tokens, ends, probability = 0.0, 0, 0, 0.0
    with torch.no_grad():
        for start in range(0, len(by_length), batch_size):
            batch = collate(by_length[start : start + batch_size])
            labels = batch.pop("labels").to(model.device)
            logits = model(**{k: v.to(model.device) for k, v in batch.items()}).logits
            losses, wanted = token_losses(logits, labels)
            total += losses.double().sum().item()
            tokens += losses.numel()
            at_end = losses[wanted == end_of_turn]
            probability += at_end.neg().exp().double().sum().item()
            ends += at_end.numel()
    model.train(training)
    if not tokens or not math.isfinite(total):
        raise StageError(
            f"the held-out loss is not a number (sum {total} over {tokens} tokens)",
            hint='weights or activations overflow: try compute_dtype = "float32", or a lower learning_rate',
        )
    return Heldout(loss=total / tokens, tokens=tokens, end_of_turn_probability=probability / max(1, ends))
