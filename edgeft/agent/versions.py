"""The versions of one model, which of them is current, and the journal that makes an interrupted change repairable.

models/NAME/versions/7/   whole and never changed; a folder with a number is never one that is being made
models/NAME/current       a link to versions/7; none: the model that a package installed
models/NAME/state.json    the journal
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from edgeft.agent import disk
from edgeft.agent.description import FILE
from edgeft.agent.errors import NothingBefore
from edgeft.agent.places import Places

FACTORY = ""
"""The place of the model that a package installed."""
_PLACE = re.compile(r"versions/([0-9]{1,16})")


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A change that nobody has found good yet."""

    place: str
    back: str


@dataclass(frozen=True, kw_only=True)
class State:
    highest: int = 0
    """The highest sequence that was ever accepted. No file with a lower one is taken."""
    signers: tuple[str, ...] = ()
    """The keys that could sign it then."""
    previous: str | None = None
    """Where a rollback leads."""
    trial: Trial | None = None
    last: dict[str, Any] | None = None
    """How the last change ended: sequence, result, said."""


@dataclass(frozen=True, kw_only=True)
class Model:
    """One model of this device."""

    places: Places
    name: str

    @property
    def folder(self) -> Path:
        return self.places.models / self.name

    @property
    def versions(self) -> Path:
        return self.folder / "versions"

    @property
    def link(self) -> Path:
        return self.folder / "current"

    def path(self, place: str) -> Path:
        return self.folder / place if place else self.places.factory(self.name)

    def is_whole(self, place: str) -> bool:
        """Whether a version has every file in the size that was written down for it."""
        folder = self.path(place)
        sizes = {name: entry.get("bytes") for name, entry in self.recorded(place).items()}
        wanted = {"model.gguf": None, "run.sh": None, **sizes}
        try:
            return all(size in (None, (folder / name).stat().st_size) for name, size in wanted.items())
        except OSError:
            return False

    def recorded(self, place: str) -> dict[str, dict[str, Any]]:
        """What was written down of a version's files when it was made: bytes and sha256 by name."""
        for paper in (FILE, "manifest.json"):
            with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
                found = json.loads((self.path(place) / paper).read_text(encoding="utf-8"))["files"]
                return {str(name): dict(entry) for name, entry in found.items()}
        return {}

    def current(self) -> str | None:
        """The place of the version that is served; None when it is not whole, or there is none."""
        place = self.pointed()
        return place if self.is_whole(place) else None

    def pointed(self) -> str:
        """Where the link leads, whatever is there."""
        try:
            place = os.readlink(self.link)  # noqa: PTH115  its text, not a path
        except OSError:
            return FACTORY
        return place if _PLACE.fullmatch(place) else FACTORY

    def state(self) -> State:
        """The journal. Without one, or with one that the disk has lost, the current version is the last accepted one."""
        try:
            found = json.loads((self.folder / "state.json").read_text(encoding="utf-8"))
            trial = Trial(**found["trial"]) if found["trial"] else None
            previous = found["previous"]
            for place in (previous, *(asdict(trial).values() if trial else ())):
                if place and not _PLACE.fullmatch(place):
                    raise ValueError(place)
            return State(highest=int(found["highest"]), signers=tuple(found["signers"]), previous=previous, trial=trial,
                         last=found.get("last"))  # fmt: skip
        except (OSError, ValueError, KeyError, TypeError):
            place = self.current()
            there = self.places_there() if place is None else [place]
            return State(highest=max(map(sequence, there), default=0))

    def save(self, state: State) -> None:
        disk.make_folder(self.folder)
        text = json.dumps({"format": 1, **asdict(state)}, indent=1) + "\n"
        disk.write_whole(self.folder / "state.json", text.encode())

    def switch(self, place: str, *, back: str = FACTORY) -> None:
        """Make a version current, with the way `back` prepared."""
        if back:
            disk.prepare(self.link, back)
        disk.switch(self.link, place)

    def places_there(self) -> list[str]:
        """Every whole or half version with a number, lowest first."""
        names = [p.name for p in self.versions.iterdir()] if self.versions.is_dir() else []
        return sorted((f"versions/{n}" for n in names if n.isdigit()), key=sequence)

    def prune(self, state: State) -> None:
        """Delete what neither is served nor can be gone back to, and what was never finished."""
        trial = asdict(state.trial).values() if state.trial else ()
        keep = {self.pointed(), state.previous, *trial}
        for folder in sorted(self.versions.iterdir()) if self.versions.is_dir() else ():
            ours = folder.name.isdigit() or folder.name.endswith(disk.ASIDE)
            if ours and f"versions/{folder.name}" not in keep:
                disk.discard(folder)
        for folder in (self.folder, self.places.roots):
            for path in folder.glob("*" + disk.ASIDE) if folder.is_dir() else ():
                path.unlink()


def sequence(place: str) -> int:
    """The number of a version; 0 for the model that a package installed."""
    found = _PLACE.fullmatch(place)
    return int(found[1]) if found else 0


def repair(model: Model) -> tuple[bool, str]:
    """Put right what an interruption has left: a version on trial goes, the one before it is current again.

    Returns whether another version is current now, and a sentence; empty when nothing was wrong. May itself be
    interrupted anywhere, and repeated.
    """
    state, said, moved = model.state(), "", False
    if state.trial:
        number = sequence(state.trial.place)
        said = f"{model.name}: version {number} had not been found good when it was interrupted, so it goes"
        before = model.current()
        if before != state.trial.back:
            model.switch(state.trial.back)
            moved = True
        last = {"sequence": number, "result": "interrupted", "said": said}
        state = replace(state, trial=None, last=last)
        model.prune(state)  # first: the disk may be full
        model.save(state)
    if model.current() is None and (place := _standing(model, [state.previous, *reversed(model.places_there()), FACTORY])) is not None:  # fmt: skip
        model.switch(place)
        moved = True
        said = f"{model.name}: the current version is not whole, so version {sequence(place)} takes its place"
        model.save(replace(state, last={"sequence": sequence(place), "result": "repaired", "said": said}))
    if model.current() is not None:  # else: whatever is left may be of use to somebody
        model.prune(state)
    return moved, said


def before(model: Model, state: State) -> str:
    """Where a rollback leads. Raises NothingBefore."""
    if state.previous is None or state.previous == model.current() or not model.is_whole(state.previous):
        raise NothingBefore(f"{model.name} has no version to go back to")
    return state.previous


def _standing(model: Model, places: Sequence[str | None]) -> str | None:
    return next((p for p in places if p is not None and model.is_whole(p)), None)
