"""The program as it is shipped: one file, the same bytes twice, for the Python and the libraries that boards have."""

from __future__ import annotations

import ast
import io
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import edgeft.agent
from edgeft.export import agent
from tests.agent.device import NAME, RUN, Device, Keys, answer, content, update
from tests.conftest import ROOT

PYTHON = "/usr/bin/python3"
SOURCES = sorted(Path(edgeft.agent.__file__).parent.glob("*.py"))


def has_cryptography(python):
    if not shutil.which(python):
        return False
    command = [python, "-I", "-c", "import sys, cryptography; assert sys.version_info >= (3, 10)"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def test_it_is_the_same_bytes_twice_and_holds_the_licences_of_all_that_is_in_it():
    first = agent.zipapp()
    agent.zipapp.cache_clear()
    assert agent.zipapp() == first and first.startswith(b"#!/usr/bin/env python3\n")
    packed = zipfile.ZipFile(io.BytesIO(first))
    names = packed.namelist()
    assert {"tuf", "securesystemslib"} <= {
        n.split("/")[1].split("-")[0] for n in names if n.startswith("licences/")
    }
    assert not [n for n in names if n.endswith((".pyc", ".so"))] and len(first) < 600_000
    for text in (str(ROOT), "site-packages", "/home/", "/root/"):
        assert not [n for n in names if text.encode() in packed.read(n)]
    assert b"MIT" in agent.licence() and b"Apache" in agent.licence()


def test_it_imports_nothing_of_edgeft_and_is_written_for_python_3_10():
    allowed = {"tuf", "securesystemslib", "__future__"} | sys.stdlib_module_names
    for path in SOURCES:
        tree = ast.parse(path.read_text(), feature_version=(3, 10))
        for node in ast.walk(tree):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                assert name.startswith("edgeft.agent") or name.split(".")[0] in allowed, (
                    f"{path} imports {name}"
                )


def test_looking_at_the_device_and_repairing_it_need_no_library(tmp_path):
    """At boot, with whatever Python there is: a model is served without cryptography."""
    (tmp_path / "edgeft-update").write_bytes(agent.zipapp())
    (tmp_path / "var/lib/edgeft/models").mkdir(parents=True)
    command = [sys.executable, "-I", "-S", tmp_path / "edgeft-update", "--root", tmp_path, "recover"]
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0


@pytest.mark.slow
@pytest.mark.skipif(not has_cryptography(PYTHON), reason="needs python3-cryptography")
def test_it_installs_updates_with_the_systems_python_and_cryptography(tmp_path):
    program = tmp_path / "edgeft-update"
    program.write_bytes(agent.zipapp())
    new, keys = {"model.gguf": content("good"), "run.sh": RUN}, Keys()
    device = Device(root=tmp_path / "device", keys=keys).make({"model.gguf": content("good"), "run.sh": RUN})
    try:
        for owner, code in ((Keys(), 3), (keys, 0)):
            file = update(tmp_path / "u", owner, 1, new)
            done = subprocess.run(
                [PYTHON, "-I", program, "--root", device.root, "install", file],
                capture_output=True,
                text=True,
                check=False,
            )
            assert done.returncode == code, done.stderr
        assert device.asks() == answer(new)
        assert device.run("rollback", NAME).returncode == 0
    finally:
        device.stop()
