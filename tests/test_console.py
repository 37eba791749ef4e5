"""What is shown of work that is no step of a build."""

from __future__ import annotations

import io
import time

import pytest
from rich.console import Console

from edgeft import console, progress


@pytest.fixture
def screen(monkeypatch):
    """`screen(terminal)`: what is drawn from then on."""

    def make(terminal):
        file = io.StringIO()
        monkeypatch.setattr(console, "out", Console(file=file, force_terminal=terminal, width=100))
        return file

    return make


def test_compiling_outside_of_a_build_is_a_line_now_and_then_in_a_log(screen, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    log = screen(terminal=False)
    with console.watching("verify"):
        for done in range(1, 101):
            now[0] += 1
            progress.report("compile llama.cpp: arm64-cortex-a72", done, 214, unit="files")
    said = log.getvalue().splitlines()
    assert [line.strip() for line in said] == [
        f"verify: compile llama.cpp: arm64-cortex-a72  {done} of 214 files" for done in (31, 62, 93)
    ]


def test_on_a_terminal_it_is_one_line_that_changes(screen):
    log = screen(terminal=True)
    with console.watching("verify"):
        progress.report("compile llama.cpp: arm64-cortex-a72", 3, 214, unit="files")
        time.sleep(0.3)  # drawn some twelve times a second
    assert "3 of 214 files" in log.getvalue()
