"""The agent's command line: install, rollback, status, health, recover."""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from edgeft.agent import disk, errors, health, install, service, trust, versions
from edgeft.agent.description import FILE
from edgeft.agent.errors import AgentError, Busy, Damaged, DiskFault, NoAnswer, NotTrusted, Silent
from edgeft.agent.places import Places, address, settings
from edgeft.agent.versions import Model

_CODES = "\n".join(f"  {e.code:3}  {e.meaning}" for e in errors.ALL)
_EPILOG = f"""exit codes
    0  done; after an update: the new version answers
    2  the command line is wrong
{_CODES}

An update comes by network or on a stick: sudo mount -o ro /dev/sda1 /mnt; sudo edgeft-update install /mnt; sudo umount /mnt
What can restart a server where no systemd does: /etc/edgeft/agent.json, {{"restart": ["/path/to/program", "{{name}}"]}}
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; every refusal is a sentence on standard error."""
    given = _parser().parse_args(arguments)
    places = Places(root=given.root)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, _stop)  # so that a change is undone, not left
    try:
        with disk.sentences():
            code: int = given.run(places, given)
            return code
    except AgentError as error:
        sys.stderr.write(f"edgeft-update: {error}\n")
        return error.code


def _install(places: Places, given: argparse.Namespace) -> int:
    with _alone(places):
        install.install(places, settings(places), _file(given.file), _say)
    return 0


def _rollback(places: Places, given: argparse.Namespace) -> int:
    with _alone(places):
        install.rollback(places, settings(places), given.name, _say, factory=given.factory)
    return 0


def _recover(places: Places, given: argparse.Namespace) -> int:
    """All models, each whatever becomes of the others; no server is started, since none runs yet."""
    worst = 0
    with _alone(places):
        for name in places.names():
            try:
                with disk.sentences():
                    _, said = versions.repair(Model(places=places, name=name))
                if said:
                    _say(said)
            except AgentError as error:
                sys.stderr.write(f"edgeft-update: {name}: {error}\n")
                worst = error.code
    return worst


def _health(places: Places, given: argparse.Namespace) -> int:
    """Ask; when nothing answers, restart the server and ask again."""
    wanted, model = settings(places), install.known(places, given.name)
    if service.state(places, wanted, model.name) in ("inactive", "deactivating"):
        _say(f"{model.name} was stopped by somebody, so it is left alone")
        return 0
    try:
        with _alone(places):
            install.mend(model, wanted, _say)
            place = model.current()
            if place is None:
                raise Silent(f"{model.name} has no version that is whole")
            at = address(places, model.name)
            try:
                said = health.ask(at, wanted, folder=model.path(place))
            except NoAnswer as error:
                if health.working(at, seconds=wanted.answer_seconds):
                    _say(f"{model.name} is at work on somebody's question")
                    return 0
                _say(f"{model.name} does not answer ({error}); restarting it")
                try:
                    said = install.asked(model, wanted, place)
                except NoAnswer as second:
                    raise Silent(f"{model.name} does not answer after a restart either: {second}") from second
    except Busy:
        _say("an update is being installed; it asks for itself")
        return 0
    _say(f"{model.name} answers: {said!r}")
    return 0


def _status(places: Places, given: argparse.Namespace) -> int:
    names = [install.known(places, given.name).name] if given.name else places.names()
    try:
        root: int | None = trust.newest(places).version
        why = ""
    except NotTrusted as error:
        root, why = None, str(error)
    found = [_about(Model(places=places, name=name)) for name in names]
    if given.check:
        for name in names:
            _check(Model(places=places, name=name))
    if given.json:
        _say(json.dumps({"format": 1, "trusted_root": root, "models": found}, indent=1))
        return 0
    _say(f"updates are signed under root of trust {root}" if root else why)
    for m in found:
        label = f" ({m['label']})" if m["label"] else ""
        _say(f"{m['name']}: version {m['sequence']}{label}, in {m['folder']}")
        if m["previous"]:
            _say(f"  a rollback leads to version {m['previous']['sequence']}")
        _say(f"  the next update must be higher than {m['highest_sequence']}")
        if m["trial"] is not None:
            _say(f"  version {m['trial']} is on trial")
        if m["last"]:
            _say("  last: " + " ".join(str(m["last"][k]) for k in ("sequence", "result", "said")).rstrip())
    return 0


