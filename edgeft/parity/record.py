"""Writes down what a trained model says, for every file made from it to be held to: losses, log-probabilities, answers.

The folder then holds `domain.kld` and `general.kld` (llama.cpp's base files), `reference.npz` (`evidence.Reference`) and
`questions.json`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeft import progress
from edgeft.corpus.rows import Row
from edgeft.parity import reference, suite
from edgeft.parity.evidence import Reference
from edgeft.parity.speakers import Reply, Speaker

if TYPE_CHECKING:
    from edgeft.parity.statistics import Array
    from edgeft.parity.suite import Text


@dataclass(frozen=True, kw_only=True)
class Question:
    """A held-out question, and who answered it how."""

    question: str
    expected: str
    prompt_ids: list[int]
    """The rendered prompt."""
    replies: dict[str, Reply]
    """By "base" and "trained"."""


def texts(
    rows: Sequence[Row], tokenizer: Any, *, n_ctx: int, windows: int, general: Path | None, general_windows: int
) -> dict[str, Text]:  # fmt: skip
    """The domain text out of held-out rows, and `general_windows` of general text, edgeft's own unless given."""
    bos = reference.bos(tokenizer)
    found = {"domain": suite.domain([(r.ids, r.labels) for r in rows], n_ctx, windows, bos=bos)}
    if general_windows:
        ids = tokenizer.encode(
            (general or suite.GENERAL).read_text(encoding="utf-8"), add_special_tokens=False
        )
        found["general"] = suite.plain(ids, n_ctx, general_windows, bos=bos)
    return found


def questions(rows: Sequence[Row]) -> list[Question]:
    """The last exchange of each row, not answered yet."""
    return [
        Question(
            question=row.messages[-2]["content"], expected=row.messages[-1]["content"],
            prompt_ids=row.prompt_ids(), replies={},
        )
        for row in rows
    ]  # fmt: skip


def answer(speaker: Speaker, who: str, asked: Sequence[Question], most: int) -> None:
    """Let `speaker` answer each question with at most `most` tokens, and keep its replies as those of `who`."""
    for number, question in enumerate(asked):
        progress.report(f"answer held-out questions ({who})", number, len(asked))
        question.replies[who] = speaker.answer(question.prompt_ids, most)


def write(
    speaker: Speaker, texts: Mapping[str, Text], out: Path, *, base: Array, asked: Sequence[Question]
) -> Reference:
    """Score every text with `speaker` and write the four files into `out`.

    `base` holds the losses [windows, scored] of the model before training on the domain text, nats per token.
    """
    import numpy as np

    nll = {name: reference.write(speaker, text, out / f"{name}.kld") for name, text in texts.items()}
    said = Reference(texts=texts, nll=nll, base=base)
    np.savez(out / "reference.npz", **said.arrays())
    lines = [asdict(question) for question in asked]
    (out / "questions.json").write_text(json.dumps(lines, ensure_ascii=False, indent=1), encoding="utf-8")
    return said


def read(folder: Path) -> tuple[Reference, list[Question]]:
    """What `write` left in a folder."""
    import numpy as np

    said = Reference.of(dict(np.load(folder / "reference.npz")))
    lines = json.loads((folder / "questions.json").read_text(encoding="utf-8"))
    asked = [
        Question(**{**q, "replies": {who: Reply(**reply) for who, reply in q["replies"].items()}})
        for q in lines
    ]
    return said, asked


def facts(said: Reference, *, answer_tokens: int) -> dict[str, Any]:
    """The recorded numbers, JSON-ready: perplexities before and after training, what was scored, and for how long
    a context."""
    import numpy as np

    counted = said.texts["domain"].counted
    trained = float(np.exp(said.nll["domain"][counted].mean()))
    before = float(np.exp(said.base[counted].mean())) if said.base is not None else None
    general = float(np.exp(said.nll["general"].mean())) if "general" in said.nll else None
    return {
        "ppl_base": before, "ppl_trained": trained, "ppl_general": general,
        "texts": [text.facts() for text in said.texts.values()], "max_answer_tokens": answer_tokens,
        "n_ctx": max(text.n_ctx for text in said.texts.values()),
    }  # fmt: skip
