"""deploy: the finished model onto a board over ssh, first as packages, then as signed updates; back again, and what is there."""

from __future__ import annotations

import hashlib
import shlex
import tempfile
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeft import console
from edgeft.boards import device as devices
from edgeft.boards import job
from edgeft.boards.deployment import Deployment, judge
from edgeft.boards.job import Line
from edgeft.boards.ssh import Ssh, connected
from edgeft.commands.building import read
from edgeft.errors import EdgeftError, RecipeError, SetupError, ToolError
from edgeft.plan import plan as make_plan
from edgeft.stage import digest
from edgeft.store import Store, read_manifest

if TYPE_CHECKING:
    from edgeft.agent.description import Description
    from edgeft.boards.device import Device
    from edgeft.stage import Artifact

FOLDER = ".cache/edgeft-deploy"
"""The work folder on the board, below the user's home."""
MANIFEST = "manifest.json"
"""Lists the other files of a version, and is not among those that a package's has on record."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """The command's options."""

    target: str = ""
    variant: str = ""
    keys: Path | None = None
    label: str = ""
    """Of the update that is made, for people."""
    update: Path | None = None
    rollback: bool = False
    status: bool = False
    programs: bool = False
    passphrase_env: str = ""
    folder: str = ""
    ssh_options: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Built:
    """The finished packages."""

    name: str
    """The model's name on the device."""
    target: Mapping[str, Any]
    folder: Path
    versions: Mapping[str, str]
    """Of runtime.deb and model.deb."""
    memory_mb: float
    """Predicted there."""
    inputs: Mapping[str, Artifact]
    """The results that the packages were made of."""

    def packages(self, *names: str) -> list[Path]:
        """Their files."""
        return [self.folder / name for name in names]


def deploy(recipe: Path, url: str, store_dir: Path, asked: Asked) -> None:
    """Bring the recipe's model onto a board, or do what `asked` says instead.

    Returns when the model that was asked for answers there. Raises SetupError when the board, the keys or this build do
    not allow it (then nothing was changed), ToolError when the board tried and went back, or the connection was lost for
    good, RecipeError when the recipe makes no Debian package.
    """
    if sum((bool(asked.update), asked.rollback, asked.status, asked.programs)) > 1:
        raise SetupError(
            "--update, --rollback, --status and --programs exclude one another", hint="give one of them"
        )
    built = None if asked.status or asked.update else _built(recipe, store_dir, asked)

    def reach() -> AbstractContextManager[Ssh]:
        return connected(url, options=asked.ssh_options, folder=asked.folder, keep=True, usual=FOLDER)

    with Line(reach) as line:
        with console.watching("look at the board"):
            device = line.ask(devices.look)
        _line(f"board    {_board(device)}")
        there = Deployment(line=line, device=device, say=lambda text: _line(f"  {text}"))
        if _earlier(there, asked):
            return
        if asked.status:
            _status(there)
        elif asked.update:
            _update(there, asked.update)
        elif built and asked.rollback:
            with console.watching("go back"):
                there.agent("rollback", built.name)
            _version(there, built.name)
        elif built:
            _bring(there, recipe, store_dir, built, asked)
        line.ask(lambda board: board.clear())


def _built(recipe: Path, store_dir: Path, asked: Asked) -> Built:
    """The packages of a finished build. Raises RecipeError when it makes none, EdgeftError when it is not finished."""
    steps = make_plan(*read(recipe, asked.target))
    steps_of = {
        s.variant: s for s in steps if s.stage.id == "export/deb" and asked.variant in ("", s.variant)
    }
    if not steps_of:
        raise RecipeError(
            f"{recipe} makes no Debian packages" + (f" of {asked.variant!r}" if asked.variant else ""),
            hint='[[export]] kind = "deb" in its target file makes them; then build again',
        )
    step = next(iter(steps_of.values()))
    artifact, device = Store(store_dir).get(step), step.find("device")
    if artifact is None or device is None:
        raise EdgeftError(
            f"the packages of {recipe} are not built in {store_dir}",
            hint=f"edgeft build {shlex.quote(str(recipe))}",
        )
    packages = {p["file"]: p for p in artifact.facts["packages"]}
    return Built(
        name=packages["model.deb"]["package"].removeprefix("edgeft-"), target=device.params.model_dump(mode="json"),
        folder=artifact.path, versions={file: p["version"] for file, p in packages.items()},
        memory_mb=float(artifact.facts["memory_mb"]["total"]),
        inputs={name: found for name, s in step.inputs.items() if (found := Store(store_dir).get(s))},
    )  # fmt: skip


