"""Statistics on arrays whose answer is known."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from edgeft.parity import statistics
from tests.parity_checks.made_up import all_of, scores


def compared(**how):
    found = scores(**how)
    return statistics.compare(found, all_of(found))


def test_a_model_against_itself_has_ratio_one_and_no_divergence():
    found = scores(noise=0, kld=0, agree=1)
    same = statistics.compare(found, all_of(found))
    assert (same.ppl_ratio, same.ppl_ratio_bound, same.kld, same.kld_bound) == (1, 1, 0, 0)
    assert (same.same_top, same.same_top_bound, same.flips, same.rms_dp, same.mcnemar_p) == (1, 1, 0, 0, 1)


def test_a_known_shift_is_found_and_the_bound_is_on_the_bad_side():
    found = compared(shift=0.05)
    assert found.ppl_ratio == pytest.approx(np.exp(0.05), rel=0.01)
    assert found.ppl_ratio_low < found.ppl_ratio < found.ppl_ratio_bound
    assert found.kld_low < found.kld < found.kld_bound
    assert found.same_top_bound < found.same_top < found.same_top_high


@pytest.mark.parametrize("windows", [4, 8, 32])
def test_the_bound_covers_the_truth_in_about_95_of_100_draws_also_with_few_windows(windows):
    draws = [compared(windows=windows, tokens=8, noise=0, by_window=0.3, seed=s) for s in range(150)]
    covered = sum(d.ppl_ratio_bound >= 1 for d in draws) / len(draws)
    assert 0.90 <= covered <= 0.99


def test_windows_that_differ_widen_the_bound_more_than_tokens_that_differ():
    by_window, by_token = compared(noise=0, by_window=0.1), compared(noise=0.1)
    width = [d.ppl_ratio_bound - d.ppl_ratio for d in (by_window, by_token)]
    assert width[0] > 3 * width[1]


def test_only_counted_tokens_count():
    found = scores(shift=0.0, noise=0)
    counted = all_of(found)
    counted[:, ::2] = False
    off = replace(found, nll=np.where(counted, found.nll, found.nll + 5), kld=np.where(counted, 0.0, 9.0))
    result = statistics.compare(off, counted)
    assert result.ppl_ratio == pytest.approx(1) and result.kld == 0 and result.tokens == counted.sum()
    with pytest.raises(ValueError, match="nothing to compare"):
        statistics.compare(found, np.zeros_like(counted))


def test_windows_without_a_counted_token_are_not_drawn():
    found = scores(windows=6)
    counted = all_of(found)
    counted[3:] = False
    assert statistics.compare(found, counted).windows == 3


def test_flips_to_one_side_are_told_from_noise():
    found = scores(agree=1)
    lost = replace(
        found, top=np.where(found.right_base & (np.arange(64) % 8 == 0), found.target + 5, found.top)
    )
    one_sided = statistics.compare(lost, all_of(lost))
    assert one_sided.right_to_wrong > 0.03 and one_sided.wrong_to_right == 0 and one_sided.mcnemar_p < 1e-6
    assert one_sided.flips == one_sided.right_to_wrong


def test_exact_losses_replace_those_of_a_16_bit_file():
    found = scores(noise=0)
    rounded = replace(found, nll_base=found.nll_base + 0.01)
    assert statistics.compare(rounded, all_of(found)).ppl_ratio < 0.995
    exact = statistics.compare(rounded, all_of(found), nll_reference=found.nll)
    assert exact.ppl_ratio == pytest.approx(1)


def test_a_comparison_survives_json():
    found = compared()
    assert statistics.Comparison.of(found.facts()) == found


def test_retention_is_one_for_the_trained_model_zero_for_the_base_and_none_without_a_gain():
    trained = scores().nll_base
    base, counted = trained + 0.5, np.ones(trained.shape, bool)
    assert statistics.retention(base, trained, trained, counted).retention == pytest.approx(1)
    assert statistics.retention(base, trained, base, counted).retention == pytest.approx(0)
    half = statistics.retention(base, trained, trained + 0.25, counted)
    assert [half.retention, half.retention_bound, half.retention_high] == pytest.approx([0.5] * 3)
    assert statistics.retention(trained, trained, base, counted).retention is None
    assert statistics.Retention.of(half.facts()) == half


def test_errors_shrink_with_the_root_of_the_windows():
    assert statistics.more_windows(16, 0.04, 0.06, 0.05) == 48  # half the width: four times the windows
    assert statistics.more_windows(16, 0.05, 0.06, 0.05) is None
    assert statistics.more_windows(100, 0.04, 0.06, 0.0401) is None
