"""deploy: its options. What it does is in `deploying`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edgeft.commands.options import STORE, PassphraseEnv, Recipe, StoreDir, Target, Variant


def deploy(
    recipe: Recipe,
    board: Annotated[str, typer.Argument(help="ssh://user@board[:port].", show_default=False)],
    target: Target = "",
    variant: Variant = "",
    keys: Annotated[
        Path | None,
        typer.Option("--keys", envvar="EDGEFT_KEYS", help="The folder of keys that signs the update."),
    ] = None,
    label: Annotated[str, typer.Option(help="The update's version, for people.")] = "",
    update: Annotated[Path | None, typer.Option(help="Send this update file instead.")] = None,
    rollback: Annotated[
        bool, typer.Option("--rollback", help="Go back to the version before, on the board.")
    ] = False,
    status: Annotated[
        bool, typer.Option("--status", help="Say what is there, and whether it answers.")
    ] = False,
    programs: Annotated[
        bool, typer.Option("--programs", help="Replace llama-server and the update agent.")
    ] = False,
    store: StoreDir = STORE,
    folder: Annotated[str, typer.Option(help="Work folder on the board, absolute; emptied afterwards.")] = "",
    passphrase_env: PassphraseEnv = "",
    ssh_option: Annotated[
        list[str] | None, typer.Option(help="For ssh, such as IdentityFile=KEY; may be repeated.")
    ] = None,
) -> None:
    """Bring a built model onto a board: packages first, then signed updates; and back."""
    from edgeft.commands import deploying

    asked = deploying.Asked(
        target=target, variant=variant, keys=keys, label=label, update=update, rollback=rollback, status=status,
        programs=programs, folder=folder, passphrase_env=passphrase_env, ssh_options=tuple(ssh_option or ()),
    )  # fmt: skip
    deploying.deploy(recipe, board, store, asked)
