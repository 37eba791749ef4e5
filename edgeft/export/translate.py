"""A model's Jinja chat template as a Go template for Ollama, or a sentence why not (known failure C-18).

What the template does is learnt by rendering it, not by reading it: questions and answers with marks in place of their
texts show what stands before, between and after them. The Go template that follows is then rendered beside the Jinja one
for a set of conversations, and one difference is enough to refuse.

Two things Go cannot do in Ollama, which has no function for them; where the Jinja does them they are said in `notes`: taking white
space off the ends of a text, and telling an empty system prompt from none. Consecutive messages of one role are joined by
Ollama before any template sees them, so both sides are compared on the joined ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from edgeft.errors import StageError
from edgeft.export import go_template
from edgeft.export.go_template import Message

Render = Callable[[Sequence[Message], Mapping[str, Any]], str | None]
"""The Jinja template: messages and variables -> the prompt without the BOS that the tokenizer adds, with the beginning of an
answer; None when it refuses the chat."""

TRIMMED = (
    "the Jinja template changes white space at the ends of messages; Ollama cannot, so send texts without it"
)
EMPTY_SYSTEM = "an empty system prompt is none for Ollama; the Jinja template writes an empty one"
MERGED = (
    "the Jinja template refuses a system prompt; it goes into the first question, as llama-server does it"
)
_HINT = 'take [export] kind = "bundle" or "deb": llama-server renders the Jinja template itself'


@dataclass(frozen=True, kw_only=True)
class Translation:
    template: str
    compared: int
    """Conversations that both templates render to the same bytes."""
    notes: tuple[str, ...]
    """What differs all the same, by nature."""


@dataclass(frozen=True, kw_only=True)
class _Shape:
    begin: str
    """Before the first question, without a system prompt: often a default one."""
    before_answer: str
    before_question: str
    end: str
    system: Literal["first", "last", "question"]
    """Where the system prompt goes: before everything, into the last question, or (refused) into the first one."""
    begin_system: str
    after_system: str


def translate(render: Render, conversations: Sequence[Sequence[Message]]) -> Translation:
    """Translate, and prove it on `conversations` (each ending in a question).

    Raises StageError with the first conversation whose prompt would be another one, or with what the template does that
    has no counterpart.
    """
    # transformers turns variables into plain data, so this one is no function any more, and who calls it fails.
    if render(_chat("u"), {"strftime_now": ""}) != render(_chat("u"), {}):
        raise _refusal("it writes the date of the day into the prompt")
    shape = _learn(render)
    template = _write(shape)
    notes: list[str] = [MERGED] if shape.system == "question" else []
    for chat in conversations:
        notes += _compare(render, shape, template, chat)
    return Translation(template=template, compared=len(conversations), notes=tuple(dict.fromkeys(notes)))


def _compare(render: Render, shape: _Shape, template: str, chat: Sequence[Message]) -> list[str]:
    """Notes on one conversation; raises StageError when nothing explains a difference."""
    system, messages = go_template.collated(chat)
    got = go_template.render(template, system=system, messages=messages)
    asked = _into_question(messages) if shape.system == "question" else messages
    if render(asked, {}) == got:
        return []
    if not system:
        asked = [m for m in asked if m["role"] != "system"]
        if render(asked, {}) == got:
            return [EMPTY_SYSTEM]
    stripped = [{**m, "content": m["content"].strip()} for m in messages]
    if stripped != list(messages):
        bare = go_template.render(template, system=system.strip(), messages=stripped)
        if render(_into_question(stripped) if shape.system == "question" else stripped, {}) == bare:
            return [TRIMMED]
    roles = ", ".join(m["role"] for m in chat)
    wanted = render(asked, {})
    if wanted is None:
        raise _refusal(f"it refuses the chat {roles}, which a Go template cannot")
    at = next(
        (i for i, (a, b) in enumerate(zip(wanted, got, strict=False)) if a != b), min(len(wanted), len(got))
    )
    raise _refusal(
        f"for the chat {roles} it writes {wanted[max(0, at - 15) : at + 25]!r}, the translation "
        f"{got[max(0, at - 15) : at + 25]!r}"
    )


def _learn(render: Render) -> _Shape:
    begin, after_u1, before_u2, after_u2, before_u3, end = _parts(render, "uauau")
    if (after_u1, before_u2) != (after_u2, before_u3) or _parts(render, "u") != [begin, end]:
        raise _refusal("what it writes between messages depends on where they stand")
    known: dict[str, Any] = {
        "begin": begin, "before_answer": after_u1, "before_question": before_u2, "end": end
    }  # fmt: skip
    if _rendered(render, "su") is None:
        return _Shape(**known, system="question", begin_system="", after_system="")
    text, marks = _marked(render, "suauau")
    if text.find(marks[0]) < text.find(marks[1]):
        begin_system, after_system, *others = _parts(render, "suauau")
        if others != [after_u1, before_u2, after_u1, before_u2, end]:
            raise _refusal("a system prompt changes more than its own place")
        return _Shape(**known, system="first", begin_system=begin_system, after_system=after_system)
    *others, before_system, after_system, last = _parts(render, "uauasu", "suauau")
    if others != [begin, after_u1, before_u2, after_u1] or (before_system, last) != (before_u2, end):
        raise _refusal("its system prompt stands neither before the conversation nor in the last question")
    return _Shape(**known, system="last", begin_system="", after_system=after_system)


def _write(s: _Shape) -> str:
    t = go_template.text
    begin, system = t(s.begin), ""
    if s.system == "first":
        begin = f"{{{{ if .System }}}}{t(s.begin_system)}{{{{ .System }}}}{t(s.after_system)}{{{{ else }}}}{begin}{{{{ end }}}}"
    elif s.system == "last":
        last = "and $.System (eq (len (slice $.Messages $i)) 1)"
        system = f"{{{{ if {last} }}}}{{{{ $.System }}}}{t(s.after_system)}{{{{ end }}}}"
    else:
        system = "{{ if and $.System (not $began) }}{{ $.System }}\n{{ end }}"
    return (
        "{{ $began := false }}" + begin + "{{ range $i, $m := .Messages }}"
        '{{ if eq $m.Role "user" }}{{ if $began }}' + t(s.before_question) + "{{ end }}" + system
        + '{{ $began = true }}{{ $m.Content }}{{ else if eq $m.Role "assistant" }}' + t(s.before_answer)
        + "{{ $m.Content }}{{ end }}{{ end }}" + t(s.end)
    )  # fmt: skip


_MARKS = {"s": "xqSYSxq", "u": "xqASKxq", "a": "xqSAYxq"}
_ROLES = {"s": "system", "u": "user", "a": "assistant"}


def _chat(roles: str) -> list[Message]:
    """A conversation whose texts are marks, by one letter a message."""
    return [{"role": _ROLES[r], "content": f"{_MARKS[r]}{i}"} for i, r in enumerate(roles)]


def _rendered(render: Render, roles: str) -> str | None:
    return render(_chat(roles), {})


def _marked(render: Render, roles: str) -> tuple[str, list[str]]:
    """The prompt of a marked conversation and its marks, each of which stands in it once."""
    text, marks = _rendered(render, roles), [m["content"] for m in _chat(roles)]
    if text is None:
        raise _refusal(f"it refuses a chat of {len(roles)} messages")
    if any(text.count(mark) != 1 for mark in marks):
        raise _refusal("it does not write every message once")
    return text, marks


def _parts(render: Render, order: str, roles: str = "") -> list[str]:
    """What stands before, between and after the texts of a conversation; `order` is the one they are written in."""
    text, marks = _marked(render, roles or order)
    found: list[str] = []
    for mark in sorted(marks, key=text.find):
        before, _, text = text.partition(mark)
        found.append(before)
    letters = sorted(marks, key=lambda mark: _rendered(render, roles or order).find(mark))  # type: ignore[union-attr]
    if [next(r for r, m in _MARKS.items() if mark.startswith(m)) for mark in letters] != list(order):
        raise _refusal("it changes the order of messages")
    return [*found, text]


def _into_question(messages: Sequence[Message]) -> list[Message]:
    """What llama-server makes of a system prompt that a template refuses (common/chat.cpp)."""
    if not messages or messages[0]["role"] != "system" or len(messages) < 2:
        return list(messages)
    first, second, *others = messages
    if not first["content"]:
        return [second, *others]
    return [{**second, "content": f"{first['content']}\n{second['content']}"}, *others]


def _refusal(why: str) -> StageError:
    return StageError(f"the chat template cannot be translated for Ollama: {why}", hint=_HINT)
