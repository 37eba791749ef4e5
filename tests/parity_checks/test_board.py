"""A board's log: whose base file it is of, how far the file moved on the board, and whether that is more than kernels do."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from edgeft.errors import DataError
from edgeft.parity import board, evidence, gates
from edgeft.parity.board import Log
from edgeft.parity.evidence import Reference
from edgeft.parity.suite import Text
from tests.parity_checks import sample
from tests.parity_checks.made_up import all_of, scores

FLOOR = 3e-3
KERNELS = "CPU : NEON = 1 | ARM_FMA = 1 | FP16_VA = 1 | DOTPROD = 1"


def log(found, *, n_ctx=129, kernels=KERNELS, types=None):
    """What llama-perplexity prints of a file with these scores."""
    count = np.arange(1, len(found.kld) + 1)
    base, own, kld, top = (
        x.mean(axis=1).cumsum() / count for x in (found.nll_base, found.nll, found.kld, found.same_top)
    )
    table = "\n".join(
        f"{i:4d}    {np.exp(own[i - 1]):9.4f} ±    0.3898    {own[i - 1] - base[i - 1]:10.5f} ±    0.00449    "
        f"{kld[i - 1]:10.5f} ±    0.00033     1.236 ±  0.288 %    {100 * top[i - 1]:6.3f} ±  0.677 %"
        for i in count
    )
    loader = "".join(
        f"I llama_model_loader: - type {t.lower()}:  {n} tensors\n" for t, n in (types or {}).items()
    )
    return f"""{loader}I system_info: n_threads = 4 (n_threads_batch = 4) / 4 | {kernels} |
I kl_divergence: computing over {len(count)} chunks, n_ctx={n_ctx}, batch_size={n_ctx}, n_seq=1
I kl_divergence: 0.80 seconds per pass - ETA 0.12 minutes

chunk             PPL               ln(PPL(Q)/PPL(base))          KL Divergence              Δp RMS            Same top p
{table}

====== Perplexity statistics ======
Mean PPL(Q)                   : {np.exp(own[-1]):10.6f} ±   0.136402
Mean PPL(base)                : {np.exp(base[-1]):10.6f} ±   0.136473
Mean ln(PPL(Q)/PPL(base))     : {own[-1] - base[-1]:10.6f} ±   0.001685
Mean PPL(Q)/PPL(base)         : {np.exp(own[-1] - base[-1]):10.6f} ±   0.001685

====== KL divergence statistics ======
Mean    KLD: {kld[-1]:10.6f} ±   0.000190
Maximum KLD:   0.271880
99.9%   KLD:   0.094813
99.0%   KLD:   0.028183
Median  KLD:   0.000339

