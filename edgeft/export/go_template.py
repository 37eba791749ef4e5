"""The part of Go's text/template that edgeft's translations use, evaluated: to compare them with the Jinja they stand for.

Texts, variables, `if`/`else if`/`else`, `range $i, $m := …`, and the functions eq, and, not, len, slice (pkg.go.dev/text/template).
Anything else is a ValueError: nothing is guessed. The tests render with Go itself and compare.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_TOKEN = re.compile(r'\s*("(?:[^"\\]|\\.)*"|:=|[=(),]|[$.\w]+)')
_QUOTED = re.compile(r'"(?:[^"\\]|\\.)*"')
Message = Mapping[str, str]


def text(literal: str) -> str:
    """Template source that writes `literal`."""
    return literal.replace("{{", '{{ "{{" }}')


def render(source: str, *, system: str, messages: Sequence[Message]) -> str:
    """What Ollama makes of a chat: `.System` and `.Messages` as its Template.Execute sets them (template/template.go)."""
    chat = [{"Role": m["role"], "Content": m["content"]} for m in messages]
    data = {"System": system, "Messages": chat}
    nodes = list(_split(source))
    body, end = _block(nodes, 0)
    if end != len(nodes):
        raise ValueError(f"{nodes[end].text!r} closes nothing")
    return "".join(_run(body, data, {"$": data}))


def collated(messages: Sequence[Message]) -> tuple[str, list[Message]]:
    """The system prompt and the messages as Ollama hands them to a template: all system messages in one, and messages of
    one role in a row joined (collate in template/template.go)."""
    system = "\n\n".join(m["content"] for m in messages if m["role"] == "system")
    joined: list[Message] = []
    for m in messages:
        if joined and joined[-1]["role"] == m["role"]:
            joined[-1] = {**joined[-1], "content": joined[-1]["content"] + "\n\n" + m["content"]}
        else:
            joined.append(m)
    return system, joined


@dataclass(frozen=True)
class _Node:
    action: bool
    text: str

    @property
    def word(self) -> str:
        return self.text.split(maxsplit=1)[0] if self.action and self.text else ""


@dataclass(frozen=True)
class _Branch:
    head: str
    body: list[Any]
    otherwise: list[Any]


def _split(source: str) -> Iterator[_Node]:
    at = 0
    while (start := source.find("{{", at)) >= 0:
        if start > at:
            yield _Node(False, source[at:start])
        end = start + 2
        while not source.startswith("}}", end):  # "}}" inside a quoted text closes nothing
            if end >= len(source):
                raise ValueError("an action is not closed")
            quoted = _QUOTED.match(source, end)
            end = quoted.end() if quoted else end + 1
        yield _Node(True, source[start + 2 : end].strip())
        at = end + 2
    if at < len(source):
        yield _Node(False, source[at:])


def _block(nodes: Sequence[_Node], at: int) -> tuple[list[Any], int]:
    """Nodes up to the `else` or `end` that closes this block, and where that stands."""
    body: list[Any] = []
    while at < len(nodes):
        node = nodes[at]
        if node.word in ("end", "else"):
            return body, at
        if node.word in ("if", "range"):
            branch, at = _branch(nodes, at, node.text)
            body.append(branch)
        else:
            body.append(node)
        at += 1
    return body, at


def _branch(nodes: Sequence[_Node], at: int, head: str) -> tuple[_Branch, int]:
    body, at = _block(nodes, at + 1)
    if at >= len(nodes):
        raise ValueError(f"{head!r} has no end")
    otherwise: list[Any] = []
    if nodes[at].word == "else":
        if further := nodes[at].text.removeprefix("else").strip():
            branch, at = _branch(nodes, at, further)  # "else if" shares its end
            return _Branch(head, body, [branch]), at
        otherwise, at = _block(nodes, at + 1)
    return _Branch(head, body, otherwise), at


def _run(body: Sequence[Any], dot: Any, names: dict[str, Any]) -> Iterator[str]:
    for node in body:
        if isinstance(node, _Branch):
            yield from _take(node, dot, names)
        elif not node.action:
            yield node.text
        elif found := re.fullmatch(r"(\$\w+)\s*:?=\s*(.*)", node.text):
            names[found[1]] = _value(found[2], dot, names)
        else:
            yield str(_value(node.text, dot, names))


def _take(branch: _Branch, dot: Any, names: dict[str, Any]) -> Iterator[str]:
    word, _, rest = branch.head.partition(" ")
    if word == "if":
        yield from _run(branch.body if _value(rest, dot, names) else branch.otherwise, dot, names)
    elif word == "range" and (found := re.fullmatch(r"(\$\w+), (\$\w+) := (.*)", rest)):
        for i, item in enumerate(_value(found[3], dot, names)):
            names |= {found[1]: i, found[2]: item}
            yield from _run(branch.body, item, names)
    else:
        raise ValueError(f"{branch.head!r} is not understood")


def _value(source: str, dot: Any, names: Mapping[str, Any]) -> Any:
    tokens = _TOKEN.findall(source)
    if "".join(tokens) != re.sub(r"\s+(?=(?:[^\"]*\"[^\"]*\")*[^\"]*$)", "", source):
        raise ValueError(f"{source!r} is not understood")
    value, rest = _call(tokens, dot, names)
    if rest:
        raise ValueError(f"{source!r}: nothing may follow {value!r}")
    return value


def _call(tokens: list[str], dot: Any, names: Mapping[str, Any]) -> tuple[Any, list[str]]:
    if not tokens or tokens[0] not in _FUNCTIONS:
        return _operand(tokens, dot, names)
    function, rest, given = _FUNCTIONS[tokens[0]], tokens[1:], []
    while rest and rest[0] != ")":
        value, rest = _operand(rest, dot, names)
        given.append(value)
    return function(*given), rest


def _operand(tokens: list[str], dot: Any, names: Mapping[str, Any]) -> tuple[Any, list[str]]:
    if not tokens:
        raise ValueError("a value is missing")
    first, rest = tokens[0], tokens[1:]
    if first == "(":
        value, rest = _call(rest, dot, names)
        if rest[:1] != [")"]:
            raise ValueError("a parenthesis is not closed")
        return value, rest[1:]
    if first.startswith('"'):
        return json.loads(first), rest
    if first in ("true", "false"):
        return first == "true", rest
    if first.isdigit():
        return int(first), rest
    name, *fields = first.split(".")
    if name and name not in names:
        raise ValueError(f"{first!r} is not known")
    value = names[name] if name else dot
    for field in fields:
        value = value[field]
    return value, rest


_FUNCTIONS: Mapping[str, Any] = {
    "eq": lambda a, b: a == b, "and": lambda a, b: a and b, "not": lambda a: not a, "len": len,
    "slice": lambda a, start: a[start:],
}  # fmt: skip