def _bring(there: Deployment, recipe: Path, store_dir: Path, built: Built, asked: Asked) -> None:
    """Packages where the model is not there yet, else an update of it."""
    there.suits(built.target, memory=int(built.memory_mb * 1e6))
    models = there.models() if there.device.agent else []
    known = next((m for m in models if m["name"] == built.name), None)
    if known is None or asked.programs:
        files = ["runtime.deb"] if known else ["runtime.deb", "model.deb"]
        with console.watching("install"):
            there.packages(built.packages(*files))
        _trust(there, asked)
        _runs_python(there)
        there.restart(built.name)
        _answers(there, built.name)
        return
    if there.device.runtime[1] not in ("", built.versions["runtime.deb"]):
        _line(
            f"programs {there.device.runtime[1]} there, {built.versions['runtime.deb']} built: --programs replaces them"
        )
    if not asked.keys:
        raise SetupError(
            f"{built.name} is on the board already, and updates are signed",
            hint="--keys DIR, of `edgeft keys new DIR`; or --update FILE",
        )
    _trust(there, asked)
    if _same(built, known):
        _line(f"{built.name} is up to date there: sequence {known['sequence']}")
        _answers(there, built.name)
        return
    with tempfile.TemporaryDirectory(prefix="edgeft-deploy-") as folder:
        _update(there, _made(recipe, store_dir, asked, known, Path(folder)))


def _trust(there: Deployment, asked: Asked) -> None:
    """Give the board somebody to trust, where it trusts nobody yet."""
    if there.line.ask(devices.look).trust:
        return
    if not asked.keys:
        _line("trust    nobody: the board takes no updates yet; --keys DIR changes that")
        return
    root = asked.keys / "root.json"
    if not root.is_file():
        raise SetupError(f"{root} is not there", hint=f"edgeft keys new {asked.keys}")
    there.trust(root)
    _line(f"trust    {root} is what the board trusts from now on")


def _answers(there: Deployment, name: str) -> None:
    """Have the board ask its model a question."""
    with console.watching("wait for an answer"):
        there.agent("health", name)
    _version(there, name)


def _runs_python(there: Deployment) -> None:
    if not there.device.python:
        raise ToolError(
            "the packages are installed, and whether the model answers is not known: the agent needs Python 3.10 or newer",
            hint="sudo apt install python3 python3-cryptography, on the board; then --status",
        )


def _made(recipe: Path, store_dir: Path, asked: Asked, known: Mapping[str, Any], folder: Path) -> Path:
    """The update that makes what is built of what the board says it has."""
    from edgeft.commands import updating

    assert asked.keys
    made = updating.make_of(
        recipe, store_dir,
        updating.Wanted(
            keys=asked.keys, target=asked.target, variant=asked.variant, label=asked.label, old=_at_hand(store_dir, known["files"]),
            out=folder, passphrase_env=asked.passphrase_env, above=int(known["highest_sequence"] or 0), board=known["files"],
        ),
    )  # fmt: skip
    how = {"full": "whole", "delta": "as a difference to what is there", "adapter": "the adapter alone"}[
        made.kind
    ]
    _line(f"update   sequence {made.sequence}, {how}: {made.bytes / 1e6:,.1f} MB")
    return made.path


