"""Limits on how far a shipped file may stray from the trained model, by tier or by number.

The tiers follow published measurements: `near-lossless` is what Q6_K and Q5_K_M do to an 8B model, `parity` what Q4_K_M
does, `degraded` what Q3_K_M does (llama.cpp, tools/perplexity/README.md, Llama-3-8B on wikitext-2).
"""

from __future__ import annotations

from dataclasses import dataclass

from edgeft.parity.statistics import Comparison

TIERS = {
    "near-lossless": {"max_kld": 0.01, "max_ppl_ratio": 1.01, "min_same_top": 0.95},
    "parity": {"max_kld": 0.05, "max_ppl_ratio": 1.04, "min_same_top": 0.90},
    "degraded": {"max_kld": 0.12, "max_ppl_ratio": 1.10, "min_same_top": 0.85},
}


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What the one-sided 95 % bounds must respect."""

    max_kld: float
    max_ppl_ratio: float
    min_same_top: float

    @classmethod
    def of(
        cls, tier: str, max_kld: float | None, max_ppl_ratio: float | None, min_same_top: float | None
    ) -> Limits:
        """The limits of a tier, each replaced by a number where one is given. Raises KeyError for no such tier."""
        named = TIERS[tier]
        return cls(
            max_kld=named["max_kld"] if max_kld is None else max_kld,
            max_ppl_ratio=named["max_ppl_ratio"] if max_ppl_ratio is None else max_ppl_ratio,
            min_same_top=named["min_same_top"] if min_same_top is None else min_same_top,
        )


def violations(comparison: Comparison, limits: Limits) -> list[str]:
    """Every limit that the bound does not respect, as a sentence; empty when the file passes."""
    found = []
    if comparison.kld_bound > limits.max_kld:
        found.append(
            f"KL divergence {comparison.kld:.4f} nats (95 % bound {comparison.kld_bound:.4f}) "
            f"is over the limit of {limits.max_kld:g}"
        )
    if comparison.ppl_ratio_bound > limits.max_ppl_ratio:
        found.append(
            f"perplexity ratio {comparison.ppl_ratio:.4f} (95 % bound {comparison.ppl_ratio_bound:.4f}) "
            f"is over the limit of {limits.max_ppl_ratio:g}"
        )
    if comparison.same_top_bound < limits.min_same_top:
        found.append(
            f"same top token {comparison.same_top:.1%} (95 % bound {comparison.same_top_bound:.1%}) "
            f"is under the limit of {limits.min_same_top:.1%}"
        )
    return found


def best_tier(comparison: Comparison) -> str:
    """The strictest tier that the file passes, or an empty string."""
    return next((t for t in TIERS if not violations(comparison, Limits.of(t, None, None, None))), "")
