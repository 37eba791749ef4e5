"""An update, from the file to the version that answers: check everything, write beside, switch, ask, keep or go back."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from edgeft.agent import delta, description, disk, health, service, trust, versions
from edgeft.agent.archive import PAYLOAD, Archive, open_update
from edgeft.agent.description import Canary, Description, Part
from edgeft.agent.errors import (
    AgentError,
    Damaged,
    DiskFault,
    NoAnswer,
    NoRoom,
    NotForThisDevice,
    NotNewer,
    NotTrusted,
    Silent,
)
from edgeft.agent.places import Places, Settings, address
from edgeft.agent.trust import Signed
from edgeft.agent.versions import Model, State, Trial

Say = Callable[[str], None]
_BLOCK = 4096


def install(places: Places, settings: Settings, path: Path, say: Say) -> None:
    """Install an update file. On any AgentError the version from before is current, and answers unless it is Silent."""
    service.ready(places, settings)
    with open_update(path) as file:
        signed = trust.verified(places, file.roots, file.targets)
        wanted = _read(file, signed)
        model = Model(places=places, name=wanted.name)
        if wanted.name not in places.names():
            there = ", ".join(places.names()) or "none"
            raise NotForThisDevice(
                f"the update is for a model named {wanted.name}; this device's are: {there}"
            )
        mend(model, settings, say)
        state = model.state()
        _newer(model, state, wanted, signed)
        for name, (length, sha256) in sorted(signed.files.items()):
            file.check(PAYLOAD + name, length=length, sha256=sha256)
        bases = _bases(model, wanted)
        say(f"{wanted.name} {wanted.sequence} ({wanted.label}, {wanted.kind}): signed and undamaged")
        place = _write(file, model, wanted, bases)
    say("written; asking it a question")
    accepted = replace(
        state, highest=wanted.sequence, signers=signed.signers, previous=model.current(), trial=None,
        last={"sequence": wanted.sequence, "result": "installed", "said": ""},
    )  # fmt: skip
    said = change(model, settings, place, state, accepted, wanted.canaries)
    say(f"{wanted.name} {wanted.sequence} answers: {said!r}")


def rollback(places: Places, settings: Settings, name: str, say: Say, *, factory: bool = False) -> None:
    """Back to the version before the current one, or to the one that a package installed. Later files must still be
    newer than the highest that was ever accepted; the version that is left stays, and another rollback returns to it."""
    service.ready(places, settings)
    model = known(places, name)
    mend(model, settings, say)
    state = model.state()
    if factory:
        state = replace(state, previous=versions.FACTORY)
    place = versions.before(model, state)
    number = versions.sequence(place)
    done = replace(
        state, previous=model.current(), last={"sequence": number, "result": "rolled back", "said": ""}
    )
    said = change(model, settings, place, state, done, ())
    say(f"{name} {number} answers: {said!r}")


def known(places: Places, name: str) -> Model:
    """Raises NotForThisDevice."""
    if name not in places.names():
        raise NotForThisDevice(
            f"this device has no model named {name}; it has: {', '.join(places.names()) or 'none'}"
        )
    return Model(places=places, name=name)


def mend(model: Model, settings: Settings, say: Say) -> None:
    """Repair what an interruption left, and restart the server if another version is current for that."""
    moved, said = versions.repair(model)
    if said:
        say(said)
    if moved:
        service.restart(model.places, settings, model.name)


def change(
    model: Model, settings: Settings, place: str, state: State, accepted: State, canaries: tuple[Canary, ...]
) -> str:
    """Switch to a version, and keep it if it answers; return its answer. `state` is the journal from before, `accepted`
    the one for that case; writing it is the moment from which the new version counts.

    Otherwise the version before is switched back, restarted and asked. Raises NoAnswer, or Silent if that fails too.
    """
    back = model.pointed()  # not whole, perhaps: then the update is what saves the device
    try:
        model.save(replace(state, trial=Trial(place=place, back=back)))
    except OSError:
        model.prune(state)
        raise
    try:
        model.switch(place, back=back)
        said = asked(model, settings, place, canaries)
        model.save(accepted)
    except BaseException as error:
        _undo(model, settings, state, place, back, error)
        raise
    model.prune(accepted)
    return said


def asked(model: Model, settings: Settings, place: str, canaries: tuple[Canary, ...] = ()) -> str:
    """Restart the server and ask it. Raises NoAnswer."""
    service.restart(model.places, settings, model.name)
    return health.ask(
        address(model.places, model.name), settings, folder=model.path(place), canaries=canaries,
        failed=lambda: service.state(model.places, settings, model.name) == "failed",
    )  # fmt: skip


def _undo(
    model: Model, settings: Settings, state: State, place: str, back: str, error: BaseException
) -> None:
    number = versions.sequence(place)
    said = str(error) if isinstance(error, AgentError) else f"interrupted ({type(error).__name__})"
    done = replace(state, trial=None, last={"sequence": number, "result": "did not answer", "said": said})
    model.switch(back)
    try:
        asked(model, settings, back)
    except AgentError as second:
        raise Silent(
            f"{model.name} {number}: {said}; and {versions.sequence(back)}, which is current again, does not answer: {second}"
        ) from error
    finally:
        model.prune(done)  # before the journal, since the disk may be full
        model.save(done)
    if isinstance(error, NoAnswer):
        raise NoAnswer(f"{model.name} {number}: {said}; {versions.sequence(back)} answers again") from error


def _read(file: Archive, signed: Signed) -> Description:
    """What to do, once it is certain who says so. Raises Damaged, NotTrusted."""
    if missing := set(signed.files) - file.payloads:
        raise Damaged(f"{file.path.name} lacks {min(missing)}")
    if more := file.payloads - set(signed.files):
        raise NotTrusted(f"{file.path.name} holds {min(more)}, which nobody signed")
    if description.FILE not in signed.files:
        raise Damaged(f"{file.path.name} has no {description.FILE}")
    length, sha256 = signed.files[description.FILE]
    name = PAYLOAD + description.FILE
    file.check(name, length=length, sha256=sha256)
    found = description.read(file.text(name))
    if found.sequence != signed.version:
        raise Damaged(f"{file.path.name} is number {found.sequence}, but signed as number {signed.version}")
    for part in found.files.values():
        if part.how == "whole" and signed.files.get(part.target) != (part.size, part.sha256):
            raise Damaged(f"{file.path.name} says two things of {part.target}")
        if part.how == "delta" and part.target not in signed.files:
            raise Damaged(f"{file.path.name} lacks {part.target}")
    return found


def _newer(model: Model, state: State, wanted: Description, signed: Signed) -> None:
    floor = 0 if trust.outlived(state.signers, signed) else state.highest
    if wanted.sequence <= floor:
        raise NotNewer(
            f"the update is number {wanted.sequence}; this device has had number {floor} of {model.name}"
        )
    if f"versions/{wanted.sequence}" in model.places_there():
        raise NotNewer(f"this device has number {wanted.sequence} of {model.name} already")


def _bases(model: Model, wanted: Description) -> dict[str, Path]:
    """The file on the device for every part that is made from one, its sha256 checked. Raises NotForThisDevice."""
    found = {}
    places = [p for p in (model.current(), model.state().previous, versions.FACTORY) if p is not None]
    for name, part in wanted.files.items():
        if part.how == "whole":
            continue
        files = dict.fromkeys(model.path(place) / name for place in places)
        fitting = (f for f in files if f.is_file() and not f.is_symlink() and disk.digest(f) == part.base)
        if (base := next(fitting, None)) is None:
            has = next((disk.digest(f)[:12] for f in files if f.is_file()), "no such file")
            raise NotForThisDevice(
                f"the update builds on {name} with sha256 {part.base[:12]}…, which this device does not have (it has {has})"
            )
        if part.how == "base" and base.stat().st_size != part.size:
            raise Damaged(f"the update says that {name} has {part.size} bytes; it has {base.stat().st_size}")
        found[name] = base
    return found


def _write(file: Archive, model: Model, wanted: Description, bases: dict[str, Path]) -> str:
    """The new version as a folder with a number: every byte on the disk, and read back from it."""
    aside = model.versions / f"{wanted.sequence}{disk.ASIDE}"
    with disk.sentences():
        disk.make_folder(model.versions)
        _room(model, wanted, bases)
        try:
            disk.make_folder(aside)
            for name, part in sorted(wanted.files.items()):
                disk.make_folder((aside / name).parent)
                _make(file, part, aside / name, bases.get(name))
            text = file.text(PAYLOAD + description.FILE)
            disk.write_new(aside / description.FILE, [text])
            place = f"versions/{wanted.sequence}"
            disk.publish(aside, model.path(place))
        except BaseException:
            if aside.exists():
                disk.discard(aside)
            raise
    return place


def _make(file: Archive, part: Part, out: Path, base: Path | None) -> None:
    if part.how == "base" and base is not None:
        try:
            os.link(base, out)
            disk.sync_file(out)
            return
        except OSError:  # on another disk, or one without hard links
            with base.open("rb") as source:
                disk.write_new(out, disk.chunks(source), executable=part.executable)
    elif part.how == "delta" and base is not None:
        try:
            delta.apply(base, file.open(PAYLOAD + part.target), out)
        except ValueError as error:
            raise Damaged(f"{out.name} could not be made: {error}") from error
        out.chmod(0o755 if part.executable else 0o644)
        disk.sync_file(out)
    else:
        disk.write_new(out, disk.chunks(file.open(PAYLOAD + part.target)), executable=part.executable)
    if out.stat().st_size != part.size or disk.digest(out, from_disk=True) != part.sha256:
        raise DiskFault(f"{out.name} was read back from the disk as something else than what was written")


def _room(model: Model, wanted: Description, bases: dict[str, Path]) -> None:
    """Raises NoRoom. Where it helps, the version before the current one goes first: there is room for two then."""
    need = _need(model, wanted, bases) + disk.RESERVE
    if (have := disk.free(model.versions)) >= need:
        return
    state = model.state()
    old = model.path(state.previous) if state.previous else None
    spare = old and state.previous != model.current() and not any(old in b.parents for b in bases.values())
    if old and spare and old.is_dir() and have + disk.held(old) >= need:
        state = replace(state, previous=None)
        model.save(state)
        model.prune(state)
        have = disk.free(model.versions)
    if have < need:
        raise NoRoom(
            f"the update needs {need / 1e6:,.0f} MB of free disk, {disk.RESERVE / 1e6:.0f} of them to stay free; there are {have / 1e6:,.0f}"
        )


def _need(model: Model, wanted: Description, bases: dict[str, Path]) -> int:
    device = model.versions.stat().st_dev
    shared = {n for n, p in wanted.files.items() if p.how == "base" and bases[n].stat().st_dev == device}
    return sum(-(-p.size // _BLOCK) * _BLOCK + _BLOCK for n, p in wanted.files.items() if n not in shared)
