"""What a training example is before it becomes tokens: a record of a file, then who said what."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Record:
    """One row as it stands in the file, or the reason why it cannot be read."""

    origin: str
    """File name and line; for Parquet and datasets the row, counted from 1."""
    columns: dict[str, Any]
    problem: str = ""


@dataclass(frozen=True, kw_only=True)
class Message:
    """One turn."""

    role: str
    """system, user or assistant."""
    content: str


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """One row of a source, as messages."""

    messages: tuple[Message, ...]
    origin: str
    """File name and line (or row), `qa.jsonl:12`."""
    source: int = 0
    """Which of the recipe's sources, counted from 0."""
    group: str = ""
    """The row's value of the group column; empty without one."""

    @property
    def question(self) -> str:
        """What the user says in all turns, a line each."""
        return "\n".join(m.content for m in self.messages if m.role == "user")

    @property
    def answer(self) -> str:
        """What the assistant says in all turns, a line each."""
        return "\n".join(self.answers)

    @property
    def answers(self) -> tuple[str, ...]:
        return tuple(m.content for m in self.messages if m.role == "assistant")

    def as_dicts(self) -> list[dict[str, str]]:
        """The messages as chat templates and JSON want them."""
        return [{"role": m.role, "content": m.content} for m in self.messages]
