"""From a recipe to a machine that answers: built, started without network, asked, cut off, started again; and B after A.

Minutes, and a download of Debian's packages at the first run: `pytest -m boot tests/boot`
"""

from __future__ import annotations

import json
import re
import subprocess
import time

import pytest

from edgeft.commands.booting import _grow
from edgeft.emulator.boot import booted, read_spec
from edgeft.image.disk import unpack
from edgeft.image.partitions import MIB
from tests.boards.conftest import edgeft, project, tiny  # noqa: F401  fixtures

pytestmark = pytest.mark.boot


@pytest.fixture(scope="module")
def image(project):  # noqa: F811
    """The folder of the first file's image."""
    done = edgeft("build", "tiny.toml", "--target", "amd64-uefi", "--upto", "q8_0", cwd=project)
    assert done.returncode == 0, done.stdout + done.stderr
    (found,) = project.glob(".edgeft/done/export-image-*/image.img.zst")
    return found


@pytest.fixture
def machine(image, tmp_path):
    """The disk as on a card, and what is to be started."""
    raw = tmp_path / "raw"
    unpack(image, raw)
    _grow(raw)
    return raw, read_spec(json.loads(image.with_name("image.json").read_text()))


def test_the_command_prints_the_answer_and_the_times(project, image):  # noqa: F811
    done = edgeft(
        "boot",
        "tiny.toml",
        "--target",
        "amd64-uefi",
        "--ask",
        "What is anemia?",
        "--max-tokens",
        "4",
        cwd=project,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (
        "answers after" in done.stdout
        and "emulated: no promise" in done.stdout
        and "shut down" in done.stdout
    )


def test_it_comes_back_after_the_power_was_cut(machine):
    raw, spec = machine
    with booted(raw, spec, snapshot=False) as first:
        said = first.ask("What is anemia?", 4)
        first.program.process.kill()
        first.program.process.wait()
    with booted(raw, spec, snapshot=False) as second:
        assert second.ask("What is anemia?", 4).text == said.text


def test_when_system_a_is_broken_b_starts_after_three_tries(machine, image):
    raw, spec = machine
    a = json.loads(image.with_name("image.json").read_text())["partitions"][1]
    with raw.open("r+b") as disk:
        disk.seek(a["start"])
        disk.write(bytes(1 << 20))  # its superblock too
    with booted(raw, spec) as running:
        assert running.ask("What is anemia?", 4).tokens
        said = running.console()
    assert said.count("the root file system on") >= 3 and "root=PARTLABEL=edgeft-b" in said


def test_the_console_names_no_failed_unit(machine):
    raw, spec = machine
    with booted(raw, spec) as running:
        pass
    said = plain(running.console())
    assert "FAILED" not in said, [line for line in said.splitlines() if "FAILED" in line]


def test_a_start_is_no_longer_counted_once_the_model_has_answered(machine):
    raw, spec = machine
    assert entries(raw) == {"edgeft-a+3.conf", "edgeft-b+3.conf"}
    with booted(raw, spec, snapshot=False) as running:
        end = time.monotonic() + 300
        while "Boot Loader Entry as Good" not in plain(running.console()) and time.monotonic() < end:
            time.sleep(1)
        time.sleep(5)
    assert entries(raw) == {"edgeft-a.conf", "edgeft-b+3.conf"}, plain(running.console())[-3000:]


def entries(raw):
    """Names of the boot loader's entries, in which it counts."""
    said = subprocess.run(
        ["mdir", "-b", "-i", f"{raw}@@{MIB}", "::/loader/entries"], check=True, capture_output=True, text=True,
        env={"MTOOLS_SKIP_CHECK": "1", "PATH": "/usr/bin"},
    ).stdout  # fmt: skip
    return {line.rpartition("/")[2] for line in said.split()}


def plain(console):
    """Without what colours it or moves the cursor."""
    return re.sub(r"\x1b\[[0-?]*[ -/]*[@-~]", "", console)
