"""What of edgeft is on a board, asked before anything is sent; and the shell commands that put it there."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from edgeft.boards import machine as machines
from edgeft.boards.machine import Machine
from edgeft.boards.ssh import Ssh
from edgeft.errors import SetupError, ToolError

AGENT = "/usr/lib/edgeft/edgeft-update"
TRUST = "/etc/edgeft/trust/root.json"

_LOOK = (
    (
        machines.LOOK
        + r"""
say user "$(id -un) $(id -u)"
say sudo "$(sudo -n true 2>/dev/null && echo yes)"
say dpkg "$(command -v dpkg)"
say systemd "$([ -d /run/systemd/system ] && echo yes)"
say restart "$([ -f /etc/edgeft/agent.json ] && echo yes)"
say agent "$([ -f {agent} ] && echo yes)"
say python "$(python3 -c 'import sys; sys.version_info >= (3, 10) and print("yes")' 2>/dev/null)"
say trust "$(sha256sum {trust} 2>/dev/null | cut -d ' ' -f 1)"
say runtime "$(dpkg-query -W -f '${Package}/${Version}/${db:Status-Status} ' 'edgeft-runtime-*' 2>/dev/null)"
say room_kb "$(df -Pk /var/lib 2>/dev/null | awk 'NR == 2 { print $4 }')"
"""
    )
    .replace("{agent}", AGENT)
    .replace("{trust}", TRUST)
)

_RESTART = """import json, subprocess, sys
with open("/etc/edgeft/agent.json") as file:
    command = json.load(file)["restart"]
sys.exit(subprocess.call([word.replace("{name}", sys.argv[1]) for word in command]))
"""


@dataclass(frozen=True, kw_only=True)
class Device:
    """A board as `deploy` finds it."""

    machine: Machine
    user: str
    root: bool
    sudo: bool
    """Whether sudo asks for no password."""
    dpkg: bool
    systemd: bool
    restart: bool
    """Whether /etc/edgeft/agent.json is there, which says how a server is restarted without systemd."""
    agent: bool
    python: bool
    """Whether there is a Python that can run the agent: 3.10 or newer."""
    trust: str
    """sha256 of the root metadata that the device trusts from the start; "" if it has none."""
    runtime: tuple[str, str]
    """Package and version of the installed programs; two "" without."""
    room: int | None
    """Free bytes below /var/lib."""

    def as_root(self, command: str) -> str:
        """A shell command as root runs it. Raises SetupError where there is no way without a password."""
        if self.root:
            return command
        if self.sudo:
            return f"sudo -n sh -c {shlex.quote(command)}"
        raise SetupError(
            f"{self.user} is not root there, and sudo asks for a password",
            hint=f"log in as root, or let sudo ask for none: echo '{self.user} ALL=(ALL) NOPASSWD: ALL' | "
            f"sudo tee /etc/sudoers.d/edgeft, on the board",
        )


def look(board: Ssh) -> Device:
    """Ask. Raises SetupError when that is no Linux."""
    said = board.shell(_LOOK)
    told = machines.told(said)
    user, _, number = told.get("user", "").partition(" ")
    installed = [p.split("/") for p in told.get("runtime", "").split() if p.endswith("/installed")]
    return Device(
        machine=machines.read(said), user=user, root=number == "0", sudo="sudo" in told, dpkg="dpkg" in told,
        systemd="systemd" in told, restart="restart" in told, agent="agent" in told,
        python="python" in told, trust=told.get("trust", ""),
        runtime=(installed[0][0], installed[0][1]) if installed else ("", ""),
        room=int(told["room_kb"]) * 1024 if told.get("room_kb", "").isdigit() else None,
    )  # fmt: skip


def models(board: Ssh, device: Device) -> list[dict[str, Any]]:
    """What the agent says of each model (`edgeft-update status --json`).

    Raises ToolError with the agent's words when it does not say it.
    """
    # Its messages go to standard error, which the connection does not keep apart.
    said = board.shell(
        device.as_root(f"{AGENT} status --json 2>/dev/null || {AGENT} status --json") + "; true"
    )
    start = said.find("{")
    try:
        found = json.loads(said[start : said.rfind("}") + 1]) if start >= 0 else None
    except ValueError:
        found = None
    if not isinstance(found, dict) or not isinstance(found.get("models"), list):
        raise ToolError(f"the agent on the board does not say what is installed: {said.strip()[-300:]}")
    return [m for m in found["models"] if isinstance(m, dict) and isinstance(m.get("name"), str)]


def dpkg(files: Sequence[str]) -> str:
    """The command that installs packages which lie in the work folder."""
    given = " ".join(shlex.quote(f"./{name}") for name in files)
    # A dpkg that was cut off by a power failure wants this first; with nothing to do it does nothing.
    return (
        f"export DEBIAN_FRONTEND=noninteractive; dpkg --configure -a; dpkg --force-confold --install {given}"
    )


def trust(file: str) -> str:
    """The command that makes a file of the work folder what the device trusts from the start."""
    return f"mkdir -p {TRUST.rpartition('/')[0]} && cp ./{shlex.quote(file)} {TRUST}.new && chmod 644 {TRUST}.new && sync {TRUST}.new && mv {TRUST}.new {TRUST}"


def agent(*words: str) -> str:
    """The command that runs the agent."""
    return shlex.join([AGENT, *words])


def restart(device: Device, name: str) -> str:
    """The command that starts a model's server anew: systemd's, else what /etc/edgeft/agent.json names."""
    if device.systemd:
        return shlex.join(["systemctl", "restart", f"edgeft-{name}.service"])
    return shlex.join(["python3", "-c", _RESTART, name])
