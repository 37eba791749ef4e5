"""Paired comparison of two models on the same tokens, with bounds that respect the windows they came in.

Errors of neighbouring tokens are correlated, so the bounds come from a bootstrap that resamples whole windows
(a block bootstrap), never single tokens. With few windows a percentile interval is too narrow; its level is widened
as T. Hesterberg proposes ("What Teachers Should Know About the Bootstrap", 2015, section 4.3: expanded percentile).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cache
from statistics import NormalDist
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from edgeft.llamacpp.score import Scores

    Array = NDArray[np.float64]

RESAMPLES = 2000
LEVEL = 0.95


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A model against its reference on the same counted tokens.

    `..._bound` is the one-sided 95 % bound on the bad side: of what the number might really be, with the windows seen,
    only 5 % is worse. `..._low` and `..._high` are the same on the good side.
    """

    tokens: int
    windows: int
    """Windows with at least one counted token: what the bootstrap draws from."""
    ppl_reference: float
    ppl: float
    ppl_ratio: float
    ppl_ratio_low: float
    ppl_ratio_bound: float
    kld: float
    """Mean KL divergence KL(reference || model) in nats per token."""
    kld_low: float
    kld_bound: float
    kld_median: float
    kld_p99: float
    kld_p999: float
    same_top: float
    """Share of tokens whose most probable next token is the same."""
    same_top_high: float
    same_top_bound: float
    rms_dp: float
    """Root mean square of the change of the true token's probability."""
    right_to_wrong: float
    """Share of tokens that the reference predicts right (most probable) and the model does not: half of the flips."""
    wrong_to_right: float
    mcnemar_p: float
    """Two-sided exact McNemar test on the flips: below 0.05 they lean to one side."""
    entropy_reference: float
    """Mean entropy of the next-token distribution, nats."""
    entropy: float

    @property
    def flips(self) -> float:
        """Share of tokens whose prediction turned from right to wrong or back (arXiv 2407.09141)."""
        return self.right_to_wrong + self.wrong_to_right

    def facts(self) -> dict[str, Any]:
        """All numbers by name, ready for JSON."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    @classmethod
    def of(cls, facts: Mapping[str, Any]) -> Self:
        """The comparison that `facts()` described."""
        return cls(**{f.name: facts[f.name] for f in fields(cls)})


def compare(scores: Scores, counted: NDArray[np.bool_], *, nll_reference: Array | None = None) -> Comparison:
    """Summarise per-token measurements over the tokens where `counted` [windows, scored] is true.

    `nll_reference` replaces the reference's own negative log-likelihoods, which a base file holds in 16 bits, by exact
    ones. Raises ValueError when nothing is counted or the shapes differ.
    """
    import numpy as np

    reference = scores.nll_base if nll_reference is None else nll_reference
    if not (reference.shape == scores.kld.shape == counted.shape) or not counted.any():
        raise ValueError(f"nothing to compare: shapes {reference.shape}, {scores.kld.shape}, {counted.shape}")
    difference = scores.nll - reference
    ratio = interval(difference, counted)
    kld = interval(scores.kld, counted)
    top = interval(scores.same_top.astype(np.float64), counted)
    klds = scores.kld[counted]
    dp = np.exp(-scores.nll[counted]) - np.exp(-reference[counted])
    lost = int((scores.right_base & ~scores.right)[counted].sum())
    won = int((~scores.right_base & scores.right)[counted].sum())
    return Comparison(
        tokens=int(counted.sum()),
        windows=int(counted.any(axis=1).sum()),
        ppl_reference=float(np.exp(reference[counted].mean())),
        ppl=float(np.exp(scores.nll[counted].mean())),
        ppl_ratio=math.exp(ratio.mean), ppl_ratio_low=math.exp(ratio.low), ppl_ratio_bound=math.exp(ratio.high),
        kld=kld.mean, kld_low=kld.low, kld_bound=kld.high,
        kld_median=float(np.median(klds)), kld_p99=float(np.quantile(klds, 0.99)),
        kld_p999=float(np.quantile(klds, 0.999)),
        same_top=top.mean, same_top_high=top.high, same_top_bound=top.low,
        rms_dp=float(np.sqrt((dp**2).mean())),
        right_to_wrong=lost / klds.size, wrong_to_right=won / klds.size, mcnemar_p=_mcnemar(lost, won),
        entropy_reference=float(scores.entropy_base[counted].mean()),
        entropy=float(scores.entropy[counted].mean()),
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Retention:
    """How much of what training gained on the answers is still there: (base - shipped) / (base - trained)."""

    loss_base: float
    loss_trained: float
    loss_shipped: float
    retention: float | None
    """None when training gained nothing that is clearly above zero: then the ratio means nothing."""
    retention_bound: float | None
    """One-sided 95 % lower bound."""
    retention_high: float | None
    """One-sided 95 % upper bound."""
    windows: int

    def facts(self) -> dict[str, Any]:
        """All numbers by name, ready for JSON."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    @classmethod
    def of(cls, facts: Mapping[str, Any]) -> Self:
        """The retention that `facts()` described."""
        return cls(**{f.name: facts[f.name] for f in fields(cls)})


