"""From scores to what a certificate says: the cost of steps, the worst tokens, manners, the step at fault."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from edgeft.parity import evidence
from edgeft.parity.certificate import culprit
from edgeft.parity.checks.check import Check
from edgeft.parity.evidence import Reference
from edgeft.parity.gates import Limits, judge
from edgeft.parity.speakers import Reply
from edgeft.parity.suite import Text
from tests.parity_checks import sample
from tests.parity_checks.made_up import all_of, scores


@pytest.fixture
def reference():
    found = scores()
    ids = [[100 + w] * 129 for w in range(24)]
    text = Text(name="domain", n_ctx=129, ids=ids, counted=all_of(found))
    return Reference(texts={"domain": text}, nll={"domain": found.nll_base}, base=found.nll_base + 1)


def moved(by, kld, windows=24):
    found = scores(noise=0)
    return replace(found, nll=found.nll_base + by, kld=np.full(found.kld.shape, kld)).first(windows)


def test_costs_add_up_from_before_training_to_the_file(reference):
    chain = [
        ("merged", "merged", moved(0.01, 0.001)),
        ("gguf", "F16", moved(0.01, 0.001)),
        ("quantized", "Q4", moved(0.2, 0.1)),
    ]
    costs = evidence.step_costs(reference, chain, trained="trained")
    assert [c.step for c in costs] == ["base", "trained", "merged", "gguf", "quantized"]
    assert [c.cost for c in costs[1:]] == pytest.approx([-1, 0.01, 0, 0.19])
    assert costs[0].loss + sum(c.cost for c in costs[1:]) == pytest.approx(costs[-1].loss)
    assert [c.kld_added for c in costs[2:]] == pytest.approx([0.001, 0, 0.099])


def test_a_step_measured_on_fewer_windows_is_paired_with_its_neighbours_on_those(reference):
    uneven = moved(0.0, 0.0)
    uneven = replace(uneven, nll=uneven.nll + np.arange(24)[:, None] * 0.01)
    chain = [("merged", "", uneven), ("gguf", "", uneven.first(4)), ("quantized", "", uneven)]
    costs = evidence.step_costs(reference, chain, trained="")
    assert [c.cost for c in costs[3:]] == pytest.approx([0, 0]) and [c.windows for c in costs[2:]] == [
        24,
        4,
        24,
    ]


def test_the_step_at_fault_is_the_first_failed_check_else_the_one_that_added_most(reference):
    chain = [("merged", "", moved(0, 0.3)), ("gguf", "", moved(0, 0.3)), ("quantized", "", moved(0, 0.4))]
    steps = evidence.step_costs(reference, chain, trained="")
    bad = judge(reference.compare({"domain": moved(0, 0.4)}), None, Limits.of("parity"))
    assert culprit([], bad, steps) == "merged"
    wrong = [Check(step=s, name="", codes=(), ok=False, said="") for s in ("served", "gguf")]
    assert culprit(wrong, bad, steps) == "gguf"
    assert (
        culprit([], judge(reference.compare({"domain": moved(0, 0.01)}), None, Limits.of("parity")), steps)
        == ""
    )


def test_the_worst_tokens_stand_in_their_context(reference):
    found = moved(0, 0.0)
    found.kld[3, 10] = 5
    found.nll[3, 10] += 2
    words = evidence.worst(reference, {"domain": found}, lambda ids: " ".join(map(str, ids)), most=1)
    assert words[0].kld == 5 and words[0].token == "103" and words[0].before.split() == ["103"] * 24
    assert words[0].p < words[0].p_reference


def test_drift_along_the_window_is_seen(reference):
    found = moved(0, 0.01)
    found.kld[:, 32:] = 0.5
    bins = evidence.bins(reference, {"domain": found}, count=4)
    assert [(b.first, b.last) for b in bins] == [(65, 80), (81, 96), (97, 112), (113, 128)]
    assert [b.kld for b in bins] == pytest.approx([0.01, 0.01, 0.5, 0.5])


def test_answers_that_run_on_or_repeat_themselves_are_told():
    good = [Reply(ids=list(range(20)), text="", stopped=True)] * 6
    stuck = [Reply(ids=[1, 2, 3, 4] * 20, text="", stopped=False)] * 6
    fine, bad = evidence.manners("trained", good), evidence.manners("shipped", stuck)
    assert (
        fine.repeats == 0 and bad.repeats > 0.9 and bad.stopped == 0 and bad.distinct == pytest.approx(0.05)
    )
    assert [c.ok for c in evidence.behaviour(fine, bad)] == [False, False]
    assert [c.ok for c in evidence.behaviour(fine, fine)] == [True, True]
    assert evidence.behaviour(evidence.manners("trained", []), evidence.manners("shipped", [])) == []


def test_one_answer_that_runs_on_does_not_condemn_five_that_do_not():
    good = [Reply(ids=list(range(n, n + 20)), text="fine", stopped=True) for n in range(6)]
    loop = Reply(ids=[7, 8] * 48, text="and so on", stopped=False)
    trained = evidence.manners("trained", good)
    one, three = (evidence.manners("shipped", [*good[n:], *[loop] * n]) for n in (1, 3))
    assert 0.1 < one.repeats < 0.2 and three.repeats > 0.4
    assert all(c.ok for c in evidence.behaviour(trained, one))
    assert [c.name for c in evidence.behaviour(trained, three) if not c.ok] == ["answers vary"]


def test_a_reference_survives_its_file(reference, tmp_path):
    np.savez(tmp_path / "r.npz", **reference.arrays())
    again = Reference.of(dict(np.load(tmp_path / "r.npz")))
    assert again.texts.keys() == {"domain"} and np.array_equal(again.base, reference.base)
    assert again.retention(moved(0.5, 0)).retention == pytest.approx(0.5)


def test_a_file_for_another_kind_of_processor_says_that_it_was_not_measured_there(monkeypatch):
    import platform

    from edgeft.parity import collected

    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    found = sample.bare()
    there = collected.aimed(found, {"name": "pi-5-8gb", "arch": "arm64", "memory_mb": 6000})
    assert "pi-5-8gb is arm64" in there.files[0].notes[-1] and there.target["name"] == "pi-5-8gb"
    here = collected.aimed(found, {"name": "laptop", "arch": "amd64", "memory_mb": 6000})
    assert here.files == found.files and here.target["name"] == "laptop"
