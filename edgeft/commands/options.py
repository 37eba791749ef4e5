"""Arguments and options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

STORE = Path(".edgeft")
Recipe = Annotated[Path, typer.Argument(help="A recipe file.", show_default=False)]
Target = Annotated[str, typer.Option(help="A target's name or file; the recipe's own by default.")]
Upto = Annotated[str, typer.Option(help="Stop after this stage or variant.")]
StoreDir = Annotated[Path, typer.Option(envvar="EDGEFT_STORE", help="Where results are kept.")]
Model = Annotated[Path, typer.Argument(help="A built recipe, or a .gguf file.", show_default=False)]
Variant = Annotated[str, typer.Option(help="Which quantization, such as q4_k_m; the first by default.")]
Threads = Annotated[int, typer.Option(help="CPU threads; 0 takes what this machine has free.", min=0)]
KeysDir = Annotated[
    Path, typer.Option("--keys", envvar="EDGEFT_KEYS", help="The folder of keys.", show_default=False)
]
PassphraseEnv = Annotated[
    str, typer.Option("--passphrase-env", help="Environment variable with the keys' passphrase.")
]