def retention(base: Array, trained: Array, shipped: Array, counted: NDArray[np.bool_]) -> Retention:
    """Adaptation retention on the tokens where `counted` is true; all arrays are [windows, scored] in nats.

    Windows without such a token count for nothing. The three losses are resampled together.
    """
    import numpy as np

    if not counted.any():
        raise ValueError("no token is counted")
    lb, lt, ls = (float(x[counted].mean()) for x in (base, trained, shipped))
    gain = interval(base - trained, counted)
    kept: tuple[float | None, float | None, float | None] = (None, None, None)
    windows = int(counted.any(axis=1).sum())
    if gain.low > 0:
        b, t, s = (resampled(x, counted) for x in (base, trained, shipped))
        with np.errstate(divide="ignore", invalid="ignore"):
            ratios = (b - s) / (b - t)
        level = _level(windows)
        kept = (
            (lb - ls) / (lb - lt),
            float(np.quantile(ratios, 1 - level)),
            float(np.quantile(ratios, level)),
        )
    return Retention(
        loss_base=lb, loss_trained=lt, loss_shipped=ls, retention=kept[0], retention_bound=kept[1],
        retention_high=kept[2], windows=windows,
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A mean with its two one-sided 95 % bounds."""

    mean: float
    low: float
    high: float


def interval(values: Array, counted: NDArray[np.bool_]) -> Interval:
    """The mean of `values` over the counted tokens, with bounds from resampled windows."""
    import numpy as np

    means = resampled(values, counted)
    level = _level(int(counted.any(axis=1).sum()))
    return Interval(
        mean=float(values[counted].mean()),
        low=float(np.quantile(means, 1 - level)),
        high=float(np.quantile(means, level)),
    )


def resampled(values: Array, counted: NDArray[np.bool_]) -> Array:
    """Means of `values` [windows, scored] over `RESAMPLES` draws of windows with replacement; fixed seed."""
    import numpy as np

    used = counted.any(axis=1)
    sums = np.where(counted, values, 0.0)[used].sum(axis=1)
    counts = counted[used].sum(axis=1).astype(np.float64)
    picks = _picks(len(counts))
    means: Array = sums[picks].sum(axis=1) / counts[picks].sum(axis=1)
    return means


def more_windows(windows: int, estimate: float, bound: float, limit: float) -> int | None:
    """How many windows more would bring `bound` to `limit`, if the estimate stays: errors shrink with sqrt(n).

    None when it would take more than 10 000: the number is as close to the limit as can be measured.
    """
    width, room = abs(bound - estimate), abs(limit - estimate)
    if room == 0 or width / room > 100:
        return None
    needed = math.ceil(windows * (width / room) ** 2)
    return max(1, needed - windows) if needed <= 10_000 else None


@cache
def _level(windows: int) -> float:
    """The percentile to take for a one-sided bound at LEVEL: Phi(sqrt(n / (n - 1)) * t_{n-1}(LEVEL))."""
    from scipy.stats import t

    if windows < 2:
        return 1.0
    widened = math.sqrt(windows / (windows - 1)) * float(t.ppf(LEVEL, windows - 1))
    return NormalDist().cdf(widened)


def _picks(n: int) -> NDArray[np.int64]:
    import numpy as np

    return np.random.default_rng(20261121).integers(0, n, size=(RESAMPLES, n))


def _mcnemar(lost: int, won: int) -> float:
    """Exact two-sided McNemar test: under the null hypothesis each flip goes either way with 1/2."""
    from scipy.stats import binomtest

    return float(binomtest(lost, lost + won).pvalue) if lost + won else 1.0
