"""Measure how far a quantized file strays from the trained model, and check what must be exact. `gate` judges."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import Field

from edgeft import llamacpp
from edgeft.stage import Facts, Job, Params, Stage


class Verify(Params):
    floor_windows: int = Field(2, ge=0, le=64)
    """Windows on which the kernels' noise is measured for each file; 0: not at all."""


def run(job: Job[Verify]) -> Facts:
    llamacpp.activate()
    llamacpp.ensure("library")
    import numpy as np

    from edgeft.llamacpp.decode import Decoder
    from edgeft.parity import evidence
    from edgeft.parity.checks import rendering, weights
    from edgeft.parity.speakers import Gguf, Reply
    from edgeft.stage import digest

    p, said, shipped = job.params, job.inputs["reference"], job.inputs["quantize/gguf"]
    file = shipped.path / "model.gguf"
    reference = evidence.Reference.of(dict(np.load(said.path / "reference.npz")))
    asked = json.loads((said.path / "questions.json").read_text(encoding="utf-8"))
    longest = max((len(q["prompt_ids"]) for q in asked), default=0) + said.facts["max_answer_tokens"]
    with Decoder(file, n_ctx=max(said.facts["n_ctx"], longest)) as decoder:
        speaker = Gguf(decoder)
        scores = evidence.measure(speaker, reference, said.path)
        words = evidence.worst(reference, scores, decoder.detokenize)
        replies = evidence.ask(speaker, [q["prompt_ids"] for q in asked], said.facts["max_answer_tokens"])
    np.savez(job.out / "scores.npz", **evidence.as_arrays(scores))
    before = {who: [Reply(**q["replies"][who]) for q in asked] for who in ("base", "trained")}
    manners = {who: evidence.manners(who, said) for who, said in {**before, "shipped": replies}.items()}
    checks = [
        *weights.quantized(job.inputs["gguf"].path / "model.gguf", file),
        *rendering.against_checkpoint(job.inputs["merge"].path / "model", file),
        *evidence.behaviour(manners["trained"], manners["shipped"]),
    ]
    comparisons, kept = reference.compare(scores), reference.retention(scores["domain"])
    domain = comparisons["domain"]
    wrong = sum(c.ok is False for c in checks)
    share = f", keeps {kept.retention:.0%} of the gain" if kept and kept.retention is not None else ""
    return {
        "summary": f"KLD {domain.kld:.4f} (≤ {domain.kld_bound:.4f}), PPL ratio {domain.ppl_ratio:.4f}, "
        f"same top {domain.same_top:.1%}{share}" + (f"; {wrong} of {len(checks)} checks FAILED" if wrong else ""),
        "comparisons": {name: c.facts() for name, c in comparisons.items()},
        "retention": kept.facts() if kept else None,
        "checks": [c.facts() for c in checks],
        "worst": [asdict(w) for w in words],
        "answers": [
            asdict(evidence.answer(q["question"], q["expected"], {"base": b, "trained": t, "shipped": s}))
            for q, b, t, s in zip(asked, before["base"], before["trained"], replies, strict=True)
        ],
        "manners": [asdict(m) for m in manners.values()],
        "floor": _floor(file, reference, p.floor_windows),
        "sha256": digest(file),
    }  # fmt: skip


def _floor(file: Path, reference: Any, windows: int) -> dict[str, Any] | None:
    """The noise of this machine's kernels on this file, on the first windows of the domain text."""
    from edgeft.llamacpp import kernels

    if not windows:
        return None
    return kernels.floor(file, reference.texts["domain"].ids[:windows]).facts()


STAGE = Stage(
    name="verify", params=Verify, run=run, needs=("reference", "merge", "gguf", "quantize/gguf"), makes=("scores.npz",),
    extra="train", tools=(llamacpp.LIBRARY, llamacpp.SERVER, llamacpp.PORTABLE), version=2,
)  # fmt: skip
