"""What is written down of one thing that ships, whichever runtime speaks for it: scores, answers, worst tokens, checks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edgeft.llamacpp.score import Scores
from edgeft.parity import evidence
from edgeft.parity.certificate import Manners, Word
from edgeft.parity.checks.check import Check
from edgeft.parity.evidence import Detokenize, Reference
from edgeft.parity.record import Question
from edgeft.parity.speakers import Reply, Speaker


@dataclass(frozen=True, kw_only=True)
class Shipped:
    """All that was heard from it."""

    scores: dict[str, Scores]
    """By text."""
    worst: list[Word]
    replies: list[Reply]
    """One for each question asked."""
    manners: dict[str, Manners]
    """By "base", "trained", "shipped"."""


def look(
    speaker: Speaker, reference: Reference, asked: Sequence[Question], folder: Path, spell: Detokenize, *, most: int,
    floor: tuple[int, Path] | None = None,
) -> Shipped:  # fmt: skip
    """Score the speaker against the reference in `folder` (`record.write`) and let it answer with at most `most` tokens.

    `floor` as `evidence.measure` takes it.
    """
    scores = evidence.measure(speaker, reference, folder, floor=floor)
    words = evidence.worst(reference, scores, spell)
    replies = evidence.ask(speaker, [q.prompt_ids for q in asked], most)
    before = {who: [q.replies[who] for q in asked] for who in ("base", "trained")}
    manners = {who: evidence.manners(who, said) for who, said in {**before, "shipped": replies}.items()}
    return Shipped(scores=scores, worst=words, replies=replies, manners=manners)


def facts(
    shipped: Shipped, reference: Reference, asked: Sequence[Question], checks: Sequence[Check]
) -> dict[str, Any]:
    """The same, JSON-ready, with a summary. `checks` are those of its exact questions; how it answers is added."""
    checks = [*checks, *evidence.behaviour(shipped.manners["trained"], shipped.manners["shipped"])]
    comparisons = reference.compare(shipped.scores)
    kept = reference.retention(shipped.scores["domain"])
    domain, wrong = comparisons["domain"], sum(c.ok is False for c in checks)
    share = f", keeps {kept.retention:.0%} of the gain" if kept and kept.retention is not None else ""
    return {
        "summary": f"KLD {domain.kld:.4f} (≤ {domain.kld_bound:.4f}), PPL ratio {domain.ppl_ratio:.4f}, "
        f"same top {domain.same_top:.1%}{share}" + (f"; {wrong} of {len(checks)} checks FAILED" if wrong else ""),
        "comparisons": {name: c.facts() for name, c in comparisons.items()},
        "retention": kept.facts() if kept else None,
        "checks": [c.facts() for c in checks],
        "worst": [asdict(w) for w in shipped.worst],
        "answers": [asdict(a) for a in _answers(asked, shipped.replies)],
        "manners": [asdict(m) for m in shipped.manners.values()],
    }  # fmt: skip


def _answers(asked: Sequence[Question], replies: Sequence[Reply]) -> list[Any]:
    return [
        evidence.answer(q.question, q.expected, _by_model(q.replies, reply))
        for q, reply in zip(asked, replies, strict=True)
    ]


def _by_model(before: Mapping[str, Reply], shipped: Reply) -> dict[str, Reply]:
    return {"base": before["base"], "trained": before["trained"], "shipped": shipped}
