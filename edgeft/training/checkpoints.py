"""Checkpoints that are whole or not there: a folder counts once its marker, written last, is on the disk."""

from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

MARKER = "edgeft.json"


def complete(folder: Path, state: dict[str, Any]) -> None:
    """Flush every file of a checkpoint to the disk, then mark it complete. `state` goes into the marker."""
    for file in folder.rglob("*"):
        _flush(file)
    _flush(folder)
    aside = folder / f".{MARKER}"
    aside.write_text(json.dumps(state), encoding="utf-8")
    _flush(aside)
    aside.replace(folder / MARKER)
    _flush(folder)
    _flush(folder.parent)


def newest(root: Path) -> tuple[Path, dict[str, Any]] | None:
    """The complete checkpoint with the highest step and its state. Removes those that were left half-written."""
    whole = []
    for folder in sorted(root.glob("checkpoint-*")):
        try:
            whole.append((folder, json.loads((folder / MARKER).read_text(encoding="utf-8"))))
        except (OSError, ValueError):
            log.warning("%s was not written to its end: removed", folder.name)
            shutil.rmtree(folder)
    return max(whole, key=lambda found: step_of(found[0]), default=None)


def step_of(folder: Path) -> int:
    """The optimizer step after which the checkpoint was taken."""
    return int(folder.name.rpartition("-")[2])


def keep_last(root: Path, count: int) -> None:
    """Delete all but the newest `count` checkpoints."""
    for folder in sorted(root.glob("checkpoint-*"), key=step_of)[:-count]:
        # The marker first: a crash half-way through must not leave something that looks complete.
        (folder / MARKER).unlink(missing_ok=True)
        shutil.rmtree(folder)


def _flush(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
