"""The sources a recipe names, read into conversations; every malformed row is named before anything else happens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from pathlib import Path

from edgeft.corpus import formats, reading
from edgeft.corpus.conversation import Conversation, Message, Record
from edgeft.errors import DataError
from edgeft.progress import report

NAMED_PROBLEMS = 10
"""So many malformed rows are listed; reading stops there."""
_LOOK = 50


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where rows come from and what part they play."""

    path: Path | None = None
    """A data file or a folder."""
    dataset: str = ""
    """Or a dataset on the Hugging Face hub, at `revision`."""
    revision: str = ""
    config: str = ""
    split_name: str = "train"
    format: str = "auto"
    columns: formats.Columns = field(default_factory=formats.Columns)
    group: str = ""
    """A column whose equal values stay on one side of the split."""
    group_required: bool = False
    """Refuse the source if it has no such column."""
    weight: float | None = None
    rows: int | None = None
    repeat: int = 1
    licence: str = ""
    notice: Path | None = None
    """A licence or notice text that must go wherever the data goes."""
    heldout: bool = False
    """All of it is held out, none trained on."""

    @property
    def name(self) -> str:
        return self.path.name if self.path else self.dataset


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A source's conversations in its own order."""

    source: Source
    form: formats.Format
    rows: list[Conversation]
    columns: tuple[str, ...]
    """All columns of the first rows, also those that are not used."""
    sha256: str
    """Of the file or folder; empty for a dataset on the hub, which its revision pins."""


def load(sources: Sequence[Source], *, system: str = "") -> list[Loaded]:
    """Read every source. `system` is given to conversations without a system prompt of their own.

    Raises DataError: for a source that cannot be read, is empty or has no known format; and once for the
    malformed rows of all sources, naming the first 10 by file and line.
    """
    problems: list[str] = []
    loaded = []
    for number, source in enumerate(sources):
        report(f"reading {source.name}", number, len(sources), unit="sources")
        loaded.append(_load(source, number, system, problems))
    if problems:
        more = " (and perhaps more: reading stopped there)" if len(problems) >= NAMED_PROBLEMS else ""
        rows = "1 row is" if len(problems) == 1 else f"{len(problems)} rows are"
        raise DataError(
            f"{rows} malformed{more}:\n" + "\n".join(f"  {p}" for p in problems),
            hint="repair or remove these lines, or name the format and columns in the recipe",
        )
    grouped = [one for one in loaded if one.source.group]
    if grouped and not any(one.source.group in one.columns for one in grouped):
        columns = dict.fromkeys(c for one in loaded for c in one.columns)
        raise DataError(
            f"no source has the group column {grouped[0].source.group!r}",
            hint=f"there are {', '.join(columns)}",
        )
    return loaded


def _load(source: Source, number: int, system: str, problems: list[str]) -> Loaded:
    records = _records(source)
    first = list(islice(records, _LOOK))
    if not first:
        raise DataError(f"{source.name} holds no rows")
    sound = [r.columns for r in first if not r.problem]
    if not sound:
        raise DataError(f"{first[0].origin}: {first[0].problem}")
    columns = dict.fromkeys(k for row in sound for k in row)
    if source.group_required and source.group not in columns:
        raise DataError(
            f"{source.name} has no group column {source.group!r}", hint=f"it has {', '.join(columns)}"
        )
    form = formats.recognise(sound, source.name, name=source.format, columns=source.columns)
    rows: list[Conversation] = []
    for record in chain(first, records):
        if len(problems) >= NAMED_PROBLEMS:
            break
        try:
            if record.problem:
                raise formats.Malformed(record.problem)
            row = formats.convert(record, form, source=number, group=source.group)
        except formats.Malformed as e:
            problems.append(f"{record.origin}: {e}")
        else:
            rows.append(_with_system(row, system))
    digest = reading.sha256(source.path) if source.path else ""
    return Loaded(source=source, form=form, rows=rows, columns=tuple(columns), sha256=digest)


def _records(source: Source) -> Iterator[Record]:
    if source.path:
        return reading.read(source.path, split=source.split_name)
    return reading.read_hub(
        source.dataset, revision=source.revision, config=source.config, split=source.split_name
    )


def _with_system(row: Conversation, system: str) -> Conversation:
    if not system or any(m.role == "system" for m in row.messages):
        return row
    return replace(row, messages=(Message(role="system", content=system), *row.messages))
