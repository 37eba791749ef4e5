"""What the trained model itself says about held-out and general text: the reference that every shipped file is held to.

The reference is the model as it stood at the end of training, its quantized base with the adapter attached, not a file
that was made from it.
"""

from __future__ import annotations

import json
from typing import Any

from pydantic import Field

from edgeft import estimates, llamacpp
from edgeft.stage import Facts, InputPath, Job, Params, Stage


class Reference(Params):
    windows: int = Field(32, ge=2, le=10_000)
    """How many windows of held-out tokens are scored."""
    general_windows: int = Field(16, ge=0, le=10_000)
    """How many windows of general text; 0: none, and nothing is said about drift outside the domain."""
    general: InputPath | None = None
    """A text file to take instead of edgeft's own general text."""
    n_ctx: int = Field(512, ge=32, le=8192, multiple_of=2)
    """Tokens in a window; the second half of each is scored, as llama.cpp does."""
    questions: int = Field(6, ge=0, le=200)
    """How many held-out questions are answered by base, trained and shipped model."""
    answer_tokens: int = Field(96, ge=1, le=2048)
    """Where an answer that does not stop by itself is cut."""


def run(job: Job[Reference]) -> Facts:
    llamacpp.activate()
    llamacpp.ensure("library")
    import numpy as np
    from transformers import AutoTokenizer

    from edgeft import progress, training
    from edgeft.corpus import load_rows
    from edgeft.parity import reference, suite
    from edgeft.parity.evidence import Reference as Said
    from edgeft.parity.speakers import Torch

    p, base, train = job.params, job.inputs["base"].path / "model", job.inputs["train"]
    rows = load_rows(job.inputs["data"].path / "heldout.jsonl")
    tokenizer = AutoTokenizer.from_pretrained(base)
    bos = reference.bos(tokenizer)
    texts = {"domain": suite.domain([(r.ids, r.labels) for r in rows], p.n_ctx, p.windows, bos=bos)}
    if p.general_windows:
        ids = tokenizer.encode(
            (p.general or suite.GENERAL).read_text(encoding="utf-8"), add_special_tokens=False
        )
        texts["general"] = suite.plain(ids, p.n_ctx, p.general_windows, bos=bos)
    model = training.load_trained(
        base, train.path / "adapter", method=train.facts["method"], compute_dtype=train.facts["compute_dtype"]
    )
    speaker = Torch(model, tokenizer)
    nll = {name: reference.write(speaker, text, job.out / f"{name}.kld") for name, text in texts.items()}
    with model.disable_adapter():
        before = reference.losses(speaker, texts["domain"], doing="score the base")
    said = Said(texts=texts, nll=nll, base=before)
    np.savez(job.out / "reference.npz", **said.arrays())
    asked = []
    for i, row in enumerate(rows[: p.questions]):
        progress.report("answer held-out questions", i, p.questions)
        prompt = row.prompt_ids()
        with model.disable_adapter():
            replies = {"base": vars(speaker.answer(prompt, p.answer_tokens))}
        replies["trained"] = vars(speaker.answer(prompt, p.answer_tokens))
        asked.append({"question": row.messages[-2]["content"], "expected": row.messages[-1]["content"],
                      "prompt_ids": prompt, "replies": replies})  # fmt: skip
    (job.out / "questions.json").write_text(json.dumps(asked, ensure_ascii=False, indent=1), encoding="utf-8")
    return {"title": _title(job.inputs["base"].facts, train.facts), **_facts(p, said)}


def _title(base: Facts, train: Facts) -> str:
    held = "in NF4" if train["method"] == "qlora" else "in its own precision"
    name = base.get("name") or base.get("architecture") or "the base"
    return f"{name} {held} with the trained adapter attached, computed in {train['compute_dtype']}"


def _facts(p: Reference, said: Any) -> Facts:
    import numpy as np

    counted = said.texts["domain"].counted
    before, trained = (float(np.exp(x[counted].mean())) for x in (said.base, said.nll["domain"]))
    general = float(np.exp(said.nll["general"].mean())) if "general" in said.nll else None
    return {
        "summary": f"perplexity of held-out answers {before:.3f} (base) → {trained:.3f} (trained), {counted.sum():,} tokens"
        + (f"; of general text {general:.2f}" if general else ""),
        "ppl_base": before, "ppl_trained": trained, "ppl_general": general,
        "texts": [text.facts() for text in said.texts.values()], "max_answer_tokens": p.answer_tokens,
        "n_ctx": max(text.n_ctx for text in said.texts.values()),
    }  # fmt: skip


STAGE = Stage(
    name="reference", params=Reference, run=run, needs=("base", "data", "train"),
    makes=("domain.kld", "reference.npz", "questions.json"), extra="train", tools=(llamacpp.LIBRARY,),
    estimate=estimates.reference, version=2,
)  # fmt: skip
