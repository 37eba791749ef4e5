"""A tiny model onto a board made of namespaces and back again: packages, the device step, an update, a rollback, all over ssh."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from edgeft import runtimes
from tests.boards.conftest import edgeft
from tests.conftest import PYTHONPATH

pytestmark = pytest.mark.slow

NAME = "llama-fine-tuned"


@pytest.fixture(scope="module", autouse=True)
def arm64():
    if not runtimes.for_device("arm64", "armv8.2-a+dotprod+fp16").built():
        pytest.skip("the runtime arm64-cortex-a76 is not compiled yet")


@pytest.fixture(scope="module")
def keys(project):
    done = edgeft("keys", "new", "keys", cwd=project)
    assert done.returncode == 0, done.stderr
    return project / "keys"


def deploy(project, board, *more, user="pi"):
    return edgeft("deploy", "tiny.toml", board.url(user), *board.flags, *more, cwd=project)


def sha256_there(board):
    """Of the model that the board serves."""
    said = board.run(
        f"cd /var/lib/edgeft/models/{NAME}/current 2>/dev/null || cd /usr/share/edgeft/{NAME}; sha256sum model.gguf"
    )
    return said.split()[0]


def sha256_here(project, variant):
    boards = [json.loads(p.read_text()) for p in project.glob(".edgeft/done/verify-*/edgeft.json")]
    return next(m["facts"]["sha256"] for m in boards if m["variant"] == variant)


def test_it_is_an_arm64_debian_that_nobody_else_reaches(board):
    said = board.run("uname -mn; dpkg --print-architecture; cat /proc/net/route; sudo -u pi id -un")
    assert said.split()[:3] == ["edgeft-board", "aarch64", "arm64"] and said.split()[-1] == "pi"
    assert "00000000\t" not in said.partition("Iface")[2].replace("\t00000000\t0001", "")  # no default route
    assert not Path("/proc/sys/fs/binfmt_misc/edgeft-arm64").exists()


def test_packages_then_the_device_step_then_an_update_then_back(project, board, keys):
    done = deploy(project, board, "--status")
    assert done.returncode == 0 and "edgeft   is not installed there" in done.stdout, (
        done.stdout + done.stderr
    )

    done = deploy(project, board, "--keys", keys, "--variant", "q8_0")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"version  {NAME}: sequence 0" in done.stdout and f"{NAME} answers: " in done.stdout
    assert sha256_there(board) == sha256_here(project, "q8_0")
    assert "install ok installed" in board.run(f"dpkg -s edgeft-{NAME} edgeft-runtime-arm64-cortex-a76")
    assert not (board.root / "home/pi/.cache/edgeft-deploy").exists()

    done = edgeft(
        "verify", "tiny.toml", "--variant", "q8_0", "--on", board.url("pi"), *board.flags, cwd=project
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "over ssh and under emulation (emulated aarch64)" in done.stdout
    assert (
        "| q8_0 | ssh: emulated aarch64 (emulated: no promise) |"
        in (project / ".edgeft/reports/tiny/report.md").read_text()
    )

    done = deploy(project, board, "--variant", "q4_0")
    assert done.returncode == 3 and "updates are signed" in done.stderr
    done = deploy(project, board, "--keys", keys, "--variant", "q4_0", "--label", "1.1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert (
        "as a difference" in done.stdout and f"{NAME}: sequence 1 (1.1); a rollback leads to 0" in done.stdout
    )
    assert sha256_there(board) == sha256_here(project, "q4_0")

    done = deploy(project, board, "--keys", keys, "--variant", "q4_0", "--label", "1.1")
    assert done.returncode == 0 and "is up to date there: sequence 1" in done.stdout, (
        done.stdout + done.stderr
    )

    done = deploy(project, board, "--rollback")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"version  {NAME}: sequence 0" in done.stdout
    assert sha256_there(board) == sha256_here(project, "q8_0")


def test_a_connection_that_is_lost_while_the_update_is_tried_changes_nothing(project, board, keys):
    command = [
        sys.executable,
        "-m",
        "edgeft",
        "deploy",
        "tiny.toml",
        board.url("root"),
        *board.flags,
        "--keys",
        keys,
    ]
    with subprocess.Popen(
        [*command, "--variant", "q4_0"], cwd=project, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env={**os.environ, "PYTHONPATH": PYTHONPATH, "COLUMNS": "300"},
    ) as process:  # fmt: skip
        said, cut = "", 0
        for line in process.stdout:
            said += line
            if "signed and undamaged" in line:
                cut = hang_up(board)
    assert cut and process.returncode == 0, said
    assert "; a rollback leads to 0" in said and said.count("signed and undamaged") == 1
    assert sha256_there(board) == sha256_here(project, "q4_0")


def test_a_version_that_says_nothing_is_taken_back_and_strangers_get_nothing_in(project, board, keys):
    before = sha256_there(board)
    stranger = project / "stranger"
    assert edgeft("keys", "new", stranger, cwd=project).returncode == 0
    done = deploy(project, board, "--update", _broken(board, project, stranger), user="root")
    assert done.returncode == 3 and "not signed by whom the board trusts" in done.stderr, (
        done.stdout + done.stderr
    )
    done = deploy(project, board, "--update", _broken(board, project, keys), user="root")
    assert done.returncode == 7 and "the one before it answers again" in done.stderr, (
        done.stdout + done.stderr
    )
    assert sha256_there(board) == before


def test_who_may_not_install_and_what_is_another_board_is_said(project, board):
    done = deploy(project, board, "--rollback", user="guest")
    assert done.returncode == 3 and "guest is not root there, and sudo asks for a password" in done.stderr
    done = deploy(project, board, "--rollback", "--status")
    assert done.returncode == 3 and "exclude one another" in done.stderr
    done = deploy(project, board, "--target", "laptop")
    assert done.returncode == 2 and 'kind = "deb"' in done.stderr


def hang_up(board) -> int:
    """Kill the sshd of every login, which has the option -R; how many processes there were."""
    namespace, count = Path(f"/proc/{board.pid}/ns/pid").readlink(), 0
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if (folder / "ns/pid").readlink() == namespace and b"-R" in (
                folder / "cmdline"
            ).read_bytes().split(b"\0"):
                os.kill(int(folder.name), signal.SIGKILL)
                count += 1
        except OSError:
            continue
    return count


def _broken(board, project, keys) -> Path:
    """A signed update whose weights are all zero."""
    from edgeft.llamacpp import header
    from edgeft.updates import make

    folder = board.root / f"var/lib/edgeft/models/{NAME}/current"
    contents = {p.name: p for p in folder.iterdir() if p.is_file() and p.suffix not in (".gguf", ".json")}
    damaged = project / "damaged.gguf"
    shutil.copyfile(folder / "model.gguf", damaged)
    found = header.read(damaged)
    with damaged.open("r+b") as file:
        for tensor in found.tensors:
            file.seek(found.data_offset + tensor.offset)
            file.write(bytes(tensor.bytes))
    wanted = make.Wanted(name=NAME, label="broken", sequence=9, kind="full")
    return make.make(
        {**contents, "model.gguf": damaged},
        wanted,
        keys,
        lambda path: b"",
        out=project / f"{keys.name}.edgeft",
    ).path
