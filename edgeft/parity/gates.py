"""Limits on how far a shipped file may stray from the trained model, by tier or by number, and the verdict.

A verdict comes from a bound, never from a point estimate: PASS when the one-sided 95 % bound on the bad side is within
the limit, FAIL when the bound on the good side is beyond it, UNDECIDED when the limit lies between them.

The tiers follow published measurements: `near-lossless` is what Q6_K and Q5_K_M do to an 8B model, `parity` what Q4_K_M
does, `degraded` what Q3_K_M does (llama.cpp, tools/perplexity/README.md, Llama-3-8B on wikitext-2). Their shares of the
gain to be kept are a judgement.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, Self

from edgeft.parity.checks.check import Check
from edgeft.parity.statistics import Comparison, Retention, more_windows

Verdict = Literal["PASS", "FAIL", "UNDECIDED"]

TIERS = {
    "near-lossless": {"max_kld": 0.01, "max_ppl_ratio": 1.01, "min_same_top": 0.95, "min_retention": 0.95},
    "parity": {"max_kld": 0.05, "max_ppl_ratio": 1.04, "min_same_top": 0.90, "min_retention": 0.90},
    "degraded": {"max_kld": 0.12, "max_ppl_ratio": 1.10, "min_same_top": 0.85, "min_retention": 0.70},
}

ON_BOARD = "moved on the board"
"""The metric of a finding about a board: KL divergence there minus KL divergence here."""
ROOM = 2.0
"""How often a file's own kernel noise the KL divergence may move on another processor (docs/device-kernels.md)."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What the one-sided 95 % bounds must respect, on domain and on general text alike."""

    tier: str
    max_kld: float
    max_ppl_ratio: float
    min_same_top: float
    min_retention: float
    """On domain text only: general text gains nothing from training."""

    @classmethod
    def of(cls, tier: str, **numbers: float | None) -> Self:
        """The limits of a tier, each replaced by a number where one is given. Raises KeyError for no such tier."""
        return cls(tier=tier, **{**TIERS[tier], **{k: v for k, v in numbers.items() if v is not None}})

    @property
    def said(self) -> str:
        """The tier's name, and which of its numbers were replaced."""
        own = [
            f"{name} {getattr(self, name):g}"
            for name, number in TIERS.get(self.tier, {}).items()
            if getattr(self, name) != number
        ]
        return f"{self.tier} with {', '.join(own)}" if own else self.tier

    def facts(self) -> dict[str, Any]:
        """Ready for JSON."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One number held against its limit."""

    text: str
    """"domain" or "general"."""
    metric: str
    """"KL divergence", "perplexity ratio", "same top token", "gain kept" or ON_BOARD."""
    value: float
    bound: float
    """One-sided 95 %, on the bad side."""
    good: float
    """One-sided 95 %, on the good side."""
    limit: float
    verdict: Verdict
    more: int | None
    """UNDECIDED: how many more windows would decide, if the value stays; None: more than could be had."""
    said: str

    def facts(self) -> dict[str, Any]:
        """Ready for JSON."""
        return asdict(self)


def judge(
    comparisons: Mapping[str, Comparison], retention: Retention | None, limits: Limits
) -> list[Finding]:
    """Hold every number of every text against its limit. `comparisons` by text: "domain", "general"."""
    found = []
    for text, c in comparisons.items():
        found += [
            _finding(text, "KL divergence", c.kld, c.kld_bound, c.kld_low, limits.max_kld, c.windows, _nats),
            _finding(
                text, "perplexity ratio", c.ppl_ratio, c.ppl_ratio_bound, c.ppl_ratio_low, limits.max_ppl_ratio,
                c.windows, _ratio,
            ),
            _finding(
                text, "same top token", c.same_top, c.same_top_bound, c.same_top_high, limits.min_same_top, c.windows,
                _share,
            ),
        ]  # fmt: skip
    if retention and retention.retention is not None:
        assert retention.retention_bound is not None and retention.retention_high is not None
        found.append(
            _finding(
                "domain", "gain kept", retention.retention, retention.retention_bound, retention.retention_high,
                limits.min_retention, retention.windows, _share,
            )
        )  # fmt: skip
    return found


def on_board(
    text: str, moved: float, low: float, high: float, limit: float | None, windows: int, *, of: str
) -> Finding:
    """Hold the change of the KL divergence on a board, with its 95 % bounds, against a limit that holds either way.

    PASS when both bounds are within it (two one-sided tests), FAIL when both are beyond it on one side: a divergence
    that shrank as much means that another file was run. Without a limit nothing can be told. `of` is where it comes from.
    """
    bound, good = (high, low) if abs(high) >= abs(low) else (low, high)
    result: Verdict = "UNDECIDED"
    if limit is not None and abs(bound) <= limit:
        result = "PASS"
    elif limit is not None and (low > limit or high < -limit):
        result = "FAIL"
    more = None
    if result == "UNDECIDED" and limit is not None:
        edge = bound if abs(moved) <= limit else good
        more = more_windows(windows, moved, edge, math.copysign(limit, moved or edge))
    words = {"PASS": "is within", "FAIL": "is beyond", "UNDECIDED": "lies on both sides of"}[result]
    held = f"{words} {_nats(limit)}, {of}" if limit is not None else f"cannot be held against anything: {of}"
    said = f"{text} text: on the board the KL divergence moved by {moved:+.1e} (95 % bounds {low:+.1e} to {high:+.1e}), which {held}"
    return Finding(
        text=text, metric=ON_BOARD, value=moved, bound=bound, good=good, limit=limit or 0.0, verdict=result, more=more,
        said=said,
    )  # fmt: skip


def verdict(findings: Iterable[Finding], checks: Iterable[Check] = ()) -> Verdict:
    """FAIL if a check was answered with no or a number is surely beyond its limit, then UNDECIDED, then PASS."""
    said = {f.verdict for f in findings}
    if "FAIL" in said or any(c.ok is False for c in checks):
        return "FAIL"
    return "UNDECIDED" if "UNDECIDED" in said else "PASS"


def best_tier(comparisons: Mapping[str, Comparison], retention: Retention | None) -> str:
    """The strictest tier that the file surely passes, or an empty string."""
    return next((t for t in TIERS if verdict(judge(comparisons, retention, Limits.of(t))) == "PASS"), "")


def _finding(
    text: str, metric: str, value: float, bound: float, good: float, limit: float, windows: int, show: Any
) -> Finding:
    up = metric in ("KL divergence", "perplexity ratio")  # more is worse
    if bound <= limit if up else bound >= limit:
        result: Verdict = "PASS"
    elif good > limit if up else good < limit:
        result = "FAIL"
    else:
        result = "UNDECIDED"
    more = None
    if result == "UNDECIDED":
        more = more_windows(windows, value, bound if (value <= limit) == up else good, limit)
    words = {"PASS": "is within", "FAIL": "is beyond", "UNDECIDED": "lies on both sides of"}[result]
    said = (
        f"{text} text: {metric} {show(value)} (95 % bound {show(bound)}) {words} the limit of {show(limit)}"
    )
    return Finding(
        text=text, metric=metric, value=value, bound=bound, good=good, limit=limit, verdict=result, more=more, said=said
    )  # fmt: skip


def _nats(value: float) -> str:
    return f"{value:.4f}" if value >= 1e-3 else f"{value:.5f}" if value >= 1e-4 else f"{value:.1e}"


def _ratio(value: float) -> str:
    return f"{value:.4f}"


def _share(value: float) -> str:
    return f"{value:.1%}"
