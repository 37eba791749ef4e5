"""Measure how far a quantized file strays from the trained model, and check what must be exact. `gate` judges."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from edgeft import llamacpp
from edgeft.stage import Facts, Job, Params, Stage, Where

if TYPE_CHECKING:
    from edgeft.llamacpp.score import Scores
    from edgeft.parity.evidence import Reference


class Verify(Params):
    floor_windows: int = Field(2, ge=0, le=64)
    """Windows on which the kernels' noise is measured for each file; 0: not at all."""


def run(job: Job[Verify]) -> Facts:
    llamacpp.activate()
    llamacpp.ensure("library")
    import numpy as np

    from edgeft.llamacpp.adapter import adapter_beside
    from edgeft.llamacpp.decode import Decoder
    from edgeft.parity import evidence, record
    from edgeft.parity.checks import rendering, weights
    from edgeft.parity.speakers import Gguf
    from edgeft.stage import digest

    p, said, shipped = job.params, job.inputs["reference"], job.inputs["quantize/gguf"]
    file = shipped.path / "model.gguf"
    adapter, native = adapter_beside(file), job.out / "native.f32"
    reference, asked = record.read(said.path)
    longest = max((len(q.prompt_ids) for q in asked), default=0) + said.facts["max_answer_tokens"]
    with Decoder(file, n_ctx=max(said.facts["n_ctx"], longest), adapter=adapter) as decoder:
        speaker = Gguf(decoder)
        # The kernels' noise is told from logits that this pass computes anyway.
        scores = evidence.measure(
            speaker, reference, said.path, floor=(p.floor_windows, native) if p.floor_windows else None
        )
        words = evidence.worst(reference, scores, decoder.detokenize)
        replies = evidence.ask(speaker, [q.prompt_ids for q in asked], said.facts["max_answer_tokens"])
    np.savez(job.out / "scores.npz", **evidence.as_arrays(scores))
    before = {who: [q.replies[who] for q in asked] for who in ("base", "trained")}
    manners = {who: evidence.manners(who, said) for who, said in {**before, "shipped": replies}.items()}
    # What was not quantized from a merged model says for itself what it was made from: see `tune` and `pack`.
    checks = evidence.behaviour(manners["trained"], manners["shipped"])
    if "merge" in job.inputs:
        checks = [*rendering.against_checkpoint(job.inputs["merge"].path / "model", file), *checks]
    if "gguf" in job.inputs:
        checks = [*weights.quantized(job.inputs["gguf"].path / "model.gguf", file), *checks]
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
            asdict(evidence.answer(q.question, q.expected, {"base": b, "trained": t, "shipped": s}))
            for q, b, t, s in zip(asked, before["base"], before["trained"], replies, strict=True)
        ],
        "manners": [asdict(m) for m in manners.values()],
        "floor": _floor(file, adapter, reference, p.floor_windows, native),
        "sha256": digest(file),
        **({"adapter_sha256": digest(adapter)} if adapter else {}),
        **({"over_start": _over(job.inputs["start"].path, reference, scores)} if "start" in job.inputs else {}),
    }  # fmt: skip


def run_start(job: Job[Verify]) -> Facts:
    """The numbers alone, of the file that training through the rounding starts from."""
    llamacpp.activate()
    llamacpp.ensure("library")
    import numpy as np

    from edgeft.llamacpp.decode import Decoder
    from edgeft.parity import evidence, record
    from edgeft.parity.speakers import Gguf

    said = job.inputs["reference"]
    reference, _ = record.read(said.path)
    with Decoder(job.inputs["quantize/gguf"].path / "model.gguf", n_ctx=said.facts["n_ctx"]) as decoder:
        scores = evidence.measure(Gguf(decoder), reference, said.path)
    np.savez(job.out / "scores.npz", **evidence.as_arrays(scores))
    comparisons, kept = reference.compare(scores), reference.retention(scores["domain"])
    domain = comparisons["domain"]
    return {
        "summary": f"before training through the rounding: KLD {domain.kld:.4f}, PPL ratio {domain.ppl_ratio:.4f}",
        "comparisons": {name: c.facts() for name, c in comparisons.items()},
        "retention": kept.facts() if kept else None,
    }


def _over(start: Path, reference: Reference, scores: Mapping[str, Scores]) -> dict[str, dict[str, float]]:
    """What training through the rounding changed, by text: losses of both files and the paired difference's bounds."""
    import numpy as np

    from edgeft.parity import evidence, statistics

    plain, found = evidence.scores_of(dict(np.load(start / "scores.npz"))), {}
    for name, tuned in scores.items():
        counted = reference.texts[name].counted
        moved = statistics.interval(tuned.nll - plain[name].nll, counted)
        found[name] = {
            "start": float(plain[name].nll[counted].mean()), "loss": float(tuned.nll[counted].mean()),
            "change": moved.mean, "low": moved.low, "high": moved.high,
        }  # fmt: skip
    return found


def _floor(
    file: Path, adapter: Path | None, reference: Reference, windows: int, native: Path
) -> dict[str, Any] | None:
    """The noise of this machine's kernels on this file, on the first windows of the domain text. `native` holds this
    machine's own logits of them, and is deleted."""
    from edgeft.llamacpp import kernels

    if not windows:
        return None
    try:
        ids = reference.texts["domain"].ids[:windows]
        return kernels.floor(file, ids, native=native, adapter=adapter).facts()
    finally:
        native.unlink(missing_ok=True)


STAGE = Stage(
    name="verify", params=Verify, run=run, needs=("reference", "quantize/gguf"), takes=("merge", "gguf", "start"),
    makes=("scores.npz",), extra="train", tools=(llamacpp.LIBRARY, llamacpp.SERVER, llamacpp.PORTABLE), version=2,
)  # fmt: skip

START = Stage(
    name="start", table="verify", params=Verify, run=run_start, needs=("reference", "quantize/gguf"), makes=("scores.npz",),
    extra="train", tools=(llamacpp.LIBRARY,), when=Where(table="train", key="method", values=("grid-merged",)),
)  # fmt: skip
"""What the file that `tune` starts from is worth: the other half of the comparison in the report."""