def _about(model: Model) -> dict[str, Any]:
    state, place = model.state(), model.current()
    paper = _paper(model, place)
    files = {n: e.get("sha256") for n, e in model.recorded(place).items()} if place is not None else {}
    back = None
    if state.previous is not None and model.is_whole(state.previous):
        back = {
            "sequence": versions.sequence(state.previous),
            "label": _paper(model, state.previous).get("label", ""),
        }
    return {
        "name": model.name, "sequence": None if place is None else versions.sequence(place), "label": paper.get("label", ""),
        "kind": paper.get("kind", ""), "folder": "" if place is None else os.fspath(model.path(place)), "files": files,
        "previous": back, "highest_sequence": state.highest,
        "trial": versions.sequence(state.trial.place) if state.trial else None, "last": state.last,
    }  # fmt: skip


def _paper(model: Model, place: str | None) -> dict[str, Any]:
    try:
        found = json.loads((model.path(place or "") / FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if place is not None and isinstance(found, dict) else {}


def _check(model: Model) -> None:
    """Read every file of the current version. Raises DiskFault."""
    place = model.current()
    if place is None:
        raise DiskFault(f"{model.name} has no version that is whole")
    for name, entry in model.recorded(place).items():
        if disk.digest(model.path(place) / name, from_disk=True) != entry.get("sha256"):
            raise DiskFault(f"{model.path(place) / name} is not what was installed")


def _file(path: Path) -> Path:
    """The update, or the one update in a folder. Raises Damaged."""
    if not path.is_dir():
        return path
    found = sorted(path.glob("*.edgeft"))
    if len(found) != 1:
        names = ", ".join(p.name for p in found) or "none"
        raise Damaged(f"{path} must hold one update, a file that ends in .edgeft; it holds {names}")
    return found[0]


@contextmanager
def _alone(places: Places) -> Iterator[None]:
    """Raises Busy. The lock ends with the process, however it ends."""
    if not places.data.exists():
        disk.make_folder(places.data)
        places.data.chmod(0o711)  # the key lies in it
    handle = os.open(places.data / "agent.lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise Busy("another edgeft-update is at work on this device") from None
    finally:
        os.close(handle)


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def _stop(number: int, frame: object) -> NoReturn:
    for other in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(other, signal.SIG_IGN)  # once is enough; the way back is not to be stopped
    raise SystemExit(128 + number)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="edgeft-update", description="Updates a language model on this device.", epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--root", type=Path, default=Path("/"), help="the device's root folder, for tests")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    one = commands.add_parser("install", help="install an update file; the old version stays for a rollback")
    one.add_argument(
        "file", type=Path, help="NAME-SEQUENCE.edgeft, or a folder that holds one, as a USB stick"
    )
    one.set_defaults(run=_install)

    one = commands.add_parser(
        "rollback", help="go back to the version before; again: forth to the one after it"
    )
    one.add_argument("name", metavar="NAME")
    one.add_argument("--factory", action="store_true", help="to the version that came as a package")
    one.set_defaults(run=_rollback)

    one = commands.add_parser("status", help="which versions are there")
    one.add_argument("name", metavar="NAME", nargs="?")
    one.add_argument("--json", action="store_true")
    one.add_argument("--check", action="store_true", help="read all files and compare their sha256")
    one.set_defaults(run=_status)

    one = commands.add_parser(
        "health", help="ask the model a question; restart the server if it does not answer"
    )
    one.add_argument("name", metavar="NAME")
    one.set_defaults(run=_health)

    one = commands.add_parser("recover", help="at boot: put right what a power loss left behind")
    one.set_defaults(run=_recover)
    return parser
