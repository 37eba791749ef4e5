"""Paired comparison of two models on the same tokens, with bounds that respect the windows they came in.

Errors of neighbouring tokens are correlated, so the bounds come from a bootstrap that resamples whole windows
(a block bootstrap), never single tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Array = NDArray[np.float64]

RESAMPLES = 2000
LEVEL = 0.95


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A shipped file against its reference on the same scored tokens.

    Each `..._bound` is the one-sided 95 % bound on the bad side: of what the number might really be, with the windows
    seen, only 5 % is worse.
    """

    tokens: int
    windows: int
    ppl_reference: float
    ppl: float
    ppl_ratio: float
    ppl_ratio_bound: float
    kld: float
    """Mean KL divergence KL(reference || shipped) in nats per token."""
    kld_bound: float
    kld_median: float
    kld_p99: float
    same_top: float
    """Share of tokens whose most probable next token is the same."""
    same_top_bound: float
    rms_dp: float
    """Root mean square of the change of the true token's probability."""

    def facts(self) -> dict[str, Any]:
        """All numbers by name, ready for JSON."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}


def compare(nll_reference: Array, nll: Array, kld: Array, same_top: NDArray[np.bool_]) -> Comparison:
    """Summarise per-token measurements, all of shape [windows, scored tokens].

    `nll` are negative log-likelihoods of the true tokens in nats. Raises ValueError for empty or unequal arrays.
    """
    import numpy as np

    if nll.size == 0 or not (nll_reference.shape == nll.shape == kld.shape == same_top.shape):
        raise ValueError(f"nothing to compare: shapes {nll_reference.shape}, {nll.shape}, {kld.shape}")
    ratio = resampled_means(nll - nll_reference)
    klds = resampled_means(kld)
    tops = resampled_means(same_top.astype(np.float64))
    dp = np.exp(-nll) - np.exp(-nll_reference)
    return Comparison(
        tokens=nll.size,
        windows=nll.shape[0],
        ppl_reference=float(np.exp(nll_reference.mean())),
        ppl=float(np.exp(nll.mean())),
        ppl_ratio=float(np.exp((nll - nll_reference).mean())),
        ppl_ratio_bound=float(np.exp(np.quantile(ratio, LEVEL))),
        kld=float(kld.mean()),
        kld_bound=float(np.quantile(klds, LEVEL)),
        kld_median=float(np.median(kld)),
        kld_p99=float(np.quantile(kld, 0.99)),
        same_top=float(same_top.mean()),
        same_top_bound=float(np.quantile(tops, 1 - LEVEL)),
        rms_dp=float(np.sqrt((dp**2).mean())),
    )


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

    def facts(self) -> dict[str, Any]:
        """All numbers by name, ready for JSON."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}


def retention(base: Array, trained: Array, shipped: Array, answers: NDArray[np.bool_]) -> Retention:
    """Adaptation retention on the tokens where `answers` is true; all arrays are [windows, scored tokens] in nats.

    Windows without an answer token count for nothing. The three losses are resampled together.
    """
    import numpy as np

    used = answers.any(axis=1)
    weights = answers[used].astype(np.float64)
    sums = [(a[used] * weights).sum(axis=1) for a in (base, trained, shipped)]
    count = weights.sum(axis=1)
    if not len(count):
        return Retention(
            loss_base=0.0, loss_trained=0.0, loss_shipped=0.0, retention=None, retention_bound=None
        )
    picks = _picks(len(count))
    b, t, s = (x[picks].sum(axis=1) / count[picks].sum(axis=1) for x in sums)
    gain_is_clear = float(np.quantile(b - t, 1 - LEVEL)) > 0
    lb, lt, ls = (float(x.sum() / count.sum()) for x in sums)
    return Retention(
        loss_base=lb,
        loss_trained=lt,
        loss_shipped=ls,
        retention=(lb - ls) / (lb - lt) if gain_is_clear else None,
        retention_bound=float(np.quantile((b - s) / (b - t), 1 - LEVEL)) if gain_is_clear else None,
    )


def resampled_means(values: Array) -> Array:
    """Means of `values` [windows, tokens] over `RESAMPLES` draws of windows with replacement; fixed seed."""
    per_window = values.mean(axis=1)
    means: Array = per_window[_picks(len(per_window))].mean(axis=1)
    return means


def _picks(n: int) -> NDArray[np.int64]:
    import numpy as np

    return np.random.default_rng(20261121).integers(0, n, size=(RESAMPLES, n))
