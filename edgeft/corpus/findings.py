"""What there is to say about prepared data: dropped rows by rule, lengths, overlap, rows worth a look."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from edgeft.corpus import duplicates, rules
from edgeft.corpus.conversation import Conversation
from edgeft.corpus.rows import Row
from edgeft.corpus.template import Template
from edgeft.corpus.text import shortened

EXAMPLES = 3
RULES = {
    "turns": "turns not in the order user, assistant, …",
    "empty": "a question or an answer without text",
    "junk": "answers that say nothing",
    "truncated": "answers cut short",
    "repeats_question": "answers that begin with their question",
    "control_tokens": "texts that spell out a control token of the model",
    "duplicates": "exact duplicates",
    "over_long": "more tokens than max_tokens",
    "near_duplicates": "near duplicates",
    "rows": "over the source's cap `rows`",
    "leak": "held-out rows too much like training rows",
    "weight": "left out to keep the weights",
}
"""Why a row may be dropped, in the order in which the rules are applied."""


class Dropped:
    """Counts of dropped rows by source and rule, with the first examples of each."""

    def __init__(self) -> None:
        self._found: dict[tuple[int, str], list[dict[str, str]]] = {}
        self._counts: dict[tuple[int, str], int] = {}

    def add(self, row: Conversation, rule: str, reason: str) -> None:
        key = (row.source, rule)
        self._counts[key] = self._counts.get(key, 0) + 1
        examples = self._found.setdefault(key, [])
        if len(examples) < EXAMPLES:
            examples.append({"origin": row.origin, "reason": reason, "text": example(row)})

    def of(self, source: int) -> dict[str, Any]:
        """Rule -> count and examples, for one source."""
        return {
            rule: {"count": self._counts[source, rule], "examples": self._found[source, rule]}
            for rule in RULES
            if (source, rule) in self._counts
        }

    def totals(self) -> dict[str, int]:
        """Rule -> rows dropped in all sources."""
        every = {rule: sum(n for (_, r), n in self._counts.items() if r == rule) for rule in RULES}
        return {rule: n for rule, n in every.items() if n}


def example(row: Conversation) -> str:
    """A row in one short line: its question and its answer."""
    return f"{shortened(row.question, 90)} → {shortened(row.answer, 110)}"


def lengths(rows: Sequence[Row]) -> dict[str, dict[str, int]]:
    """p50, p90, p99 and maximum of the tokens of prompt (all that is not learnt), answer and whole row."""
    answers = [row.supervised for row in rows]
    totals = [len(row.ids) for row in rows]
    prompts = [t - a for t, a in zip(totals, answers, strict=True)]
    return {"prompt": _percentiles(prompts), "answer": _percentiles(answers), "total": _percentiles(totals)}


def tokens(rows: Sequence[Row]) -> dict[str, Any]:
    """Tokens in all, those learnt, their share (0 to 1), and the lengths."""
    total, learnt = sum(len(r.ids) for r in rows), sum(r.supervised for r in rows)
    share = round(learnt / total, 4) if total else 0.0
    return {"total": total, "supervised": learnt, "supervised_share": share, "lengths": lengths(rows)}


def overlap_summary(overlaps: Sequence[float], rows: Sequence[Conversation]) -> dict[str, Any]:
    """Mean overlap of held-out answers with the training answers, and how many lie over 50 % and 90 %."""
    ranked = sorted(range(len(rows)), key=lambda i: (-overlaps[i], i))
    worst = [i for i in ranked[:EXAMPLES] if overlaps[i] > 0]
    return {
        "rows": len(rows),
        "mean": round(sum(overlaps) / len(overlaps), 4) if overlaps else 0.0,
        "max": round(max(overlaps, default=0.0), 4),
        "over_50_percent": sum(o >= 0.5 for o in overlaps),
        "over_90_percent": sum(o >= 0.9 for o in overlaps),
        "worst": [
            {"origin": rows[i].origin, "overlap": round(overlaps[i], 4), "text": example(rows[i])}
            for i in worst
        ],
    }


def remarks(rows: Sequence[Conversation]) -> dict[str, Any]:
    """What a reader should know about rows that stay."""
    pairs = duplicates.conflicts(rows)
    repeated = [r for r in rows if rules.repeats_question(r)]
    first: dict[str, Conversation] = {}
    shared = [r for r in rows if first.setdefault(r.answer, r) is not r and len(r.answer.split()) >= 4]
    addresses = [r for r in rows if "://" in r.answer or "www." in r.answer]

    def remark(what: str, found: Sequence[Conversation]) -> dict[str, Any]:
        examples = [{"origin": r.origin, "text": example(r)} for r in found[:EXAMPLES]]
        return {"what": what, "count": len(found), "examples": examples}

    conflicts = [
        {"origin": f"{rows[i].origin} and {rows[j].origin}", "text": example(rows[j])} for i, j in pairs
    ]
    return {
        "conflicts": {
            "what": "a question asked before, answered differently",
            "count": len(pairs), "examples": conflicts[: EXAMPLES],
        },
        "repeats_question": remark("an answer that begins with its question", repeated),
        "shared_answers": remark("an answer given word for word to an earlier question", shared),
        "addresses": remark("an answer with a web address", addresses),
    }  # fmt: skip


def template_facts(template: Template) -> dict[str, Any]:
    return {
        "sha256": template.sha256, "end_of_turn": template.end_of_turn, "end_of_turn_id": template.end_of_turn_id,
        "bos": template.bos, "bos_count": template.bos_count,
    }  # fmt: skip


def _percentiles(values: Sequence[int]) -> dict[str, int]:
    """Nearest-rank percentiles."""
    ordered = sorted(values) or [0]

    def at(share: float) -> int:
        return ordered[min(len(ordered) - 1, max(0, -(-round(share * 100) * len(ordered) // 100) - 1))]

    return {"p50": at(0.5), "p90": at(0.9), "p99": at(0.99), "max": ordered[-1]}
