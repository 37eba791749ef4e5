"""What is remembered of each machine that ran a file, and the report's table of it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Record = dict[str, Any]
"""`step.Measured.facts()` with the file's `variant`, `file_sha256` and `verdict`, `when`, and `moved` and `limit` by text."""


def known(path: Path) -> list[Record]:
    """The records in a file; none when there is no such file or it is damaged."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    return [r for r in found if isinstance(r, dict) and "file_sha256" in r] if isinstance(found, list) else []


def merged(before: Sequence[Record], found: Sequence[Record]) -> list[Record]:
    """All records; of two of one file on one kind of machine only the newer."""

    def what(one: Record) -> tuple[str, ...]:
        return one["file_sha256"], one["where"], one["machine"]["processor"]

    new = {what(one) for one in found}
    return [*(one for one in before if what(one) not in new), *found]


def as_markdown(records: Sequence[Record]) -> list[str]:
    """The report's lines; none without records. Emulated speeds and memory are shown as what they are."""
    if not records:
        return []
    lines = [
        "## On the device", "",
        ("The stock llama-perplexity on the windows of the certificate. Moved: KL divergence there minus here, domain text, and "
        "what it may be. Memory: the process's peak while scoring, and while decoding with a context of 256."), "",
        "| file | where | moved | prompt tokens/s | decoded tokens/s | MB scoring | MB decoding | hottest °C | throttling | verdict |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    return [*lines, *(_row(r) for r in records), ""]


def _row(r: Record) -> str:
    mark = " (emulated: no promise)" if r["emulated"] else ""
    moved, limit = r["moved"].get("domain"), r["limit"].get("domain")
    cells = [
        r["variant"], f"{r['where']}: {r['machine']['processor'] or r['machine']['machine']}{mark}",
        f"{_number(moved, '+.1e')} (± {_number(limit, '.1e')})", _number(r["prompt"], ".1f"), _number(r["decode"], ".1f"),
        *(_number(r[name] and r[name] / 1e6, ",.0f") for name in ("peak_scoring", "peak_decoding")),
        _number(r["hottest_c"], ".0f"), r["throttled"] or "—", r["verdict"],
    ]  # fmt: skip
    return "| " + " | ".join(" ".join(c.replace("|", "\\|").split()) for c in cells) + " |"


def _number(value: float | None, form: str) -> str:
    return "—" if value is None else format(value, form)
