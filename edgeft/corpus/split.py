"""Which rows are trained on and which are held out, and proof that the second do not stand in the first."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

from edgeft.corpus.conversation import Conversation
from edgeft.corpus.text import ngrams, words
from edgeft.errors import DataError

NGRAM = 8
_SHARED = "\0several"


@dataclass(frozen=True, kw_only=True)
class Split:
    """Row numbers of either side, each in a seeded order, and what was kept together."""

    train: tuple[int, ...]
    heldout: tuple[int, ...]
    units: int
    """Groups or clusters in all."""
    heldout_units: int
    largest_unit: int
    """Rows of the largest group or cluster."""


def split(
    rows: Sequence[Conversation],
    units: Sequence[str],
    *,
    holdout: float,
    seed: int,
    entangled: AbstractSet[str] = frozenset(),
) -> Split:
    """Hold out whole units (rows with the same entry in `units`) until `holdout` is reached, none of `entangled`.

    `holdout` below 1 is a fraction of the rows, else a number of rows. Units are taken in the order of a hash
    of the seed and the unit's name or contents, so a row added later moves few others. A unit that would overshoot the
    aim by more than it falls short now is passed over. Raises DataError when no split comes out of that.
    """
    members: dict[str, list[int]] = defaultdict(list)
    for i, unit in enumerate(units):
        members[unit].append(i)
    aim = max(1, round(holdout * len(rows)) if holdout < 1 else round(holdout))
    if aim >= len(rows):
        raise DataError(f"cannot hold out {aim} of {len(rows)} rows: nothing would be left to train on")
    chosen: list[str] = []
    size = 0
    free = [u for u in members if u not in entangled]
    for unit in sorted(free, key=lambda u: _unit_hash(u, [rows[i] for i in members[u]], seed)):
        if size + len(members[unit]) - aim <= aim - size - 1 and len(chosen) < len(members) - 1:
            chosen.append(unit)
            size += len(members[unit])
        if size >= aim:
            break
    if not chosen:
        largest = max(map(len, members.values()))
        raise DataError(
            f"cannot hold out {aim} rows without a leak: the {len(rows)} rows form {len(members)} groups of related "
            f"rows, the largest of {largest}, and {len(members) - len(free)} of them repeat what others say",
            hint='give more varied data, a larger `holdout`, or a held-out file of its own with split = "heldout"',
        )
    held = {i for unit in chosen for i in members[unit]}
    return Split(
        train=in_seeded_order([i for i in range(len(rows)) if i not in held], rows, seed),
        heldout=in_seeded_order(sorted(held), rows, seed),
        units=len(members),
        heldout_units=len(chosen),
        largest_unit=max(map(len, members.values())),
    )


def in_seeded_order(members: Sequence[int], rows: Sequence[Conversation], seed: int) -> tuple[int, ...]:
    """Row numbers ordered by a hash of the seed and the row's contents: a shuffle that outlives added rows."""
    return tuple(sorted(members, key=lambda i: (row_hash(rows[i], seed), i)))


def row_hash(row: Conversation, seed: int, copy: int = 0) -> str:
    return _hash(f"{seed}\0{copy}\0{json.dumps(row.as_dicts(), ensure_ascii=False)}")


def entangled(rows: Sequence[Conversation], units: Sequence[str], limit: float) -> set[str]:
    """Units with a row of which the share `limit` of 8-grams stands in other units: held out, they would leak.

    Boilerplate ("inherited in an autosomal recessive pattern, which means …") joins texts that are no duplicates.
    """
    owners: dict[int, str] = {}
    grams = [_row_grams(row) for row in rows]
    for own, unit in zip(grams, units, strict=True):
        for gram in own:
            if owners.setdefault(gram, unit) != unit:
                owners[gram] = _SHARED
    return {
        unit
        for own, unit in zip(grams, units, strict=True)
        if own and sum(owners[g] == _SHARED for g in own) >= limit * len(own)
    }


def overlaps(train: Sequence[Conversation], heldout: Sequence[Conversation]) -> list[float]:
    """For each held-out row the share, 0 to 1, of its answer's 8-grams that occur in the training answers.

    An answer of fewer than 8 words ("yes") says nothing alone; its row is compared as question and answer.
    """
    answers = {g for row in train for g in _grams(row.answer)}
    wholes = {g for row in train for g in _grams(_whole(row))} if any(map(_is_short, heldout)) else set()
    found = []
    for row in heldout:
        seen, grams = (wholes if _is_short(row) else answers), _row_grams(row)
        found.append(sum(g in seen for g in grams) / max(1, len(grams)))
    return found


def mixture(
    members: Mapping[int, Sequence[int]], weights: Mapping[int, float], repeats: Mapping[int, int]
) -> dict[int, int]:
    """How many rows of each source the training set takes, so that sources stand in the ratio of their weights.

    `members` are the rows that each source can give, each usable `repeats` times. The mixture is the largest in
    which no source must give more than that; the others are cut down. Raises DataError for a source that has
    a weight but no row left.
    """
    if dry := [s for s in weights if not members.get(s)]:
        raise DataError(f"source {dry[0] + 1} has weight {weights[dry[0]]:g} but no row left to train on")
    whole = sum(weights.values())
    total = min(len(members[s]) * repeats[s] * whole / w for s, w in weights.items())
    # The small addend keeps 0.1 * 3 * 10 from becoming one row less than its 3.
    return {s: max(1, int(total * w / whole + 1e-6)) for s, w in weights.items()}


def _row_grams(row: Conversation) -> list[int]:
    return _grams(_whole(row) if _is_short(row) else row.answer)


def _grams(text: str) -> list[int]:
    """8-grams as Python's hashes of them: used within one process only, and a tenth of the memory."""
    return [hash(g) for g in ngrams(words(text), NGRAM)]


def _is_short(row: Conversation) -> bool:
    return len(words(row.answer)) < NGRAM


def _whole(row: Conversation) -> str:
    return f"{row.question}\n{row.answer}"


def _unit_hash(unit: str, rows: Sequence[Conversation], seed: int) -> str:
    """A group by its name; a cluster, which has none, by the smallest hash of its rows."""
    named = next((row.group for row in rows if row.group and row.group == unit), "")
    return _hash(f"{seed}\0group\0{named}") if named else min(row_hash(row, seed) for row in rows)


def _hash(text: str) -> str:
    return hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=16).hexdigest()
