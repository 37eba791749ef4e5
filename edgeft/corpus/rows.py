"""The files the data stage makes: one JSON object a line with a conversation, its tokens and its labels."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeft.errors import DataError


@dataclass(frozen=True, kw_only=True)
class Row:
    """One rendered example."""

    messages: list[dict[str, str]]
    """`role` and `content` of each turn."""
    ids: list[int]
    labels: list[int]
    """As long as `ids`: the id where it is to be learnt, -100 elsewhere."""
    origin: str
    """File name and line."""
    group: str = ""

    @property
    def supervised(self) -> int:
        """How many tokens are learnt."""
        return sum(label >= 0 for label in self.labels)

    def prompt_ids(self) -> list[int]:
        """The ids before the last answer: what a model is given to answer it."""
        end = len(self.labels)
        while end and self.labels[end - 1] < 0:
            end -= 1
        while end and self.labels[end - 1] >= 0:
            end -= 1
        return self.ids[:end]


def load_rows(path: Path) -> list[Row]:
    """Read `train.jsonl` or `heldout.jsonl` of a data step. Raises DataError naming a line that does not fit."""
    rows = []
    try:
        with path.open(encoding="utf-8") as f:
            for number, line in enumerate(f, 1):
                rows.append(_row(line, f"{path}:{number}"))
    except OSError as e:
        raise DataError(f"{path} cannot be read: {e.strerror}") from None
    return rows


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Write rows, the same bytes for the same rows."""
    with path.open("w", encoding="utf-8", newline="\n") as f:
        for row in rows:
            f.write(json.dumps(vars(row), ensure_ascii=False, separators=(",", ":")) + "\n")


def _row(line: str, where: str) -> Row:
    try:
        value: dict[str, Any] = json.loads(line)
        row = Row(**value)
    except (ValueError, TypeError) as e:
        raise DataError(f"{where}: not a row of a data step: {e}") from None
    if len(row.ids) != len(row.labels):
        raise DataError(f"{where}: {len(row.ids)} ids but {len(row.labels)} labels")
    return row
