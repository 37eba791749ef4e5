"""update: one signed file that brings the model of a built recipe onto devices that have an older one."""

from __future__ import annotations

import os
import shlex
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from edgeft import console
from edgeft.commands.building import read
from edgeft.commands.signing import asking, ready
from edgeft.errors import DataError, EdgeftError, RecipeError
from edgeft.plan import plan as make_plan
from edgeft.store import Store
from edgeft.updates.make import Kind

if TYPE_CHECKING:
    from edgeft.stage import Artifact, Step
    from edgeft.updates.make import Made


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """The command's options."""

    keys: Path
    target: str = ""
    variant: str = ""
    name: str = ""
    """What the model is called on the device, where that is not the build's own name for it."""
    label: str = ""
    sequence: int = 0
    old: tuple[Path, ...] = ()
    """What --from names: the version on the devices, and before it what it builds on."""
    kind: Kind = "auto"
    out: Path | None = None
    """A file, or a folder that is there; the current one by default."""
    passphrase_env: str = ""
    above: int = 0
    """The highest sequence that the board says it had."""
    board: Mapping[str, str] | None = None
    """sha256 of the model's files on the board, by name."""


def kind_of(word: str) -> Kind:
    """A word as a kind. Raises RecipeError for any other."""
    found: dict[str, Kind] = {kind: kind for kind in get_args(Kind)}
    if word not in found:
        raise RecipeError(f"--kind {word!r} is none", hint=f"choose from {', '.join(found)}")
    return found[word]


def update(recipe: Path, store_dir: Path, wanted: Wanted) -> Path:
    """Make the update file of a finished build, say what is in it, and return where it is."""
    made = make_of(recipe, store_dir, wanted)
    _say(made, wanted.label)
    return made.path


def make_of(recipe: Path, store_dir: Path, wanted: Wanted) -> Made:
    """The update file of a finished build.

    Raises EdgeftError when the build is not finished, which includes its gate: what did not pass is not sent.
    """
    from edgeft import bundle, staging
    from edgeft.updates import make, older

    ready()
    tables = read(recipe, wanted.target)
    store = Store(store_dir)
    with store.building(tables[0].name), console.watching("update"):
        tree = staging.collect(_finished(recipe, make_plan(*tables), store, wanted.variant))
        contents = {**tree.models, **tree.papers}
        contents["manifest.json"] = bundle.manifest_text(bundle.manifest_of(contents, tree.about))
        folder, out = _place(wanted.out)
        with tempfile.TemporaryDirectory(prefix=".update-", dir=folder) as scratch:
            name = wanted.name or tree.settings.name
            old = older.read(wanted.old, Path(scratch))
            if old.name not in ("", name):
                raise DataError(
                    f"{wanted.old[-1]} is an update of {old.name}, and this build is {name}",
                    hint=f"--name {old.name} where the one shall replace the other",
                )
            asked = make.Wanted(
                name=name, label=wanted.label, sequence=wanted.sequence, above=max(wanted.above, old.sequence),
                kind=wanted.kind,
            )  # fmt: skip
            return make.make(
                contents, asked, wanted.keys, asking(wanted.passphrase_env), out=out, folder=folder, old=old.files,
                board=wanted.board,
            )  # fmt: skip


def _finished(recipe: Path, steps: Sequence[Step], store: Store, variant: str) -> dict[str, Artifact]:
    """What an exporter of the variant would be given; of the first one that is finished, when none is named."""
    exports: dict[str, Step] = {}
    for step in steps:
        if step.stage.name == "export":
            exports.setdefault(step.variant, step)
    if not exports:
        raise RecipeError(f"{recipe} names no target, and an update is made for one", hint="--target NAME")
    if variant and variant not in exports:
        raise RecipeError(
            f"{recipe} makes no file {variant!r}", hint=f"choose from {', '.join(sorted(exports))}"
        )
    lacking = ""
    for name in [variant] if variant else exports:
        found = {need: store.get(step) for need, step in exports[name].inputs.items()}
        if all(found.values()):
            return {need: artifact for need, artifact in found.items() if artifact}
        lacking = lacking or f"{name}: no result of {next(need for need, one in found.items() if not one)!r}"
    raise EdgeftError(
        f"{recipe} is not finished in {store.root} ({lacking})",
        hint=f"edgeft build {shlex.quote(os.fspath(recipe))}",
    )


def _place(out: Path | None) -> tuple[Path, Path | None]:
    """The folder to write to, and the file's own name where one was given."""
    if out is None or out.is_dir():
        return out or Path(), None
    out.parent.mkdir(parents=True, exist_ok=True)
    return out.parent, out


def _say(made: Made, label: str) -> None:
    how = {"whole": "whole", "delta": "as a difference", "base": "stays as it is on the device"}
    _line(
        f"{made.path}: {made.name} {label or 'without a label'}, sequence {made.sequence}, {made.kind}, {made.bytes / 1e6:,.1f} MB"
    )
    for file in sorted(made.how):
        if file.endswith(".gguf"):
            _line(
                f"  {file}: {how[made.how[file]]}"
                + (f", {made.sizes[file] / 1e6:,.1f} MB" if made.sizes[file] else "")
            )
    for file, sha256 in sorted(made.base.items()):
        _line(f"  only for devices whose {file} has sha256 {sha256}")
    _line(f"on the device, as root: edgeft-update install {made.path.name}")


def _line(text: str) -> None:
    console.out.print(text, markup=False, highlight=False, soft_wrap=True)
