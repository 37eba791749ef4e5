"""Programs edgeft calls but does not contain. The only module that starts a program."""

from __future__ import annotations

import ctypes
import logging
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from edgeft.errors import SetupError, ToolError

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Tool:
    """A named program. `pin` goes into cache keys; leave it empty for host tools."""

    name: str
    pin: str = ""
    hint: str = ""

    def find(self) -> str:
        """The program's path. Raises SetupError, with this tool's hint, when it is not installed."""
        if path := shutil.which(self.name):
            return path
        raise SetupError(f"{self.name} is not installed", hint=self.hint)

    def __call__(self, *args: str | Path, cwd: Path | None = None) -> str:
        """Run to the end, log every line, return the output; raise ToolError on failure."""
        return run([self.find(), *(os.fspath(a) for a in args)], cwd=cwd)


def run(
    argv: list[str],
    *,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    watch: Callable[[str], None] = lambda line: None,
) -> str:
    """Run a command to its end and return its output (stdout and stderr together).

    Every line goes to the log and to `watch`. `env` is added to this process's environment.
    Raises SetupError when the program does not exist, ToolError (command, exit status, last 15 lines)
    when it fails.
    """
    log.info("+ %s", shlex.join(argv))
    lines: deque[str] = deque(maxlen=2000)
    try:
        process = subprocess.Popen(
            argv, cwd=cwd, env={**os.environ, **(env or {})}, text=True, errors="replace",
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            preexec_fn=die_with_parent,  # noqa: PLW1509  two system calls, no locks
        )  # fmt: skip
    except FileNotFoundError:
        raise SetupError(f"{argv[0]} is not installed") from None
    try:
        with process:
            assert process.stdout
            for line in process.stdout:
                lines.append(line)
                log.debug("%s", line.rstrip())
                watch(line)
    except BaseException:
        process.kill()
        raise
    if process.returncode:
        tail = "".join(list(lines)[-15:])
        raise ToolError(f"{shlex.join(argv)} exited with {process.returncode}:\n{tail}")
    return "".join(lines)


@dataclass(frozen=True, kw_only=True)
class Background:
    """A program that runs beside this one."""

    argv: tuple[str, ...]
    lines: list[str]
    """What it has said so far, stdout and stderr together; all of it once the program has ended."""
    process: subprocess.Popen[str]
    reader: threading.Thread

    @property
    def running(self) -> bool:
        return self.process.poll() is None

    def failure(self, why: str) -> ToolError:
        """An error with the command, `why`, and the last 15 lines."""
        if not self.running:
            self.reader.join(10)  # its last words
        return ToolError(f"{shlex.join(self.argv)} {why}:\n{''.join(self.lines[-15:])}")


@contextmanager
def background(argv: list[str], *, env: Mapping[str, str] | None = None) -> Iterator[Background]:
    """Run a command while the block lasts: at its end the program is asked to stop, and killed after 10 s.

    `env` is the program's whole environment (default: this process's). It must be left in the thread that entered
    it, since the kernel ends the program with that thread. Raises SetupError when the program does not exist.
    """
    log.info("+ %s &", shlex.join(argv))
    try:
        process = subprocess.Popen(
            argv, env=env, text=True, errors="replace", stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            preexec_fn=die_with_parent,  # noqa: PLW1509  as in run
        )  # fmt: skip
    except FileNotFoundError:
        raise SetupError(f"{argv[0]} is not installed") from None
    lines: list[str] = []
    reader = threading.Thread(target=_listen, args=(process, lines), daemon=True)
    reader.start()
    try:
        yield Background(argv=tuple(argv), process=process, lines=lines, reader=reader)
    finally:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(10)
        process.kill()
        process.wait()
        reader.join(10)


def _listen(process: subprocess.Popen[str], lines: list[str]) -> None:
    assert process.stdout
    with process.stdout as stream:
        for line in stream:
            lines.append(line)
            log.debug("%s", line.rstrip())


def die_with_parent() -> None:
    """Ask the kernel to kill this process when the one that started it dies (Linux; nothing elsewhere).

    Without it, kill -9 of a build would leave a compiler or a training run behind that holds its workspace.
    """
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
