"""What a record's columns mean: Alpaca, ShareGPT, OpenAI messages, or plain question and answer.

`recognise` looks at a source's columns; `convert` turns one record into a conversation, or says what is
wrong with it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from edgeft.corpus.conversation import Conversation, Message, Record
from edgeft.errors import DataError

FORMATS = ("alpaca", "sharegpt", "messages", "qa")
QUESTIONS = ("question", "instruction", "prompt", "query", "problem", "input", "user", "human", "q")
ANSWERS = (
    "answer",
    "output",
    "response",
    "completion",
    "solution",
    "reply",
    "target",
    "assistant",
    "gpt",
    "a",
)
CONVERSATIONS = ("messages", "conversations", "conversation", "dialogue", "dialog", "chat", "turns")
SYSTEMS = ("system", "system_prompt", "system_message")
INPUTS = ("input", "context")
SPEAKERS = {
    "system": "system", "developer": "system",
    "user": "user", "human": "user",
    "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant", "bot": "assistant",
}  # fmt: skip
"""How data sets name the three roles."""


@dataclass(frozen=True, kw_only=True)
class Columns:
    """The names of the columns that matter; empty where a source has none or it is still to be found."""

    question: str = ""
    """What the user asks; Alpaca's instruction."""
    input: str = ""
    """Alpaca's input: appended to the question after an empty line."""
    answer: str = ""
    """What the model is to say; Alpaca's output."""
    system: str = ""
    """A system prompt of the row's own."""
    messages: str = ""
    """The list of turns in ShareGPT and OpenAI rows."""
    history: str = ""
    """Alpaca's earlier turns, a list of [question, answer]."""


@dataclass(frozen=True, kw_only=True)
class Format:
    """How a source is to be read."""

    name: str
    """One of FORMATS."""
    columns: Columns


class Malformed(ValueError):
    """A row does not fit its source's format; the text says how."""


def recognise(
    first: Sequence[Mapping[str, Any]], source: str, *, name: str = "auto", columns: Columns | None = None
) -> Format:
    """The format of a source from its first records.

    `name` and the filled fields of `columns` are taken as given, and only the rest is looked for. Raises
    DataError, naming the columns found and what would be accepted, when nothing fits.
    """
    given = columns or Columns()
    names = list(dict.fromkeys(k for record in first for k in record))
    _refuse_absent(given, names, source)
    turns = given.messages or _turns_column(first, names)
    if (
        turns
        and (pair := _pair(given, names))
        and turns == pair.question
        and _kind_of_turns(first, pair.answer)
    ):
        turns = ""  # a list of turns on either side of the pair
    if name in ("sharegpt", "messages") or (name == "auto" and turns and not given.answer):
        if not turns:
            turns = _named(names, CONVERSATIONS)
        if turns:
            kind = name if name != "auto" else _kind_of_turns(first, turns)
            return Format(name=kind, columns=replace(given, messages=turns, system=_system(given, names)))
    elif found := _pair(given, names):
        alpaca = name == "alpaca" or (name == "auto" and found.question.casefold() == "instruction")
        return Format(
            name="alpaca" if alpaca else "qa", columns=found if alpaca else replace(found, history="")
        )
    raise DataError(
        f"{source}: the format is not recognised; its columns are {', '.join(names) or '(none)'}",
        hint=(
            "edgeft reads instruction/input/output (alpaca), conversations with from/value (sharegpt), messages with "
            "role/content (messages), or a question and an answer column (qa); name them in the recipe, for example "
            'columns = { question = "…", answer = "…" }'
        ),
    )


def convert(record: Record, form: Format, *, source: int = 0, group: str = "") -> Conversation:
    """A record as a conversation, its texts stripped of outer white space; unknown columns are ignored.

    Raises Malformed when a column the format needs is missing or not what the format says.
    """
    row, columns = record.columns, form.columns
    turns = (
        _turns(row, columns.messages) if form.name in ("sharegpt", "messages") else _exchange(row, columns)
    )
    if columns.system and (system := _text(row, columns.system, required=False)):
        turns = [("system", system), *(t for t in turns if t[0] != "system")]
    return Conversation(
        messages=tuple(Message(role=role, content=_clean(content)) for role, content in turns),
        origin=record.origin,
        source=source,
        group=_text(row, group, required=False) if group else "",
    )


def _refuse_absent(given: Columns, names: list[str], source: str) -> None:
    wrong = [v for v in vars(given).values() if v and v not in names]
    if wrong:
        raise DataError(f"{source} has no column {wrong[0]!r}", hint=f"its columns are {', '.join(names)}")


def _turns_column(first: Sequence[Mapping[str, Any]], names: Sequence[str]) -> str:
    """A column that holds a list of turns; known names win over others."""
    ordered = sorted(names, key=lambda n: (n.casefold() not in CONVERSATIONS, names.index(n)))
    return next((n for n in ordered if _kind_of_turns(first, n)), "")


