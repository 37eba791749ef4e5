"""boot: its options. What it does is in `booting`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edgeft.commands.options import STORE, StoreDir, Target, Variant


def boot(
    what: Annotated[
        Path,
        typer.Argument(
            metavar="RECIPE|IMAGE", help="A built recipe, or an image.img.zst.", show_default=False
        ),
    ],
    target: Target = "",
    variant: Variant = "",
    ask: Annotated[str, typer.Option(help="A question for the model.")] = "",
    max_tokens: Annotated[int, typer.Option(help="Where an answer is cut.", min=1)] = 64,
    memory: Annotated[int, typer.Option(help="Of the machine, MB; 0: as the model needs.", min=0)] = 0,
    patience: Annotated[int, typer.Option(help="Seconds until it must answer.", min=1)] = 900,
    keep: Annotated[bool, typer.Option("--keep", help="Leave it up until Ctrl-C.")] = False,
    api_key: Annotated[str, typer.Option(envvar="EDGEFT_API_KEY", help="Where the image demands it.")] = "",
    store: StoreDir = STORE,
) -> None:
    """Start a built image in QEMU, without network, and ask its model. Needs no privileges and no KVM."""
    from edgeft.commands import booting

    asked = booting.Asked(
        target=target, variant=variant, question=ask, max_tokens=max_tokens, memory_mb=memory, patience_s=patience,
        api_key=api_key, keep=keep,
    )  # fmt: skip
    booting.boot(what, store, asked)
