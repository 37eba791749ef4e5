"""Which of two merges ships: the one into the original base, or the one into the base as training saw it (C-11).

Adding the adapter to the dequantized base gives the model that was trained. Adding it to the original weights gives one
that nobody trained, on a base that lost nothing to NF4; on most models it has the lower loss, on some it is broken, and
on a small one it is far from what was trained: KL divergence 0.13 on SmolLM2-135M. So both are measured.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Base = Literal["original", "dequantized"]


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A merge against the trained model, on the held-out answers."""

    loss: float
    """Mean negative log-likelihood, nats per token."""
    kld: float
    """Mean KL(trained || merged), nats per token."""
    kld_bound: float
    """Its one-sided 95 % upper bound."""
    ppl_ratio: float
    """Perplexity over the trained model's."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    base: Base
    reason: str
    """The rest of a sentence that begins with the base's name."""


def choose(
    original: Candidate, dequantized: Candidate, *, gap_low: float, gap_high: float, max_kld: float
) -> Choice:
    """The original base where it is still the trained model and clearly loses less, or is nearer; else the dequantized one.

    `gap_low` and `gap_high` are the one-sided 95 % bounds of loss(original) - loss(dequantized), paired per token: the
    difference is real when zero lies outside on that side. A merge whose KL divergence may be beyond `max_kld`, in nats, is
    another model than the trained one, however low its loss; a default gate would refuse what was made from it.
    """
    gap = abs(original.loss - dequantized.loss)
    if gap_low > 0:
        return Choice(
            base="dequantized",
            reason=f"its held-out loss is lower by {gap:.4f}, {gap_low:.4f} at the 95 % bound",
        )
    if original.kld_bound > max_kld >= dequantized.kld_bound:
        other = f"; the other one's loss is lower by {gap:.4f}, all the same" if gap_high < 0 else ""
        return Choice(
            base="dequantized",
            reason=f"the other one is not the trained model: its KL divergence may be over {max_kld:g}{other}",
        )
    if gap_high < 0:
        return Choice(
            base="original",
            reason=f"its held-out loss is lower by {gap:.4f}, {-gap_high:.4f} at the 95 % bound",
        )
    nearer: Base = "dequantized" if dequantized.kld < original.kld else "original"
    return Choice(
        base=nearer,
        reason=f"the losses do not clearly differ ({gap_low:+.4f} to {gap_high:+.4f}), and it is nearer to the trained model",
    )
