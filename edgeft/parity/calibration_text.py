"""What roundings that look at text look at: training text, never the test's, and text that the base writes by itself."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from edgeft.errors import ParityError
from edgeft.parity.checks import calibration
from edgeft.parity.checks.check import Check

if TYPE_CHECKING:
    from edgeft.corpus import Row

WINDOW = 512
"""Tokens."""
KEPT = "own-text.json"
"""Where the base's own text is kept: a run that goes on takes it from there, and it can be read afterwards."""


def training(data: Path, chunks: int) -> tuple[list[list[int]], Check]:
    """At most `chunks` windows of token ids from the training rows in `data`, and the check that none of the test is in them.

    Raises ParityError where it is.
    """
    from edgeft.corpus import load_rows

    rows = load_rows(data / "train.jsonl")
    ids = [i for row in rows for i in row.ids]
    size = min(WINDOW, len(ids))
    found = [ids[i : i + size] for i in range(0, len(ids) - size + 1, size)][:chunks]
    seen = _said(rows[: _rows_in(rows, len(found) * size)])
    text = calibration.overlap(seen, _said(load_rows(data / "heldout.jsonl")))
    if text.ok is False:
        raise ParityError(
            text.said, hint="hold out other rows: what the quantizer is tuned on cannot also judge it"
        )
    return found, text


def mixed(
    data: Path, base: Path, out: Path, *, chunks: int, own: int, device: str
) -> tuple[list[list[int]], Check]:
    """As `training`, and `own` windows that the checkpoint `base` writes, which `out` takes as KEPT."""
    from edgeft.awq import own_text

    found, text = training(data, chunks)
    kept = out / KEPT
    if not kept.is_file():
        aside = kept.with_suffix(".part")
        aside.write_text(
            json.dumps(own_text.write(base, own, len(found[0]), device=device)), encoding="utf-8"
        )
        aside.rename(kept)
    return [*found, *json.loads(kept.read_text(encoding="utf-8"))], text


def _said(rows: Sequence[Row]) -> list[str]:
    """What is said in each conversation."""
    return ["\n".join(m["content"] for m in row.messages) for row in rows]


def _rows_in(rows: Sequence[Row], tokens: int) -> int:
    """How many rows the first `tokens` tokens reach into."""
    total = 0
    for number, row in enumerate(rows):
        if total >= tokens:
            return number
        total += len(row.ids)
    return len(rows)
