"""Comparing texts: words (characters where a script writes no spaces), n-grams, overlap."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from collections.abc import Set as AbstractSet

# Thai to Lao, Myanmar, Khmer, kana and Han are written without spaces: there each character counts as a word.
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
# Operators count, because "2 + 3" and "2 × 3" are different questions.
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+|[+*/=<>%^×÷−]|-(?=\s?\d)")
_INVISIBLE = re.compile(r"[\u200b-\u200f\u2060\ufeff\u00ad]")


def words(text: str) -> list[str]:
    """Case-folded words of a text, without punctuation."""
    return _WORD.findall(folded(text))


def folded(text: str) -> str:
    """A text as it is compared: compatibility forms unified, case folded, white space collapsed."""
    if not text.isascii():
        text = _INVISIBLE.sub("", unicodedata.normalize("NFKC", text))
    return " ".join(text.casefold().split())


def ngrams(sequence: Sequence[str], n: int) -> list[tuple[str, ...]]:
    """All runs of n words in order; a text shorter than n is one run of its own, an empty one has none."""
    if not sequence:
        return []
    return [tuple(sequence[i : i + n]) for i in range(max(1, len(sequence) - n + 1))]


def jaccard(a: AbstractSet[object], b: AbstractSet[object]) -> float:
    """Shared members over all members, 0 to 1; two empty sets share nothing."""
    if not a or not b:
        return 0.0
    shared = len(a & b)
    return shared / (len(a) + len(b) - shared)


def shortened(text: str, limit: int = 160) -> str:
    """One line of at most `limit` characters for a report."""
    line = " ".join(text.split())
    return line if len(line) <= limit else line[: limit - 1] + "…"
