"""A job on a board goes on without its connection, and is read to its end over another one. The board is a shell in a folder."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path

import pytest

from edgeft.agent import errors as agent_errors
from edgeft.boards import deployment, device, job
from edgeft.boards.deployment import Deployment, judge
from edgeft.boards.job import Line
from edgeft.boards.machine import Machine
from edgeft.boards.ssh import Lost
from edgeft.errors import SetupError, ToolError
from edgeft.tool import run


class Folder:
    """A connection whose board is this machine; after `lasting` commands it is lost."""

    def __init__(self, folder: Path, lasting: int) -> None:
        self.folder, self.left = folder, lasting

    def shell(self, script, watch=lambda line: None):
        self.left -= 1
        if self.left < 0:
            raise Lost("the connection to board was lost")
        return run(["sh", "-c", script], cwd=self.folder, watch=watch)


@pytest.fixture
def line(tmp_path, monkeypatch):
    """Opens a line whose connections last for so many commands each; the last number holds on."""
    monkeypatch.setattr(job, "EVERY", 0.05)

    def opened(*lasting: int, patience: float = 5):
        lengths = list(lasting)

        @contextlib.contextmanager
        def reach():
            length = lengths.pop(0) if len(lengths) > 1 else lengths[0]
            if length < 0:
                raise SetupError("board does not answer")
            yield Folder(tmp_path, length)

        return Line(reach, patience=patience, pause=0.01)

    return opened


def test_what_a_job_says_is_read_once_however_often_the_connection_is_lost(line):
    said: list[str] = []
    with line(2, 1, 1, 2, -1, 1) as board:
        assert job.start(board, "for i in 1 2 3 4 5; do echo line $i; done; printf unfinished; exit 6")
        assert job.follow(board, said.append) == 6
        assert said == ["line 1", "line 2", "line 3", "line 4", "line 5", "unfinished"]
        assert job.exists(board)
        job.forget(board)
        assert not job.exists(board)


def test_a_second_deployment_finds_the_first_at_work_and_reads_its_outcome(line):
    with line(100) as board:
        assert job.start(board, "echo first; sleep 0.3")
    said: list[str] = []
    with line(100) as board:  # another process, later
        assert job.exists(board) and not job.start(board, "echo second")
        assert job.follow(board, said.append) == 0 and said == ["first"]


def test_a_job_that_was_killed_has_no_exit_code(line, tmp_path):
    with line(100) as board:
        job.start(board, "sleep 5")
        number = int((tmp_path / "job.pid").read_text().split()[0])
        os.killpg(number, signal.SIGKILL)
        assert job.follow(board, print) is None


def test_a_job_of_before_the_machine_was_switched_off_is_not_at_work(line, tmp_path):
    with line(100) as board:
        job.start(board, "sleep 1")
        path = tmp_path / "job.pid"
        path.write_text(f"{path.read_text().split()[0]} 00000000-another-start\n")
        assert not job.look(board, 0).alive


def test_a_board_that_stays_away_is_given_up_after_a_while(line):
    began = time.monotonic()
    with line(1, -1, patience=0.2) as board:
        assert job.start(board, "true")
        with pytest.raises(SetupError, match="does not answer"):
            job.follow(board, print)
    assert time.monotonic() - began < 3


def test_every_exit_code_of_the_agent_has_its_sentence():
    assert set(deployment.MEANINGS) == {e.code for e in agent_errors.ALL}
    judge(0)
    for code, error, words in (
        (3, SetupError, "not signed"),
        (8, ToolError, "the one before it answers again"),
    ):
        with pytest.raises(error, match=words):
            judge(code)
    with pytest.raises(ToolError, match="power failure"):
        judge(None)


def found(**said) -> device.Device:
    given = {
        "machine": Machine(machine="aarch64"), "user": "pi", "root": False, "sudo": True, "dpkg": True, "systemd": True,
        "restart": False, "agent": False, "python": True, "trust": "", "runtime": ("", ""), "room": None,
    }  # fmt: skip
    return device.Device(**given | said)


def test_what_stands_against_a_deployment_is_said_before_anything_is_sent():
    target = {"name": "pi-5-8gb", "arch": "arm64", "isa": "armv8.2-a+dotprod+fp16"}
    Deployment(line=None, device=found(), say=print).suits(target)
    for said, words in (
        ({"machine": Machine(machine="x86_64")}, "that machine is x86_64, and the target pi-5-8gb is arm64"),
        ({"machine": Machine(machine="aarch64", features=("asimd", "fp"))}, "lacks asimddp, asimdhp"),
        ({"sudo": False}, "sudo asks for a password"),
        ({"systemd": False}, "no systemd runs on that board"),
    ):  # fmt: skip
        with pytest.raises(SetupError, match=words):
            Deployment(line=None, device=found(**said), say=print).suits(target)
    small = Machine(machine="aarch64", memory=500_000_000)
    with pytest.raises(SetupError, match="takes about 900 MB of memory, and the board has 500 MB"):
        Deployment(line=None, device=found(machine=small), say=print).suits(target, memory=900_000_000)
    with pytest.raises(SetupError, match="no Debian"):
        Deployment(line=None, device=found(dpkg=False), say=print).packages([])
    assert found(root=True).as_root("id") == "id" and found().as_root("id -u") == "sudo -n sh -c 'id -u'"


def test_a_look_at_this_machine_finds_no_edgeft_on_it(tmp_path):
    there = device.look(Folder(tmp_path, 1))
    assert there.user and there.room and there.machine.arch and not there.machine.emulated and not there.agent
