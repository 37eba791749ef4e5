"""Per-token scores with known properties, for tests of what is made of them."""

from __future__ import annotations

import numpy as np

from edgeft.llamacpp.score import Scores


def scores(
    windows=24, tokens=64, *, shift=0.0, noise=0.1, by_window=0.0, kld=0.02, agree=0.93, seed=0
) -> Scores:
    """A reference with random losses, and a model whose losses differ by `shift` and noise by token and by window."""
    random = np.random.default_rng(seed)
    shape = (windows, tokens)
    nll = random.exponential(2.0, shape)
    other = (
        nll + shift + noise * random.standard_normal(shape) + by_window * random.standard_normal((windows, 1))
    )
    target = random.integers(0, 1000, shape)
    top_base = np.where(random.random(shape) < 0.5, target, target + 1)
    top = np.where(random.random(shape) < agree, top_base, target + 2)
    return Scores(
        nll_base=nll, nll=other, kld=kld * random.exponential(1.0, shape), target=target, top_base=top_base, top=top,
        entropy_base=np.full(shape, 2.0), entropy=np.full(shape, 2.1),
    )  # fmt: skip


def all_of(found: Scores):
    return np.ones(found.kld.shape, bool)
