"""Rules that drop one row for what it says itself: empty, junk, cut short, turns out of order.

Each rule is a function from a conversation to a reason, empty when the row may stay. Rules that compare rows
with each other are in `edgeft.corpus.duplicates`.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass

from edgeft.corpus.conversation import Conversation
from edgeft.corpus.text import folded, words

JUNK = frozenset(
    (
        "ok", "okay", "k", "kk", "hm", "hmm", "hmmm", "uh", "um", "lol", "haha", "thx", "thanks", "thank you", "test",
        "testing", "asdf", "qwerty", "foo", "bar", "tbd", "todo", "n/a", "na", "n.a", "null", "nan", "undefined",
        "[deleted]", "[removed]", "deleted", "removed", "see above", "same as above", "lorem ipsum",
        "好的", "好", "好吧", "收到", "谢谢", "无", "暂无", "略", "同上", "如上", "见上", "测试", "了解", "知道了", "不客气",
    )
)  # fmt: skip
"""Answers that teach nothing, compared without case, outer white space and closing punctuation."""
_FILLER = re.compile(r"[嗯哦噢喔啊呃额唔哈呵嘿哼诶欸ㅋㅎㅇ]+")
_ONE_LETTER = re.compile(r"([^\W\d_])\1{3,}")
_OUTER = " \t.!?…。！？~～,，、"

_END = re.compile(r"[.!?…。！？｡؟।۔](\d{1,2}|\[\d+\])?[\"'”’»」』）)\]】}*_`]*$")
_CLOSED = re.compile(r"[\"”’»」』）)\]】}`|>;$*%°]$")
_CUT = re.compile(r"[,，、(\[{（【「『“«]$|[^-]-$|\s[–—]$")
_DANGLING = frozenset(
    ("and", "or", "the", "an", "of", "because", "but", "which", "whose", "than", "if", "nor")
)
_LIST_ITEM = re.compile(r"\s*([-*•·+–]|\(?\d{1,3}[.)、]|\(?[a-zA-Z][.)]\s|#|\||>)")
_INNER_END = re.compile(r"[.!?][\"')”’\]]*\s|[。！？]")
_DANGLING_WORDS = 6
LONG_WORDS = 40
"""An answer of so many words is prose enough to expect a full stop."""
_LAST_LINE_WORDS = 10
_LETTER_CLOSING_WORDS = 6
_CAPITALS = 0.1


@dataclass(frozen=True, kw_only=True)
class Filters:
    """Which rules drop rows ("drop") and which only count them ("keep")."""

    junk: str = "drop"
    truncated: str = "drop"
    repeats_question: str = "keep"
    duplicates: str = "drop"
    near_duplicates: str = "drop"
    near_duplicate_threshold: float = 0.8
    over_long: str = "drop"
    """ "refuse" stops the build instead. No setting ever cuts an answer."""


def broken_rules(row: Conversation, filters: Filters) -> Iterator[tuple[str, str]]:
    """The rules a row breaks, as (rule, reason), in a fixed order; rules set to "keep" do not count."""
    for rule, reason in (("turns", turns(row)), ("empty", empty(row))):
        if reason:
            yield rule, reason
    if filters.junk == "drop" and (reason := next(filter(None, map(junk, row.answers)), "")):
        yield "junk", reason
    if filters.truncated == "drop" and (reason := next(filter(None, map(truncated, row.answers)), "")):
        yield "truncated", reason
    if filters.repeats_question == "drop" and (reason := repeats_question(row)):
        yield "repeats_question", reason


def turns(row: Conversation) -> str:
    """Turns must be: system at most once and first, then user, assistant, user, …, assistant."""
    roles = [m.role for m in row.messages]
    said = roles[1:] if roles[:1] == ["system"] else roles
    if said and len(said) % 2 == 0 and said == ["user", "assistant"] * (len(said) // 2):
        return ""
    return f"turns are {', '.join(roles[:6]) or 'none'}{', …' if len(roles) > 6 else ''}"


def empty(row: Conversation) -> str:
    """A user or assistant turn without any visible character."""
    return next(
        (
            f"the {m.role}'s text is empty"
            for m in row.messages
            if m.role != "system" and not folded(m.content)
        ),
        "",
    )


def junk(answer: str) -> str:
    """An answer that is filler, one letter over and over, or nothing but punctuation."""
    text = folded(answer).strip(_OUTER)
    if text in JUNK or _FILLER.fullmatch(text):
        return "the answer is a filler"
    if _ONE_LETTER.fullmatch(text):
        return "the answer is one letter over and over"
    if answer and not any(c.isalnum() or unicodedata.category(c) == "So" for c in answer):
        return "the answer is only punctuation"
    return ""


def truncated(answer: str) -> str:
    """An answer that stops in mid-sentence.

    Careful with good answers: "Aspirin", list items, verse, code, numbers and headings end without a full
    stop. What counts is an ending no sentence has (a comma, an open bracket, "because"), an open code fence, or
    long prose that uses full stops everywhere but at its end.
    """
    text = answer.rstrip()
    if _END.search(text):
        return ""
    if text.count("```") % 2:
        return "a code block is not closed"
    if text.endswith("```"):
        return ""
    line = text.rsplit("\n", 1)[-1]
    # A letter may end "Yours sincerely,": a short line of its own.
    closing = line != text and text[-1] == "," and len(words(line)) <= _LETTER_CLOSING_WORDS
    if _CUT.search(text) and len(words(text)) >= 2 and not closing:
        return f"the answer ends in {text[-1]!r}"
    last = re.search(r"([A-Za-z]+)$", text)
    count = len(words(text))
    if last and last[1] in _DANGLING and count >= _DANGLING_WORDS:
        return f"the answer ends in {last[1]!r}"
    if count < LONG_WORDS or _CLOSED.search(text) or _LIST_ITEM.match(line):
        return ""
    before = text[: -len(line)].rstrip()
    if before and not _END.search(before):
        return ""  # a list without bullets: the line above has no full stop either
    if not _INNER_END.search(text) or not _is_prose(_INNER_END.split(line)[-1]):
        return ""
    return f"the answer of {count} words ends without a full stop"


def _is_prose(sentence: str) -> bool:
    """Running text, not a list flattened into one line ("Signs: - Fever - Cough"), a title or an address."""
    if len(words(sentence)) < _LAST_LINE_WORDS or re.search(r"\s[-•–*]\s|:|/", sentence):
        return False
    spaced = sentence.split()
    capitals = sum(w[:1].isupper() for w in spaced[1:])
    return capitals <= len(spaced) * _CAPITALS


def repeats_question(row: Conversation) -> str:
    """An answer that begins by saying its whole question again."""
    said = [m for m in row.messages if m.role != "system"]
    for asked, answered in zip(said[::2], said[1::2], strict=False):
        question = words(asked.content)
        if (
            len(question) >= 4
            and words(answered.content[: 4 * len(asked.content)])[: len(question)] == question
        ):
            return "the answer begins with its question"
    return ""
