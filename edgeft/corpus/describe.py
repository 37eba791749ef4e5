"""What a data file is, found without any model, and a commented recipe for it (`edgeft init`)."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from edgeft.corpus import formats, reading, recipe_text, rules
from edgeft.corpus.conversation import Conversation
from edgeft.errors import DataError

GROUP_NAMES = (
    "group", "focus", "topic", "entity", "document", "document_id", "doc_id", "context_id", "article", "article_id",
    "title", "url", "source_id", "patient", "patient_id", "conversation_id", "thread_id", "subject", "cluster",
)  # fmt: skip
"""Columns that by their name hold what must not be on both sides of a split."""
_CONTEXTS = (128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
_TEMPLATE_TOKENS = 48
_LAPTOP_TOKENS = 60_000
"""An epoch over so many tokens takes a 135-million-parameter model some minutes on two laptop cores."""
_ROWS_READ = 100_000


@dataclass(frozen=True, kw_only=True)
class Description:
    """A data file as far as it can be judged by looking at it."""

    path: Path
    form: formats.Format
    columns: tuple[str, ...]
    rows: int
    malformed: tuple[str, ...]
    """The first malformed rows, `file:line: what is wrong`."""
    dropped: dict[str, int]
    """Rows that a rule on single rows would drop, by rule."""
    multi_turn: int
    """Rows with more than one answer."""
    with_system: int
    """Rows with a system prompt."""
    tokens_p50: int
    """Estimated from characters; the data step counts with the model's tokenizer."""
    tokens_p99: int
    tokens_max: int
    max_tokens: int
    """A limit that nearly all rows keep to."""
    group: str
    """A column that looks as if it names what rows are about; empty if none does."""
    laptop_rows: int
    """As many rows as a laptop trains on in minutes; `rows` if that is all of them."""


def describe(path: Path) -> Description:
    """Look at a data file or folder; at most its first 100,000 rows are read.

    Raises DataError when it does not exist, holds no rows or has no format that edgeft knows.
    """
    records = list(islice(reading.read(path), _ROWS_READ))
    sound = [r for r in records if not r.problem]
    if not sound:
        raise DataError(f"{records[0].origin}: {records[0].problem}" if records else f"{path} holds no rows")
    form = formats.recognise([r.columns for r in sound[:50]], path.name)
    rows: list[Conversation] = []
    malformed = [f"{r.origin}: {r.problem}" for r in records if r.problem]
    for record in sound:
        try:
            rows.append(formats.convert(record, form))
        except formats.Malformed as e:
            malformed.append(f"{record.origin}: {e}")
    if not rows:
        raise DataError(malformed[0])
    return _described(path, form, [r.columns for r in sound], rows, malformed)


def recipe_for(path: Path, recipe: Path | None = None) -> str:
    """A commented recipe, as TOML, that builds a model from a data file.

    `recipe` is where it will be written: a recipe names its data relative to itself. Left out, the recipe is
    taken to stand beside the data. Raises DataError as `describe` does.
    """
    found = describe(path)
    folder = (recipe.parent if recipe else path.parent).resolve()
    data = path.resolve()
    return recipe_text.write(found, Path(os.path.relpath(data, folder)).as_posix())


def _described(
    path: Path,
    form: formats.Format,
    records: Sequence[dict[str, Any]],
    rows: Sequence[Conversation],
    malformed: Sequence[str],
) -> Description:
    broken = (next(rules.broken_rules(row, rules.Filters()), ("", ""))[0] for row in rows)
    dropped = Counter(rule for rule in broken if rule)
    lengths = sorted(_tokens(row) for row in rows)
    p50, p99 = lengths[len(lengths) // 2], lengths[min(len(lengths) - 1, len(lengths) * 99 // 100)]
    fits = max(1, int(len(rows) * _LAPTOP_TOKENS / sum(lengths)))
    columns = tuple(dict.fromkeys(k for r in records[:50] for k in r))
    return Description(
        path=path, form=form, columns=columns, rows=len(rows), malformed=tuple(malformed[:3]), dropped=dict(dropped),
        multi_turn=sum(len(r.answers) > 1 for r in rows),
        with_system=sum(r.messages[:1] != () and r.messages[0].role == "system" for r in rows),
        tokens_p50=p50, tokens_p99=p99, tokens_max=lengths[-1],
        max_tokens=next((c for c in _CONTEXTS if c >= 1.25 * p99), _CONTEXTS[-1]),
        group=_group(records, form),
        laptop_rows=len(rows) if fits >= len(rows) else max(100, fits // 100 * 100),
    )  # fmt: skip


def _tokens(row: Conversation) -> int:
    """About four letters make a token in languages with an alphabet; elsewhere a character is about one."""
    text = "".join(m.content for m in row.messages)
    wide = sum(ord(c) > 0x2E7F for c in text)
    return wide + (len(text) - wide) // 4 + _TEMPLATE_TOKENS * len(row.answers)


def _group(records: Sequence[dict[str, Any]], form: formats.Format) -> str:
    """A column whose values come back, but none too often: by its name first, else by its values."""
    used = {v for v in vars(form.columns).values() if v}
    names = [n for n in dict.fromkeys(k for r in records[:50] for k in r) if n not in used]
    by_name = [n for wanted in GROUP_NAMES for n in names if n.casefold() == wanted]
    return next((n for n in by_name if _groups(records, n, 0.999)), "") or next(
        (n for n in names if _groups(records, n, 0.7)), ""
    )


def _groups(records: Sequence[dict[str, Any]], name: str, most_distinct: float) -> bool:
    """At least 20 different short values, fewer than `most_distinct` of the rows, none over a tenth of them.

    One row in a hundred may lack it: such rows are split by what they say.
    """
    found = [r.get(name) for r in records]
    values = [v for v in found if v not in (None, "")]
    short = all(isinstance(v, str | int) and not isinstance(v, bool) and len(str(v)) <= 160 for v in values)
    if not short or len(values) < 0.99 * len(found):
        return False
    counts = Counter(values)
    return 20 <= len(counts) <= most_distinct * len(values) and max(counts.values()) <= 0.1 * len(values)
