"""What is done on a board to bring a model there: packages, trust, updates, and the question whether it answers.

Every change runs there as a job of its own (`job`), so that a lost connection, or a closed laptop, ends nothing halfway.
"""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeft.boards import device as devices
from edgeft.boards import job
from edgeft.boards import machine as machines
from edgeft.boards.device import Device
from edgeft.boards.job import Line
from edgeft.errors import SetupError, ToolError

SPARE = 32_000_000
"""Bytes that stay free on the board's disk, for its log and its package lists."""
MEANINGS = {
    3: "the update is not signed by whom the board trusts", 4: "the update arrived damaged", 5: "the update is not for this board",
    6: "the update is not newer than what the board has had", 7: "the board's disk has no room for it",
    8: "the new version did not answer; the one before it answers again",
    9: "nothing answers there; the version before is in place again", 10: "another update is at work there",
    11: "there is no version to go back to", 12: "the board's disk reports errors",
    13: "the board's settings or programs do not allow it",
}  # fmt: skip
"""The agent's exit codes."""
UNTRIED = (3, 5, 6, 7, 10, 11, 13)
"""Those after which somebody has to do something first; the others came of trying."""


@dataclass(frozen=True, kw_only=True)
class Deployment:
    """A board that a model is brought to."""

    line: Line
    device: Device
    say: Callable[[str], None]
    """Gets every line that programs print there."""

    def suits(self, target: Mapping[str, Any], *, memory: int = 0) -> None:
        """Raise SetupError when that machine is not what the target says, or when nothing could be installed there.

        `memory`: bytes that the model takes there.
        """
        there = self.device.machine
        if target["arch"] != there.arch:
            raise SetupError(
                f"that machine is {there.machine}, and the target {target['name']} is {target['arch']}",
                hint="is it the right board? else name its target: --target",
            )
        if lacks := machines.missing(target.get("isa", ""), there):
            raise SetupError(
                f"the processor there ({there.processor or there.machine}) lacks {', '.join(lacks)}, which programs for "
                f"{target['name']} use: they would die of an illegal instruction",
                hint="name the target that the board is: --target",
            )
        if there.memory is not None and there.memory < memory:
            raise SetupError(
                f"the model takes about {memory / 1e6:,.0f} MB of memory, and the board has {there.memory / 1e6:,.0f} MB",
                hint="a smaller file (--variant), or a shorter context ([serve] context)",
            )
        self.device.as_root("true")
        if not self.device.systemd and not self.device.restart:
            raise SetupError(
                "no systemd runs on that board, and nothing says how a server is started there",
                hint='write /etc/edgeft/agent.json there: {"restart": ["/path/to/program", "{name}"]} (docs/deploy.md)',
            )

    def packages(self, files: Sequence[Path]) -> None:
        """Send Debian packages and install them. Raises SetupError on another system, ToolError when dpkg fails."""
        if not self.device.dpkg:
            raise SetupError(
                "that system is no Debian: it has no dpkg",
                hint='copy a bundle there by hand: [[export]] kind = "bundle" in the target file, then its run.sh',
            )
        names = self.send(files, room=2 * sum(f.stat().st_size for f in files))
        code = self.run("packages", devices.dpkg(names))
        if code:
            why = "was cut off there" if code is None else f"ended with {code} there"
            raise ToolError(f"dpkg {why}; what it said stands above", hint="the same command tries again")

    def restart(self, name: str) -> None:
        """Start a model's server anew. Raises ToolError when it does not even start."""
        if self.run("restart", devices.restart(self.device, name)) != 0:
            raise ToolError(
                f"the server of {name} could not be started on the board",
                hint=f"what it says there: journalctl --namespace=edgeft -u edgeft-{name}" if self.device.systemd
                else "what /etc/edgeft/agent.json names as restart failed",
            )  # fmt: skip

    def trust(self, root: Path) -> None:
        """Make `root` (root.json of a folder of keys) what the board trusts from the start."""
        (name,) = self.send([root])
        if self.run("trust", devices.trust(name)) != 0:
            raise ToolError(f"{devices.TRUST} could not be written on the board")

    def send(self, files: Sequence[Path], *, room: int = 0) -> list[str]:
        """Put files into the work folder; their names there. `room`: bytes that they need when they are unpacked.

        A transfer that is cut off goes on over a new connection. Raises SetupError when the disk there is too small.
        """
        named = {_sha256(path): path for path in files}
        missing = self.line.ask(lambda board: board.missing(named))
        for free, needed, where in (
            (self.device.machine.disk, missing + SPARE, "in the work folder"),
            (self.device.room, room + SPARE, "below /var/lib"),
        ):
            if free is not None and free < needed:
                raise SetupError(
                    f"{needed / 1e6:,.0f} MB are needed {where} on the board, and {free / 1e6:,.0f} MB are free",
                    hint="make room there, or take a smaller file (--variant)",
                )
        self.line.ask(lambda board: board.put(named))
        return list(named)

    def run(self, label: str, command: str) -> int | None:
        """Run a command as root to its end; its exit code, None when it was ended by a power failure or killed."""
        as_root = self.device.as_root(command)
        if not job.start(self.line, f": {shlex.quote(label)}\n{as_root}"):
            raise ToolError(
                "something else of a deployment is at work on that board", hint="try again when it has ended"
            )
        code = job.follow(self.line, self.say)
        job.forget(self.line)
        return code

    def agent(self, *words: str) -> None:
        """Run the update agent there. Raises SetupError or ToolError with what its exit code means."""
        judge(self.run(" ".join(words[:1]), devices.agent(*words)))

    def models(self) -> list[dict[str, Any]]:
        """What the agent says of each model there."""
        return self.line.ask(lambda board: devices.models(board, self.device))


def judge(code: int | None) -> None:
    """Raise what an exit code of the agent means; nothing for 0."""
    if code is None:
        raise ToolError(
            "the agent on the board was ended before it was done: by a power failure, or because memory ran out",
            hint="the version before or the new one answers there: --status says which",
        )
    if code:
        meaning = MEANINGS.get(code, f"the agent on the board ended with {code}")
        raise (SetupError if code in UNTRIED else ToolError)(f"{meaning}; what it said stands above")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
