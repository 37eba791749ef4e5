"""Rows of JSON files with the line each starts on: a list, an object around a list, or an object a line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from edgeft.corpus.conversation import Record
from edgeft.errors import DataError

LIST_KEYS = ("data", "rows", "train", "examples", "instances")
"""Keys under which a JSON object may keep its list of rows."""
_BLANK = b"\xef\xbb\xbf \t\r\n"


def read_json(path: Path, name: str) -> Iterator[Record]:
    """A file that opens with a list is one document; so is a `.json` unless its first line is a whole object."""
    with path.open("rb") as f:
        filled = (stripped for line in f if (stripped := line.strip(_BLANK)))
        first, second = next(filled, b""), next(filled, b"")
    lines = path.suffix.lower() != ".json" or (second and _is_object(first))
    if first.startswith(b"[") or not lines:
        yield from _whole_json(path, name)
    else:
        yield from _lines(path, name)


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def _lines(path: Path, name: str) -> Iterator[Record]:
    with path.open("rb") as f:
        # Splitting on \n only: str.splitlines would also cut at U+2028 inside a JSON string.
        for number, raw in enumerate(f, 1):
            if not (line := raw.strip(_BLANK)):
                continue
            origin = f"{name}:{number}"
            try:
                value = json.loads(line)
            except UnicodeDecodeError as e:
                yield Record(origin=origin, columns={}, problem=f"not UTF-8 (byte {e.start} of the line)")
            except (ValueError, RecursionError) as e:
                yield Record(origin=origin, columns={}, problem=f"not JSON: {e}")
            else:
                yield _record(origin, value)


def _record(origin: str, value: Any) -> Record:
    if isinstance(value, dict):
        return Record(origin=origin, columns=value)
    return Record(origin=origin, columns={}, problem=f"a row must be a JSON object, not {_short(value)}")


def _whole_json(path: Path, name: str) -> Iterator[Record]:
    """A list of rows, or an object that keeps them under one of LIST_KEYS; each with the line it starts on."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as e:
        line = e.object.count(b"\n", 0, e.start) + 1
        yield Record(origin=f"{name}:{line}", columns={}, problem="not UTF-8")
        return
    try:
        at = _list_start(text)
    except json.JSONDecodeError as e:
        yield Record(origin=f"{name}:{e.lineno}", columns={}, problem=f"not JSON: {e}")
        return
    if at < 0:
        raise DataError(
            f"{path} holds one JSON object without a list of rows",
            hint=f"expected a list, an object a line, or an object with a list under {', '.join(LIST_KEYS)}",
        )
    yield from _elements(text, at, name)


def _list_start(text: str) -> int:
    """Where the list's first element may stand; -1 if the document has no list of rows."""
    at = _skip(text, 0)
    if text[at : at + 1] == "[":
        return at + 1
    decoder = json.JSONDecoder()
    at = _skip(text, at + 1)
    while text[at : at + 1] != "}":
        key, at = decoder.raw_decode(text, at)
        at = _skip(text, at)
        if text[at : at + 1] != ":":
            raise json.JSONDecodeError("Expecting ':' delimiter", text, at)
        at = _skip(text, at + 1)
        if key in LIST_KEYS and text[at : at + 1] == "[":
            return at + 1
        _, at = decoder.raw_decode(text, at)
        at = _skip(text, at)
        if text[at : at + 1] == ",":
            at = _skip(text, at + 1)
        elif text[at : at + 1] != "}":
            raise json.JSONDecodeError("Expecting ',' delimiter", text, at)
    return -1


def _elements(text: str, at: int, name: str) -> Iterator[Record]:
    decoder = json.JSONDecoder()
    line, counted = 1, 0
    at = _skip(text, at)
    while text[at : at + 1] != "]":
        line, counted = line + text.count("\n", counted, at), at
        try:
            value, at = decoder.raw_decode(text, at)
            at = _skip(text, at)
            if text[at : at + 1] not in (",", "]"):
                raise json.JSONDecodeError("Expecting ',' or ']'", text, at)
        except (json.JSONDecodeError, RecursionError) as e:
            # Without its end the next row cannot be found, so reading stops here.
            where = e.lineno if isinstance(e, json.JSONDecodeError) else line
            yield Record(origin=f"{name}:{where}", columns={}, problem=f"not JSON: {e}")
            return
        yield _record(f"{name}:{line}", value)
        if text[at] == ",":
            at = _skip(text, at + 1)


def _skip(text: str, at: int) -> int:
    """The next place that is not white space."""
    while at < len(text) and text[at] in " \t\r\n":
        at += 1
    return at


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else text[:39] + "…"