def _at_hand(store_dir: Path, files: Mapping[str, str]) -> tuple[Path, ...]:
    """The board's model among what was built here, so that only the difference is sent."""
    wanted = files.get("model.gguf")
    for path in sorted((store_dir / "done").glob("quantize-gguf-*")):
        manifest = read_manifest(path)
        if wanted and manifest and manifest["files"].get("model.gguf", {}).get("sha256") == wanted:
            return (path / "model.gguf",)
    return ()


def _described(file: Path) -> Description:
    """What an update says of itself. Raises DataError when it is none."""
    from edgeft.agent import archive, description
    from edgeft.agent.errors import AgentError
    from edgeft.errors import DataError

    try:
        with archive.open_update(file) as opened:
            return description.read(opened.text(archive.PAYLOAD + description.FILE))
    except AgentError as error:
        raise DataError(f"{file} is no update: {error}", hint="edgeft update makes one") from None


def _same(built: Built, known: Mapping[str, Any]) -> bool:
    """Whether the board's version consists of the very files that were built."""
    from edgeft import staging

    tree = staging.collect(built.inputs)
    new = {name: _sha256(content) for name, content in {**tree.models, **tree.papers}.items()}
    return new == {name: sha256 for name, sha256 in known["files"].items() if name != MANIFEST}


def _update(there: Deployment, file: Path) -> None:
    """Send an update and have it installed; says what came of it even when the board lost its power meanwhile."""
    said = _described(file)
    there.device.as_root("true")
    if not there.device.agent:
        raise SetupError("there is no edgeft on that board yet", hint="without --update it is installed")
    with console.watching("send"):
        (name,) = there.send(
            [file], room=sum(part.size for part in said.files.values() if part.how != "base")
        )
    with console.watching("install"):
        code = there.run("install", devices.agent("install", f"./{name}"))
    if code is None and _current(there, said.name).get("sequence") == said.sequence:
        _answers(there, said.name)  # it was switched to, and recovered after the power failure
        return
    judge(code)
    _version(there, said.name)


def _earlier(there: Deployment, asked: Asked) -> bool:
    """Read the outcome of what a deployment before this one began; whether that is what is asked for now."""
    if not job.exists(there.line):
        return False
    label = there.line.ask(lambda board: board.shell("sed -n 's/^( : //p' job.sh 2>/dev/null; true")).strip()
    _line(f"earlier  a deployment was cut off; what it began there ({label or 'something'}) said:")
    with console.watching("wait for it"):
        code = job.follow(there.line, there.say)
    job.forget(there.line)
    if asked.rollback and "rollback" in label:
        judge(code)
        return True  # a second one would go forth again
    _line(f"earlier  it ended with {'no exit code' if code is None else code}")
    return False


def _status(there: Deployment) -> None:
    if not there.device.agent:
        _line("edgeft   is not installed there")
        return
    for found in there.models():
        _version(there, found["name"])
        there.agent("health", found["name"])


def _version(there: Deployment, name: str) -> None:
    found = _current(there, name)
    if found:
        label = f" ({found['label']})" if found.get("label") else ""
        back = f"; a rollback leads to {found['previous']['sequence']}" if found.get("previous") else ""
        _line(f"version  {name}: sequence {found['sequence']}{label}{back}")


def _current(there: Deployment, name: str) -> dict[str, Any]:
    return next((m for m in there.models() if m["name"] == name), {})


def _board(device: Device) -> str:
    there = device.machine
    sizes = [
        f"{n / 1e6:,.0f} MB {what}"
        for n, what in ((there.memory, "of memory"), (device.room, "free on its disk"))
        if n
    ]
    return ", ".join([there.processor or there.machine, there.system, *sizes, f"as {device.user}"])


def _sha256(content: Path | bytes) -> str:
    if isinstance(content, bytes):
        return hashlib.sha256(content).hexdigest()
    return digest(content)


def _line(text: str) -> None:
    console.out.print(text, markup=False, highlight=False, soft_wrap=True)
