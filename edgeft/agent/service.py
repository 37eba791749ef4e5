"""Restarting a model's server: through systemd, or through the command that /etc/edgeft/agent.json names."""

from __future__ import annotations

import subprocess
from pathlib import Path

from edgeft.agent.errors import NoAnswer, Unready
from edgeft.agent.places import Places, Settings

_SECONDS = 300


def ready(places: Places, settings: Settings) -> None:
    """Raises Unready where nothing could restart the server."""
    if not settings.restart and not _systemd(places):
        raise Unready(
            "no systemd runs here, so /etc/edgeft/agent.json must say how the server is restarted: "
            '{"restart": ["/path/to/program", "{name}"]}'
        )


def restart(places: Places, settings: Settings, name: str) -> None:
    """Raises NoAnswer when the server does not even start."""
    ready(places, settings)
    if settings.restart:
        command = [word.replace("{name}", name) for word in settings.restart]
    else:
        _run(
            ["systemctl", "reset-failed", _unit(name)]
        )  # earlier failures shall not count against this start
        command = ["systemctl", "restart", _unit(name)]
    code, said = _run(command)
    if code:
        raise NoAnswer(
            f"the server did not start: {' '.join(command)} exited with {code}{said and ': ' + said}"
        )


def state(places: Places, settings: Settings, name: str) -> str:
    """What systemd says of the service: active, activating, failed, inactive (stopped by hand) ...; "" without systemd."""
    if settings.restart or not _systemd(places):
        return ""
    return _run(["systemctl", "show", "--property=ActiveState", "--value", _unit(name)])[1]


def _systemd(places: Places) -> bool:
    return places.root == Path("/") and Path("/run/systemd/system").is_dir()


def _unit(name: str) -> str:
    return f"edgeft-{name}.service"


def _run(command: list[str]) -> tuple[int, str]:
    """Exit status, and the last line that it said."""
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=_SECONDS,
            check=False,
        )  # fmt: skip
    except OSError as error:
        return 127, error.strerror or "it cannot be run"
    except subprocess.TimeoutExpired:
        return 124, f"it did not end within {_SECONDS} s"
    lines = done.stdout.decode(errors="replace").strip().splitlines()
    return done.returncode, lines[-1] if lines else ""
