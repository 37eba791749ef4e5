"""Verdicts from bounds: surely within, surely beyond, or not to be told yet."""

from __future__ import annotations

import numpy as np
import pytest

from edgeft.llamacpp.score import Scores
from edgeft.parity import gates, statistics
from edgeft.parity.checks.check import Check
from edgeft.parity.gates import Limits
from tests.parity_checks.made_up import all_of, scores

FINE = Check(step="gguf", name="token ids", codes=("C-26",), ok=True, said="equal")


def judged(limits=None, **how):
    found = scores(**how)
    return gates.judge(
        {"domain": statistics.compare(found, all_of(found))}, None, limits or Limits.of("parity")
    )


def test_a_file_surely_within_every_limit_passes():
    found = judged(kld=0.02)
    assert {f.verdict for f in found} == {"PASS"} and gates.verdict(found, [FINE]) == "PASS"


def test_a_number_surely_beyond_its_limit_fails_and_is_named_with_both():
    found = judged(kld=0.5)
    failed = [f for f in found if f.verdict == "FAIL"]
    assert [f.metric for f in failed] == ["KL divergence"] and gates.verdict(found) == "FAIL"
    assert (
        failed[0].said.startswith("domain text: KL divergence 0.") and "the limit of 0.0500" in failed[0].said
    )


def test_a_limit_between_the_bounds_is_undecided_and_says_how_many_windows_would_decide():
    value = next(f for f in judged(kld=0.02) if f.metric == "KL divergence").value
    found = judged(Limits.of("parity", max_kld=value * 1.005), kld=0.02)
    (open_,) = [f for f in found if f.verdict == "UNDECIDED"]
    assert gates.verdict(found) == "UNDECIDED" and open_.more and open_.more > 24
    on_the_line = judged(Limits.of("parity", max_kld=value), kld=0.02)
    assert next(f for f in on_the_line if f.verdict == "UNDECIDED").more is None


def test_the_number_of_windows_asked_for_does_decide():
    value = next(f for f in judged(kld=0.02) if f.metric == "KL divergence").value
    limit = Limits.of("parity", max_kld=value * 1.02)
    (open_,) = [f for f in judged(limit, kld=0.02) if f.verdict == "UNDECIDED"]
    times = -(-(24 + open_.more) // 24)
    found = scores(kld=0.02)
    more = Scores(**{k: np.tile(v, (times, 1)) for k, v in found.arrays().items()})  # the value stays
    assert statistics.compare(more, all_of(more)).kld_bound <= limit.max_kld
    assert times > 1


def test_a_failed_check_fails_whatever_the_numbers_say():
    wrong = Check(step="gguf", name="token ids", codes=("C-26",), ok=False, said="differ")
    unasked = Check(step="served", name="template", codes=(), ok=None, said="no server here")
    assert gates.verdict(judged(), [FINE, wrong]) == "FAIL"
    assert gates.verdict(judged(), [FINE, unasked]) == "PASS"


@pytest.mark.parametrize(("kept", "verdict"), [(1.0, "PASS"), (0.5, "FAIL")])
def test_the_gain_must_be_kept(kept, verdict):
    found = scores(noise=0.0)
    base = found.nll_base + 1.0
    shipped = base - kept
    retention = statistics.retention(base, found.nll_base, shipped, all_of(found))
    (finding,) = gates.judge({}, retention, Limits.of("parity"))
    assert finding.metric == "gain kept" and finding.verdict == verdict


def test_without_a_gain_there_is_nothing_to_keep():
    found = scores()
    retention = statistics.retention(found.nll_base, found.nll_base, found.nll, all_of(found))
    assert gates.judge({}, retention, Limits.of("parity")) == []


def test_numbers_replace_a_tiers_own_and_tiers_are_ordered():
    limits = Limits.of("parity", max_kld=0.3, min_same_top=None)
    assert (limits.max_kld, limits.min_same_top) == (0.3, 0.90)
    assert limits.said == "parity with max_kld 0.3" and Limits.of("degraded").said == "degraded"
    kld = [t["max_kld"] for t in gates.TIERS.values()]
    assert kld == sorted(kld)
    strict = scores(kld=0.001, noise=0.001, agree=0.99)
    loose = scores(kld=0.08, noise=0.1, agree=0.93)
    tier = [gates.best_tier({"domain": statistics.compare(s, all_of(s))}, None) for s in (strict, loose)]
    assert tier == ["near-lossless", "degraded"]