def _kind_of_turns(first: Sequence[Mapping[str, Any]], name: str) -> str:
    for record in first:
        value = _listed(record.get(name))
        if isinstance(value, list) and value and isinstance(value[0], Mapping):
            if "from" in value[0] and "value" in value[0]:
                return "sharegpt"
            if "role" in value[0] and "content" in value[0]:
                return "messages"
    return ""


def _pair(given: Columns, names: Sequence[str]) -> Columns | None:
    question = given.question or _named([n for n in names if n != given.answer], QUESTIONS)
    answer = given.answer or _named([n for n in names if n != question], ANSWERS)
    if not question or not answer:
        return None
    rest = [n for n in names if n not in (question, answer)]
    extra = given.input
    if not extra and question.casefold() == "instruction":
        extra = _named(rest, INPUTS)
    history = given.history or _named(rest, ("history",))
    return replace(
        given, question=question, answer=answer, input=extra, history=history, system=_system(given, rest)
    )


def _system(given: Columns, names: Sequence[str]) -> str:
    return given.system or _named(names, SYSTEMS)


def _named(names: Iterable[str], wanted: Sequence[str]) -> str:
    """The column whose name comes first in `wanted`, whatever its case."""
    by_fold = {n.strip().casefold(): n for n in reversed(list(names))}
    return next((by_fold[w] for w in wanted if w in by_fold), "")


def _exchange(row: Mapping[str, Any], columns: Columns) -> list[tuple[str, str]]:
    question, answer = row.get(columns.question), row.get(columns.answer)
    if isinstance(question, list) and isinstance(answer, list):
        return [*_speakers(question, columns.question), *_speakers(answer, columns.answer)]
    asked = _text(row, columns.question)
    if columns.input and (extra := _text(row, columns.input, required=False).strip()):
        asked = f"{asked.strip()}\n\n{extra}"
    return [*_history(row, columns.history), ("user", asked), ("assistant", _text(row, columns.answer))]


def _history(row: Mapping[str, Any], name: str) -> list[tuple[str, str]]:
    pairs = (_listed(row.get(name)) or []) if name else []
    if not isinstance(pairs, list):
        raise Malformed(f"`{name}` must be a list of [question, answer], not {type(pairs).__name__}")
    turns: list[tuple[str, str]] = []
    for pair in pairs:
        if not (isinstance(pair, list | tuple) and len(pair) == 2 and all(isinstance(t, str) for t in pair)):
            raise Malformed(f"`{name}` must be a list of [question, answer]")
        turns += [("user", pair[0]), ("assistant", pair[1])]
    return turns


def _turns(row: Mapping[str, Any], name: str) -> list[tuple[str, str]]:
    if name not in row:
        raise Malformed(f"has no `{name}`")
    value = _listed(row[name])
    if not isinstance(value, list):
        raise Malformed(f"`{name}` must be a list of turns, not {type(value).__name__}")
    return _speakers(value, name)


def _speakers(value: Sequence[Any], name: str) -> list[tuple[str, str]]:
    turns = []
    for number, turn in enumerate(value, 1):
        where = f"turn {number} of `{name}`"
        if not isinstance(turn, Mapping):
            raise Malformed(f"{where} must be an object, not {type(turn).__name__}")
        keys = ("from", "value") if "from" in turn else ("role", "content")
        if lacking := [k for k in keys if k not in turn]:
            raise Malformed(f"{where} has no `{lacking[0]}`")
        speaker = turn[keys[0]]
        role = SPEAKERS.get(speaker.casefold()) if isinstance(speaker, str) else None
        if role is None:
            raise Malformed(f"{where} is by {speaker!r}; known are {', '.join(SPEAKERS)}")
        turns.append((role, _content(turn[keys[1]], where)))
    return turns


def _content(value: Any, where: str) -> str:
    """A turn's text; OpenAI's list of parts is joined if all of them are text."""
    if isinstance(value, list) and all(
        isinstance(p, Mapping) and isinstance(p.get("text"), str) for p in value
    ):
        return "\n".join(p["text"] for p in value)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise Malformed(f"{where} must be text, not {type(value).__name__}")
    return value


def _text(row: Mapping[str, Any], name: str, *, required: bool = True) -> str:
    """A cell as text. null is empty, numbers are written out; anything else is malformed."""
    if name not in row and required:
        raise Malformed(f"has no `{name}`")
    value = row.get(name)
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    raise Malformed(f"`{name}` must be text, not {type(value).__name__}")


def _listed(value: Any) -> Any:
    """Tables keep a list of turns as JSON text in one cell."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            return json.loads(value)
        except ValueError:
            return value
    return value


def _clean(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n").strip()
