"""update, keys new, keys rotate, keys show: their options. What they do is in `updating` and `signing`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edgeft.commands.options import STORE, KeysDir, PassphraseEnv, Recipe, StoreDir, Target, Variant

keys = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="The keys that may sign updates for devices."
)
Folder = Annotated[Path, typer.Argument(help="The folder of keys.", show_default=False)]
Offline = Annotated[
    list[Path] | None,
    typer.Option(help="Where root keys are kept instead, such as a stick; may be repeated."),
]
Prompt = Annotated[bool, typer.Option("--passphrase", help="Ask for a passphrase for the new keys.")]


def update(
    recipe: Recipe,
    keys: KeysDir,
    target: Target = "",
    variant: Variant = "",
    name: Annotated[
        str, typer.Option(help="The model's name on the device; the build's own by default.")
    ] = "",
    label: Annotated[str, typer.Option(help="The version, for people, such as 1.1.")] = "",
    sequence: Annotated[int, typer.Option(help="Its number; 0 takes the next.", min=0)] = 0,
    old: Annotated[
        list[Path] | None,
        typer.Option(
            "--from", help="What devices have: update, bundle, .deb, folder or .gguf; oldest first."
        ),
    ] = None,
    kind: Annotated[str, typer.Option(help="auto, full, adapter or delta.")] = "auto",
    out: Annotated[Path | None, typer.Option(help="File or folder; NAME-SEQUENCE.edgeft here.")] = None,
    passphrase_env: PassphraseEnv = "",
    store: StoreDir = STORE,
) -> None:
    """Make a signed update of a built model, for devices that have an older one."""
    from edgeft.commands import updating

    wanted = updating.Wanted(
        keys=keys, target=target, variant=variant, name=name, label=label, sequence=sequence, old=tuple(old or ()),
        kind=updating.kind_of(kind), out=out, passphrase_env=passphrase_env,
    )  # fmt: skip
    updating.update(recipe, store, wanted)


@keys.command()
def new(
    folder: Folder,
    threshold: Annotated[int, typer.Option(help="How many root keys must sign.", min=1)] = 1,
    roots: Annotated[int, typer.Option(help="How many root keys there are.", min=1, max=16)] = 1,
    offline: Offline = None,
    passphrase: Prompt = False,
    passphrase_env: PassphraseEnv = "",
) -> None:
    """Make root keys, which say who may sign, and a targets key, which signs updates."""
    from edgeft.commands import signing

    signing.new(folder, threshold, roots, offline or [], passphrase_env, prompt=passphrase)


@keys.command()
def rotate(
    folder: Folder,
    role: Annotated[str, typer.Option(help="root or targets.", show_default=False)],
    key: Annotated[
        str, typer.Option(help="Only the key whose id begins so; all of the role by default.")
    ] = "",
    offline: Offline = None,
    passphrase: Prompt = False,
    passphrase_env: PassphraseEnv = "",
) -> None:
    """Put new keys in the place of those that are lost, stolen or old."""
    from edgeft.commands import signing

    signing.rotate(folder, role, key, offline or [], passphrase_env, prompt=passphrase)


@keys.command()
def show(folder: Folder, offline: Offline = None) -> None:
    """Show which keys may sign, and where their private halves are."""
    from edgeft.commands import signing

    signing.show(folder, offline or [])
