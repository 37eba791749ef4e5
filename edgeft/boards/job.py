"""A command on the board that outlives the connection: it runs apart from the login, its output in a file, its exit code in
another, and whoever connects again reads on where he stopped."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Self, TypeVar

from edgeft import progress
from edgeft.boards import machine as machines
from edgeft.boards.ssh import Lost, Ssh
from edgeft.errors import EdgeftError, SetupError

T = TypeVar("T")
PATIENCE = 600.0
"""Seconds for which a lost board is called again. One that restarts takes one or two minutes."""
EVERY = 1.0
FILES = ("job.sh", "job.pid", "job.log", "job.code")

_STATE = r"""
boot=$(cat /proc/sys/kernel/random/boot_id)
code=; [ -f job.code ] && code=$(cat job.code)
alive=no; [ -f job.pid ] && read -r pid at <job.pid && [ "$at" = "$boot" ] && [ -d "/proc/$pid" ] && alive=yes
"""
"""A process counts only since the start of the machine that gave it its number."""
_START = r"""
[ $alive = yes ] && { echo 'edgeft started=before'; exit 0; }
rm -f job.code job.pid job.log job.sh; : >job.log
cat >job.sh <<'EDGEFT'
trap '' HUP
echo "$$ $(cat /proc/sys/kernel/random/boot_id)" >job.pid.new && mv job.pid.new job.pid
( {command}
) >job.log 2>&1 </dev/null
echo $? >job.code.new && mv job.code.new job.code
EDGEFT
apart=nohup; command -v setsid >/dev/null && apart=setsid
$apart sh ./job.sh </dev/null >/dev/null 2>&1 &
n=0; while [ ! -f job.pid ] && [ $n -lt 25 ]; do n=$((n + 1)); sleep 0.2 2>/dev/null || sleep 1; done
[ -f job.pid ] && echo 'edgeft started=now'
"""
_LOOK = r"""
lines=$(($(wc -l <job.log)))
[ -n "$code" ] && lines=1000000
head -n "$lines" job.log | tail -n +{next} | sed 's/^/edgeft said /'
printf '\nedgeft code=%s\nedgeft alive=%s\n' "$code" "$alive"
"""
"""A line that is still being written is left for the next look."""


@dataclass(frozen=True, kw_only=True)
class Look:
    """What a job has done since the last look."""

    said: list[str]
    code: int | None
    """Its exit status, once it has ended."""
    alive: bool


class Line:
    """A board that is called again when the connection is lost.

    `reach` opens a connection. Used as a block, at whose end the connection is closed.
    """

    def __init__(
        self,
        reach: Callable[[], AbstractContextManager[Ssh]],
        *,
        patience: float = PATIENCE,
        pause: float = 3.0,
    ) -> None:
        self._reach, self._patience, self._pause = reach, patience, pause
        self._open = ExitStack()
        self._board: Ssh | None = None

    def __enter__(self) -> Self:
        self._board = self._open.enter_context(self._reach())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.__exit__(kind, error, trace)

    def ask(self, what: Callable[[Ssh], T]) -> T:
        """What `what` makes of the connection; done again, from its beginning, over a new one when that is lost.

        Raises the last error when the board could not be reached within `patience` seconds.
        """
        end = None
        while True:
            try:
                if self._board is None:
                    self._board = self._open.enter_context(self._reach())
                return what(self._board)
            except (Lost, SetupError) as error:
                if isinstance(error, SetupError) and self._board is not None:
                    raise  # the board's answer, not the network's
                end = end or time.monotonic() + self._patience
                if time.monotonic() > end:
                    raise
            self._board = None
            with suppress(EdgeftError):
                self._open.close()
            progress.report("the connection was lost; the board goes on, and is called again")
            time.sleep(self._pause)


def start(line: Line, command: Sequence[str] | str) -> bool:
    """Start a shell command as the board's one job; False when the one before is still at work, which then goes on.

    A job that has ended is forgotten by this: `look` first. Raises SetupError when nothing can be started there.
    """
    text = command if isinstance(command, str) else " ".join(command)
    said = line.ask(lambda board: machines.told(board.shell(_STATE + _START.replace("{command}", text))))
    if "started" not in said:
        raise SetupError(
            "nothing can be started on that board", hint="is its disk full, or its /proc not there?"
        )
    return said["started"] == "now"


def exists(line: Line) -> bool:
    """Whether there is a job on the board, at work or ended, whose outcome nobody has read."""
    return "edgeft job=yes" in line.ask(
        lambda board: board.shell("[ -f job.log ] && [ -f job.sh ] && echo edgeft job=yes; true")
    )


def look(line: Line, seen: int) -> Look:
    """What the job has said beyond its first `seen` lines, and whether it has ended."""
    said = line.ask(lambda board: board.shell(_STATE + _LOOK.replace("{next}", str(seen + 1))))
    told = machines.told(said)
    lines = [
        text.removeprefix("edgeft said ") for text in said.splitlines() if text.startswith("edgeft said ")
    ]
    code = told.get("code", "")
    return Look(said=lines, code=int(code) if code.isdigit() else None, alive=told.get("alive") == "yes")


def follow(line: Line, say: Callable[[str], None]) -> int | None:
    """Pass on what the job says until it ends; its exit status, or None when it was ended without one (power, kill).

    `say` gets each line once, however often the connection is lost.
    """
    seen, gone = 0, 0
    while True:
        found = look(line, seen)
        for text in found.said:
            say(text)
        seen += len(found.said)
        if found.code is not None:
            return found.code
        gone = 0 if found.alive else gone + 1
        if gone > 2:
            return None
        time.sleep(EVERY)


def forget(line: Line) -> None:
    """Delete what the job left in the work folder."""
    line.ask(lambda board: board.shell(f"rm -f {' '.join(FILES)}"))
