"""Where everything lies on the device, and the two settings files that the agent reads."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

from edgeft.agent.errors import Unready

NAME = re.compile(r"[a-z0-9][a-z0-9.-]{0,99}")
"""A model's name, as edgeft makes it (edgeft.bundle.launch.slug): it names folders and units."""


@dataclass(frozen=True, kw_only=True)
class Places:
    """All paths, below `root` (`/` on a device)."""

    root: Path

    @property
    def data(self) -> Path:
        return self.root / "var/lib/edgeft"

    @property
    def models(self) -> Path:
        return self.data / "models"

    @property
    def anchor(self) -> Path:
        """The root of trust that came with the device."""
        return self.root / "etc/edgeft/trust/root.json"

    @property
    def roots(self) -> Path:
        """Newer roots that updates brought, as N.root.json."""
        return self.data / "trust"

    def factory(self, name: str) -> Path:
        """The model as a package installed it; absent on images."""
        return self.root / "usr/share/edgeft" / name

    def names(self) -> list[str]:
        """The models of this device."""
        found = set()
        for folder, sign in ((self.models, "."), (self.root / "usr/share/edgeft", "model.gguf")):
            if folder.is_dir():
                found |= {p.name for p in folder.iterdir() if NAME.fullmatch(p.name) and (p / sign).exists()}
        return sorted(found)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """/etc/edgeft/agent.json; without the file, these."""

    restart: tuple[str, ...] = ()
    """What restarts the server where no systemd does: program and arguments, `{name}` is the model. It ends when the
    old server is gone and the new one is starting, and exits with 0. Empty: systemctl restart edgeft-NAME."""
    start_seconds: float = 300
    """How long a server may take to load its model."""
    answer_seconds: float = 120
    """How long it may take for the answer to one question."""


@dataclass(frozen=True, kw_only=True)
class Address:
    """Where a model's server listens, as seen from this machine."""

    host: str
    port: int
    key: str


def settings(places: Places) -> Settings:
    """Raises Unready for a file that is not what it should be."""
    path = places.root / "etc/edgeft/agent.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return Settings()
    except (OSError, ValueError) as error:
        raise Unready(f"{path} cannot be read: {error}") from None
    known = {"restart", "start_seconds", "answer_seconds"}
    if not isinstance(found, dict) or not set(found) <= known:
        raise Unready(f"{path} must hold an object with nothing but {', '.join(sorted(known))}")
    command = found.get("restart", [])
    if not isinstance(command, list) or not all(isinstance(word, str) for word in command):
        raise Unready(f"{path}: restart must be a list of words, the program first")
    times = {key: found[key] for key in known - {"restart"} if key in found}
    for key, value in times.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 86400:
            raise Unready(f"{path}: {key} must be a number of seconds, not {value!r}")
    return Settings(restart=tuple(command), **times)


def address(places: Places, name: str) -> Address:
    """From /etc/edgeft/NAME.env and the device's key. Raises Unready for a port that is none."""
    path = places.root / f"etc/edgeft/{name}.env"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    given = dict(line.split("=", 1) for line in lines if "=" in line and not line.startswith("#"))
    host, port = given.get("EDGEFT_HOST") or "127.0.0.1", given.get("EDGEFT_PORT") or "8080"
    host = {"0.0.0.0": "127.0.0.1", "::": "::1", "localhost": "127.0.0.1"}.get(host, host)
    if not port.isdigit() or not 0 < int(port) < 65536:
        raise Unready(f"{path}: EDGEFT_PORT is {port!r}, which is no port")
    try:
        key = (places.data / "api-key").read_text(encoding="ascii").split()
    except (OSError, ValueError):
        key = []
    return Address(host=host, port=int(port), key=key[0] if key else "")
