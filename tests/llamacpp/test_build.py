from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from edgeft.errors import SetupError, ToolError
from edgeft.llamacpp import build, pin, source
from tests.llamacpp.conftest import ROOT


@pytest.fixture
def copied(library, tmp_path, monkeypatch):
    """The built library, copied to where a test may damage it."""
    shutil.copytree(library, tmp_path / "bin", symlinks=True)
    shutil.copy(library.parent / "library.built.json", tmp_path)
    monkeypatch.setattr(build, "binaries", lambda: tmp_path / "bin")
    return tmp_path / "bin"


def test_what_was_built_says_it_is_the_pinned_commit(library):
    build._identify(pin.load())
    assert build.built("library")
    assert Path(build.LIBRARY.find()).samefile(library / "libllama.so")


def test_another_commit_is_refused(library):
    import dataclasses

    other = dataclasses.replace(pin.load(), commit="f" * 40)
    with pytest.raises(ToolError, match=f"says it is .*{pin.load().commit}.*, pinned is .*ffff"):
        build._identify(other)


def test_only_ggml_is_compiled_for_speed(library):
    commands = json.loads((library.parent / "compile_commands.json").read_text())
    levels = {}
    for entry in commands:
        top = Path(os.path.relpath(entry["file"], source.llama_cpp_tree())).parts[0]
        levels.setdefault("ggml" if top == "ggml" else "rest", set()).update(
            re.findall(r" -O\w", entry["command"])
        )
    assert levels == {"ggml": {" -O3"}, "rest": {" -O1"}}


def test_a_library_that_was_changed_is_refused(copied):
    assert build.built("library")
    with (copied / "libllama.so").resolve().open("ab") as stream:
        stream.write(b"\0")
    with pytest.raises(ToolError, match=r"libllama\.so is not the file that was built here"):
        build.built("library")


def test_a_library_that_was_only_touched_is_still_the_one_that_was_built(copied):
    os.utime((copied / "libggml-cpu.so").resolve())
    assert build.built("library")


def test_a_library_that_lost_a_file_or_its_marker_counts_as_not_built(copied):
    (copied / "libggml-cpu.so").unlink()
    assert not build.built("library")
    shutil.copy(copied.parent / "library.built.json", copied.parent / "other.json")
    (copied.parent / "library.built.json").unlink()
    assert not build.built("library")


@pytest.mark.parametrize(
    ("present", "missing"), [((), "no C++ compiler"), (("c++",), "cmake is not"), (("c++", "cmake"), "ninja is not")]
)  # fmt: skip
def test_a_machine_that_cannot_build_is_told_before_anything_starts(tmp_path, monkeypatch, present, missing):
    for name in present:
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("EDGEFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(SetupError, match=re.escape(missing)) as caught:
        build.LIBRARY.find()
    assert caught.value.hint
    assert not (tmp_path / "cache").exists()


def test_a_part_is_a_tool_with_the_pin_in_its_key():
    assert {part.pin for part in (build.LIBRARY, build.SERVER, build.PERPLEXITY)} == {pin.load().id}
    assert build.SERVER.name == "llama.cpp server"
    assert "g++" in build.SERVER.hint


@pytest.mark.slow
def test_a_killed_build_is_not_taken_for_finished_and_goes_on_where_it_was(library, tmp_path):
    cache = tmp_path / "cache"
    home = cache / "llama.cpp" / pin.load().id
    home.mkdir(parents=True)
    (home / "source").symlink_to(source.source())
    counts = [_build_and_kill(cache, after=4), _build_and_kill(cache, after=2)]
    assert not list(home.glob("build-*/*.built.json"))
    assert counts[0] - 8 <= counts[1] <= counts[0] - 3


def _build_and_kill(cache, after):
    """Start a build, kill -9 it after some finished steps; how many steps it said it had to do."""
    code = (
        "from edgeft import progress\nfrom edgeft.llamacpp import build\n"
        "with progress.listen(lambda p: print(p.what, int(p.done), int(p.total), flush=True)):\n"
        "    build.ensure('library')\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], env={**os.environ, "EDGEFT_CACHE": str(cache), "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    for line in process.stdout:
        if (found := re.match(r"compile llama.cpp: library (\d+) (\d+)", line)) and int(found[1]) >= after:
            process.send_signal(signal.SIGKILL)
            process.wait()
            return int(found[2])  # what ninja had started goes on; the next build waits for it
    raise AssertionError("the build ended before it could be killed")
