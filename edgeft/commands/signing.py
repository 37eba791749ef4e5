"""What `edgeft keys` does: make, replace and show the keys that may sign updates for devices."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from edgeft import console
from edgeft.errors import SetupError

if TYPE_CHECKING:
    from edgeft.updates.custody import Held, State
    from edgeft.updates.keys import Ask


def new(
    folder: Path, threshold: int, roots: int, offline: Sequence[Path], variable: str, *, prompt: bool
) -> None:
    """Make the keys, and say what to do with them."""
    from edgeft.updates import custody

    ready()
    made = custody.new(
        folder, threshold=threshold, roots=roots, offline=offline, passphrase=_given(variable, prompt=prompt)
    )
    _say(made)
    _line(f"devices trust {folder / 'root.json'}; it is no secret")
    if not offline:
        _line(
            f"move the root keys out of {folder / 'private'} and keep them where nobody works: see docs/updates.md"
        )


def rotate(
    folder: Path, role: str, key: str, offline: Sequence[Path], variable: str, *, prompt: bool
) -> None:
    """Replace a role's keys."""
    from edgeft.updates import custody

    ready()
    passphrase = _given(variable, prompt=prompt)
    made = custody.rotate(folder, role, asking(variable), key=key, offline=offline, passphrase=passphrase)
    _say(made)
    _line(
        "every update made from now on tells devices of the change; those that get none keep trusting the old keys"
    )


def show(folder: Path, offline: Sequence[Path]) -> None:
    """Print the newest root's keys."""
    from edgeft.updates import custody

    ready()
    _say(custody.show(folder, offline=offline))


def ready() -> None:
    """Raises SetupError where the libraries that sign are not installed."""
    try:
        import securesystemslib.signer  # noqa: F401
        import tuf.api.metadata  # noqa: F401
    except ModuleNotFoundError as error:
        raise SetupError(
            f"updates need python-tuf and cryptography: {error}", hint="pip install 'edgeft[train]'"
        ) from None


def asking(variable: str) -> Ask:
    """Where the passphrase of a key comes from: an environment variable, else whoever sits here."""

    def ask(path: Path) -> bytes:
        if variable:
            return _of_variable(variable)
        if not console.err.is_terminal:
            raise SetupError(
                f"{path} is encrypted, and there is nobody to ask for its passphrase",
                hint="--passphrase-env NAME takes it from an environment variable",
            )
        return _typed(f"passphrase of {path}", twice=False)

    return ask


def _given(variable: str, *, prompt: bool) -> bytes:
    """The passphrase for new keys; empty for none."""
    if variable:
        return _of_variable(variable)
    return _typed("passphrase for the new keys", twice=True) if prompt else b""


def _of_variable(variable: str) -> bytes:
    if not (found := os.environ.get(variable, "")):
        raise SetupError(f"the environment variable {variable} is empty or not there")
    return found.encode()


def _typed(text: str, *, twice: bool) -> bytes:
    found: str = typer.prompt(text, hide_input=True, confirmation_prompt=twice, err=True)
    return found.encode()


def _say(state: State) -> None:
    _line(f"{state.folder}: root {state.version}")
    for role, threshold in state.thresholds.items():
        held = [key for key in state.keys if key.role == role]
        _line(
            f"{role}: {threshold} of {len(held)} must sign"
            if role == "root"
            else f"{role}: signs the updates"
        )
        for key in held:
            _line(f"  {key.keyid[:16]}  Ed25519 {key.fingerprint}  {_whereabouts(key)}")
    for path in state.unused:
        _line(f"{path} signs nothing any more; delete it")


def _whereabouts(key: Held) -> str:
    if key.path is None:
        return "private key not here"
    notes = ["encrypted" if key.encrypted else "not encrypted"]
    if key.exposed:
        notes.append("OTHERS CAN READ IT: chmod 600")
    return f"{key.path} ({', '.join(notes)})"


def _line(text: str) -> None:
    console.out.print(text, markup=False, highlight=False, soft_wrap=True)
