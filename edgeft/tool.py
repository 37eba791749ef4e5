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
from collections import deque
from collections.abc import Callable, Mapping
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


def die_with_parent() -> None:
    """Ask the kernel to kill this process when the one that started it dies (Linux; nothing elsewhere).

    Without it, kill -9 of a build would leave a compiler or a training run behind that holds its workspace.
    """
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