====== Token probability statistics ======
RMS Δp    :  1.666 ± 0.135 %
Same top p: {100 * top[-1]:6.3f} ± 0.302 %
"""


@pytest.fixture
def here():
    return {"domain": scores(), "general": scores(seed=7)}


@pytest.fixture
def reference(here):
    texts = {
        name: Text(name=name, n_ctx=129, ids=[[0] * 129] * len(s.kld), counted=all_of(s))
        for name, s in here.items()
    }
    return Reference(texts=texts, nll={name: s.nll_base for name, s in here.items()}, base=None)


@pytest.fixture
def file():
    """Passes, with a measured floor."""
    found = next(f for f in sample.certificate().files if f.title == "Q8_0")
    return replace(found, floor={**found.floor, "largest": FLOOR})


def moved(found, by, *, noise=3e-3, seed=3):
    """The same file under other kernels."""
    random = np.random.default_rng(seed)
    shift = by + noise * random.standard_normal(found.kld.shape)
    return replace(found, kld=found.kld + shift, nll=found.nll + shift)


def held(file, reference, here, *logs):
    return board.held(file, reference, here, [Log(name=f"{i}.log", text=text) for i, text in enumerate(logs)])


def test_a_board_whose_kernels_round_otherwise_passes_and_is_the_last_step(file, reference, here):
    found = held(file, reference, here, log(moved(here["domain"], 1e-3), types=file.types))
    assert found.verdict == "PASS" and found.culprit == "" and found.tier == file.tier
    (s,) = found.served
    assert s.moved == pytest.approx(1e-3, abs=3e-4) and s.moved_low < 1e-3 < s.moved_high
    assert s.limit == pytest.approx(2 * FLOOR) and s.kld - s.kld_here == pytest.approx(s.moved, abs=1e-9)
    assert s.cost == pytest.approx(1e-3, abs=3e-4)
    last, before = found.steps[-1], file.steps[-1]
    assert last.step == "served" and last.kld_added == s.moved
    assert last.kld == pytest.approx(before.kld + s.moved) and last.loss == pytest.approx(
        before.loss + s.cost
    )
    assert found.checks[-1].ok and found.checks[-1].step == "served"


@pytest.mark.parametrize("by", [0.02, -0.015])
def test_more_than_twice_the_noise_fails_at_the_board_either_way(file, reference, here, by):
    found = held(file, reference, here, log(moved(here["domain"], by)))
    assert (found.verdict, found.culprit, found.tier) == ("FAIL", "served", "")
    assert (
        "on the board the KL divergence moved by" in found.because[0]
        and "2 times the 3.0e-03" in found.because[0]
    )


def test_a_change_at_the_limit_is_undecided_and_says_how_much_more_would_decide(file, reference, here):
    noisy = moved(here["domain"], 2 * FLOOR * 0.97, noise=0.02)
    found = held(file, reference, here, log(noisy))
    assert found.verdict == "UNDECIDED" and found.culprit == "served" and found.more_windows


def test_a_log_says_itself_of_which_text_it_is(file, reference, here):
    found = held(file, reference, here, *(log(here[name]) for name in ("general", "domain")))
    assert [(s.text, s.log) for s in found.served] == [("domain", "1.log"), ("general", "0.log")]
    assert all(abs(s.moved) < 1e-6 for s in found.served)


def test_bounds_come_from_windows_of_the_table_not_from_tokens(file, reference, here):
    """Windows that move together in one direction or the other leave the mean unsure, whatever the tokens do."""
    by_window = np.where(np.arange(24) % 2, 0.03, -0.03)[:, None]
    found = held(file, reference, here, log(replace(here["domain"], kld=here["domain"].kld + by_window)))
    (s,) = found.served
    assert abs(s.moved) < 1e-4 and s.moved_high - s.moved_low > 0.015 and found.verdict == "UNDECIDED"


@pytest.mark.parametrize(
    ("other", "n_ctx"), [(scores(seed=5), 129), (scores(windows=23), 129), (scores(), 512)]
)
def test_a_log_of_another_base_file_is_refused(file, reference, here, other, n_ctx):
    with pytest.raises(DataError, match=r"0\.log is of another base file: 2[34] windows of (129|512)"):
        held(file, reference, here, log(other, n_ctx=n_ctx))


def test_one_window_of_another_base_file_is_seen(file, reference, here):
    """Though the means over all windows are the same."""
    swapped = scores()
    swapped.nll_base[[3, 4]], swapped.nll[[3, 4]] = swapped.nll_base[[4, 3]], swapped.nll[[4, 3]]
    with pytest.raises(DataError, match="another base file"):
        held(file, reference, here, log(swapped))


def test_a_table_with_a_line_missing_is_refused(file, reference, here):
    text = log(here["domain"])
    cut = "\n".join(line for line in text.splitlines() if not line.startswith("  17 "))
    with pytest.raises(DataError, match="its table has 23 of 24 windows"):
        held(file, reference, here, cut)


def test_two_logs_of_one_text_are_refused(file, reference, here):
    with pytest.raises(DataError, match=r"0\.log and 1\.log are both of the domain text"):
        held(file, reference, here, log(here["domain"]), log(here["domain"]))


def test_a_board_that_ran_a_file_of_other_types_is_a_failed_check(file, reference, here):
    found = held(file, reference, here, log(here["domain"], types={"Q2_K": 211, "F32": 61}))
    assert (found.verdict, found.culprit) == ("FAIL", "served")
    assert "of another file, with the tensors F32 x 61, Q2_K x 211" in found.because[0]
    assert held(file, reference, here, log(here["domain"])).checks[-1].ok is None


def test_a_fault_that_was_there_before_the_board_keeps_its_step(reference, here):
    broken = next(f for f in sample.certificate().files if f.title == "Q2_K")
    found = held(broken, reference, here, log(here["domain"]))
    assert (found.verdict, found.culprit) == ("FAIL", broken.culprit)


@pytest.mark.parametrize(
    ("floor", "types", "kernels", "limit"),
    [
        (4e-3, {"Q4_K", "F32"}, KERNELS, 8e-3),
        (4e-3, {"Q4_K", "F16"}, "CPU : AVX = 1", 8e-3),
        (2e-7, {"Q8_0", "F32"}, KERNELS, 1e-4),
        (0.0, {"Q8_0", "F32"}, KERNELS, None),
        (3e-6, {"F16", "F32"}, KERNELS, 1e-3),
        (3e-6, {"F16", "F32"}, "CPU : NEON = 1 | FP16_VA = 0", 1e-4),
        (2e-3, {"BF16", "F32"}, "CPU : AVX512_BF16 = 1", 4e-3),
    ],
)
def test_the_limit_is_twice_the_floor_and_absolute_where_nothing_is_quantized(floor, types, kernels, limit):
    assert board.allowed(floor, types, kernels)[0] == (limit and pytest.approx(limit))


def test_where_no_noise_can_be_seen_here_nothing_is_decided(file, reference, here):
    silent = replace(file, floor={**file.floor, "largest": 0.0})
    found = held(silent, reference, here, log(here["domain"]))
    assert found.verdict == "UNDECIDED" and found.served[0].limit is None and found.more_windows is None
    assert "says nothing of others" in found.because[0]
    with pytest.raises(DataError, match="was not measured"):
        held(replace(file, floor=None), reference, here, log(here["domain"]))


def test_kernels_of_this_machine_are_no_board(file, reference, here):
    (own,) = {file.floor["kernels"]}
    found = held(file, reference, here, log(here["domain"], kernels=own))
    assert any("it may not be a board's" in note for note in found.notes)


def test_without_logs_nothing_changes(file, reference, here):
    assert board.held(file, reference, here, []) is file


def test_the_same_from_what_a_build_left_behind(file, reference, here, tmp_path):
    class Made:
        def __init__(self, path: Path):
            self.path, self.facts = path, {}

    np.savez(tmp_path / "reference.npz", **reference.arrays())
    np.savez(tmp_path / "scores.npz", **evidence.as_arrays(here))
    made = dict.fromkeys(("reference", "verify"), Made(tmp_path))
    logs = [Log(name="pi.log", text=log(moved(here["domain"], 0.02)))]
    found = board.held_in_build(file, made, logs)
    assert (found.verdict, found.culprit) == ("FAIL", "served")
    assert found == board.held(file, reference, here, logs)


def test_a_log_that_is_none_is_refused_before_anything_is_measured(tmp_path):
    with pytest.raises(DataError, match="cannot be read"):
        board.read(tmp_path / "no.log")
    (tmp_path / "some.log").write_text("Segmentation fault")
    with pytest.raises(DataError, match="holds no statistics"):
        board.read(tmp_path / "some.log")


def test_bounds_on_both_sides_decide():
    def verdict(low, high, limit=0.006):
        return gates.on_board("domain", (low + high) / 2, low, high, limit, 32, of="").verdict

    assert [verdict(-0.005, 0.005), verdict(-0.007, 0.005), verdict(0.001, 0.007)] == [
        "PASS",
        "UNDECIDED",
        "UNDECIDED",
    ]
    assert [verdict(0.007, 0.009), verdict(-0.009, -0.007), verdict(0, 0, None)] == [
        "FAIL",
        "FAIL",
        "UNDECIDED",
    ]
