"""Rules that compare rows: exact duplicates, near duplicates, clusters of related rows, conflicting answers."""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from edgeft.corpus.conversation import Conversation
from edgeft.corpus.text import folded, jaccard, ngrams, words
from edgeft.progress import report

if TYPE_CHECKING:
    from datasketch import MinHash, MinHashLSH

SHINGLE = 5
PERMUTATIONS = 64
CLUSTER_THRESHOLD = 0.5
QUESTION_THRESHOLD = 0.8
ANSWER_WORDS = 8
"""Shorter answers ("yes", "bone marrow") say nothing about where a row comes from."""

# Bands and rows of the LSH. Candidates are checked with the exact Jaccard index, so what counts is to miss few:
# a pair at its threshold becomes a candidate with probability 1 - (1 - s^r)^b = 0.9998 at 0.8, and 0.94 at 0.5.
_DUPLICATE_BANDS = (16, 4)
_CLUSTER_BANDS = (21, 3)

Shingles = frozenset[tuple[str, ...]]


def exact(rows: Sequence[Conversation]) -> dict[int, int]:
    """Rows that say the same as an earlier one but for case and white space: row -> the earlier row."""
    first: dict[tuple[tuple[str, str], ...], int] = {}
    found = {}
    for i, row in enumerate(rows):
        earlier = first.setdefault(tuple((m.role, folded(m.content)) for m in row.messages), i)
        if earlier != i:
            found[i] = earlier
    return found


def near(rows: Sequence[Conversation], threshold: float) -> dict[int, int]:
    """Rows that nearly repeat an earlier, kept one: row -> the earlier row.

    Near means all of: Jaccard index of the 5-word shingles of question and answer at least `threshold`,
    Jaccard index of the questions' words at least 0.8, and the same numbers in the same order. The answer
    "autosomal recessive, which means …" to two questions about two diseases is no duplicate, and 5 mg is not 50.
    """
    texts = [words(f"{row.question}\n{row.answer}") for row in rows]
    shingles = [shingle(t) for t in texts]
    questions = [frozenset(words(row.question)) for row in rows]
    numbers = [re.findall(r"\d+", " ".join(t)) for t in texts]
    index = _index(_DUPLICATE_BANDS)
    found: dict[int, int] = {}
    for i, sketch in enumerate(_sketches(shingles, "looking for near duplicates")):
        for j in sorted(index.query(sketch)):
            alike = jaccard(shingles[i], shingles[j]) >= threshold and numbers[i] == numbers[j]
            if alike and jaccard(questions[i], questions[j]) >= QUESTION_THRESHOLD:
                found[i] = j
                break
        else:
            index.insert(i, sketch)
    return found


def clusters(rows: Sequence[Conversation]) -> list[int]:
    """A number for each row; rows with the same number belong on the same side of a split.

    Two rows are linked when they ask the same question, when their question-and-answer texts share half of
    their 5-word shingles, or when their answers do (of answers of 8 words or more); links chain.
    """
    links = _Links(len(rows))
    first: dict[str, int] = {}
    for i, row in enumerate(rows):
        links.join(i, first.setdefault(" ".join(words(row.question)) or str(i), i))
    whole = [words(f"{row.question}\n{row.answer}") for row in rows]
    answers = [words(row.answer) for row in rows]
    _link(links, list(range(len(rows))), whole)
    long = [i for i, a in enumerate(answers) if len(a) >= ANSWER_WORDS]
    _link(links, long, [answers[i] for i in long])
    return [links.find(i) for i in range(len(rows))]


def conflicts(rows: Sequence[Conversation]) -> list[tuple[int, int]]:
    """Pairs (first row, later row) with the same messages up to different last answers."""
    first: dict[tuple[str, ...], int] = {}
    found = []
    for i, row in enumerate(rows):
        asked = tuple(folded(m.content) for m in row.messages[:-1])
        earlier = first.setdefault(asked, i)
        if earlier != i and folded(rows[earlier].messages[-1].content) != folded(row.messages[-1].content):
            found.append((earlier, i))
    return found


def shingle(text: Sequence[str]) -> Shingles:
    """The set of a text's 5-word runs."""
    return frozenset(ngrams(text, SHINGLE))


def _link(links: _Links, members: Sequence[int], texts: Sequence[Sequence[str]]) -> None:
    shingles = [shingle(t) for t in texts]
    index = _index(_CLUSTER_BANDS)
    for i, sketch in enumerate(_sketches(shingles, "clustering")):
        for j in sorted(index.query(sketch)):
            # Boilerplate makes thousands of pairs; one link a cluster is enough.
            if (
                links.find(members[i]) != links.find(members[j])
                and jaccard(shingles[i], shingles[j]) >= CLUSTER_THRESHOLD
            ):
                links.join(members[i], members[j])
        index.insert(i, sketch)


def _sketches(shingles: Sequence[Shingles], what: str) -> Iterator[MinHash]:
    from datasketch import MinHash

    # Drawing the permutations costs more than a sketch does; copies share them.
    blank = MinHash(num_perm=PERMUTATIONS, seed=1, hashfunc=zlib.crc32)
    for done, shingled in enumerate(shingles):
        if done % 500 == 0:
            report(what, done, len(shingles), unit="rows")
        sketch = blank.copy()
        sketch.update_batch(["\0".join(s).encode() for s in shingled])
        yield sketch


def _index(bands: tuple[int, int]) -> MinHashLSH:
    from datasketch import MinHashLSH

    return MinHashLSH(num_perm=PERMUTATIONS, params=bands)


class _Links:
    """Union-find; a cluster's number is its smallest member, so it does not depend on the order of joining."""

    def __init__(self, size: int) -> None:
        self._parent = list(range(size))

    def find(self, i: int) -> int:
        while self._parent[i] != i:
            self._parent[i] = self._parent[self._parent[i]]
            i = self._parent[i]
        return i

    def join(self, i: int, j: int) -> None:
        i, j = self.find(i), self.find(j)
        self._parent[max(i, j)] = min(i, j)
