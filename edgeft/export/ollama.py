"""A folder for `ollama create`, as a tar: Modelfile with the translated template, model, adapter, papers."""

from __future__ import annotations

import os
from pathlib import Path

from edgeft.errors import StageError
from edgeft.export.files import Files, write_tar


def write(files: Files, out: Path) -> None:
    """Write the folder to the tar `out`; it appears under its name only when it is whole."""
    aside = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        with aside.open("wb") as raw:
            write_tar(raw, files)
            raw.flush()
            os.fsync(raw.fileno())
        aside.replace(out)
    finally:
        aside.unlink(missing_ok=True)


def quotable(value: str, what: str) -> str:
    """The value as it stands. StageError when no Modelfile can hold it (parser/parser.go): three quotation marks end a value,
    there is no escape, and characters that do not print are dropped."""
    if '"""' in value or value.endswith('"'):
        raise StageError(
            f"{what} holds quotation marks that a Modelfile cannot: three in a row, or one at the end"
        )
    lost = next((c for c in value if not c.isprintable() and c not in "\t\r\n"), "")
    if lost:
        raise StageError(f"{what} holds the character U+{ord(lost):04X}, which Ollama drops from a Modelfile")
    return value
