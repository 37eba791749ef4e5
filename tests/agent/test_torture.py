"""Whatever happens during an update, the old or the new model answers afterwards, and every byte of it is there."""

from __future__ import annotations

import random
import sys

import pytest

from edgeft.export import agent
from tests.agent import torture
from tests.agent.torture import KINDS, cut, one

SEEDS = random.Random(20261121)
MIXED = [
    *[(torture.damaged, kind, "good") for kind in ("full", "adapter", "delta", "full", "delta", "full")],
    *[(torture.wrong_key, "full", "good")] * 4,
    *[(torture.wrong_base, kind, "good") for kind in ("adapter", "delta")],
    *[(torture.downgrade, "full", "good")] * 2,
    (torture.wrong_model, "full", "good"),
    (torture.no_answer, "full", "empty"),
    (torture.no_answer, "full", "broken"),
    (torture.no_answer, "full", "crash"),
]


def seed() -> int:
    return SEEDS.randrange(1 << 30)


@pytest.mark.slow
@pytest.mark.parametrize("what", KINDS)
def test_a_power_cut_at_any_step_leaves_a_whole_model_that_answers(what):
    steps = (
        (*range(1, 15, 3), 60) if what == "rollback" else (*range(2, 38, 5), 60)
    )  # the last one comes never
    ended = {one(lambda run, step=step: cut(run, step), seed(), what=what, again=True) for step in steps}
    assert ended == {"old", "new"}


@pytest.mark.slow
def test_kill_9_of_the_shipped_program_at_random_instants_leaves_a_whole_model(tmp_path):
    program = tmp_path / "edgeft-update"
    program.write_bytes(agent.zipapp())
    for what in KINDS:
        one(
            lambda run: torture.killed(run, [sys.executable, str(program)], 0.8),
            seed(),
            what=what,
            again=True,
        )


@pytest.mark.slow
@pytest.mark.parametrize(("attack", "what", "quality"), MIXED)
def test_what_is_damaged_or_not_for_this_device_changes_nothing(attack, what, quality):
    ended = one(attack, seed(), what=what, quality=quality)
    assert ended == "old" or attack in (torture.damaged, torture.downgrade)


@pytest.mark.slow
def test_a_disk_that_fills_up_at_any_step_leaves_the_old_model_or_the_new_one():
    ended = {one(lambda run, step=step: torture.out_of_room(run, step), seed(), what=what)
             for what in ("full", "delta") for step in (1, 5, 9, 14, 21, 25, 29)}  # fmt: skip
    assert "old" in ended


@pytest.mark.slow
def test_a_disk_that_is_really_full_is_said_so_and_the_old_model_answers():
    ended = torture.in_own_mounts(6, seed())
    if ended is None:
        pytest.skip("this system allows no mount namespace")
    assert "old" in ended


@pytest.mark.slow
def test_an_agent_that_does_not_wait_for_the_disk_would_be_caught():
    """The power cut takes what is not safe: without fsync of files and folders, devices break."""
    caught = 0
    for number in range(6):
        try:
            one(lambda run, step=18 + number % 4: cut(run, step, careless=True), number)
        except AssertionError:
            caught += 1
    assert caught >= 3
