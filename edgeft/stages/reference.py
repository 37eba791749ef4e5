"""What the trained model itself says about the held-out text: the reference that every shipped file is held to.

The reference is the model as it stood at the end of training, its quantized base with the adapter attached, not a file
that was made from it.
"""

from __future__ import annotations

import json

from pydantic import Field

from edgeft import estimates, llamacpp
from edgeft.stage import Facts, Job, Params, Stage


class Reference(Params):
    windows: int = Field(16, ge=2, le=10_000)
    """How many windows of held-out tokens are scored."""
    n_ctx: int = Field(512, ge=32, le=8192, multiple_of=2)
    """Tokens in a window; the second half of each is scored, as llama.cpp does."""
    questions: int = Field(3, ge=0, le=50)
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
    from edgeft.parity import reference

    p, base = job.params, job.inputs["base"].path / "model"
    rows = load_rows(job.inputs["data"].path / "heldout.jsonl")
    tokenizer = AutoTokenizer.from_pretrained(base)
    train = job.inputs["train"]
    model = training.load_trained(
        base, train.path / "adapter", method=train.facts["method"], compute_dtype=train.facts["compute_dtype"]
    )
    cut = reference.windows([(r.ids, r.labels) for r in rows], p.n_ctx, p.windows, bos=_bos(tokenizer))
    losses = reference.write(
        model, cut, model.get_output_embeddings().weight.shape[0], job.out / "reference.kld"
    )
    np.savez(job.out / "losses.npz", trained=losses.trained, base=losses.base, answers=cut.answers)
    asked = []
    for i, row in enumerate(rows[: p.questions]):
        progress.report("answer held-out questions", i, p.questions)
        prompt = row.prompt_ids()
        with model.disable_adapter():
            before = reference.answer(model, tokenizer, prompt, p.answer_tokens)
        after = reference.answer(model, tokenizer, prompt, p.answer_tokens)
        asked.append({"question": row.messages[-2]["content"], "expected": row.messages[-1]["content"],
                      "base": before, "trained": after, "prompt_ids": prompt})  # fmt: skip
    (job.out / "questions.json").write_text(json.dumps(asked, ensure_ascii=False, indent=1))
    trained, was = float(losses.trained.mean()), float(losses.base.mean())
    return {
        "summary": f"held-out perplexity {np.exp(was):.3f} (base) → {np.exp(trained):.3f} (trained), {losses.trained.size} tokens",
        "ppl_base": float(np.exp(was)), "ppl_trained": float(np.exp(trained)),
        "windows": len(cut.ids), "n_ctx": cut.n_ctx, "tokens": losses.trained.size, "answer_tokens": int(cut.answers.sum()),
        "max_answer_tokens": p.answer_tokens,
    }  # fmt: skip


def _bos(tokenizer: object) -> int | None:
    """The id llama.cpp would put in front of a window, for tokenizers that add one."""
    encoded = tokenizer.encode("a")  # type: ignore[attr-defined]
    bos: int | None = tokenizer.bos_token_id  # type: ignore[attr-defined]
    return bos if bos is not None and encoded[:1] == [bos] else None


STAGE = Stage(
    name="reference", params=Reference, run=run, needs=("base", "data", "train"),
    makes=("reference.kld", "losses.npz", "questions.json"), extra="train", tools=(llamacpp.LIBRARY,), estimate=estimates.reference,
)  # fmt: skip
