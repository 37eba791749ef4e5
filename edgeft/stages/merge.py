"""Fold the adapter into 16-bit weights: the original base's, or those that QLoRA trained on, whichever is better."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from edgeft import estimates
from edgeft.errors import ParityError, RecipeError
from edgeft.merging.choice import Candidate, choose
from edgeft.stage import Artifact, Facts, Job, Params, Stage, Step, Where

if TYPE_CHECKING:
    from edgeft.llamacpp.score import Scores
    from edgeft.parity.checks.check import Check
    from edgeft.parity.evidence import Reference


class Merge(Params):
    base: Literal["auto", "original", "dequantized"] = "auto"
    """Which weights get the adapter: the base's own, or what NF4 made of them, which is what QLoRA trained on. auto: for
    QLoRA both are merged and measured against the trained model. The base's own weights are taken where the merge still is
    the trained model (KL divergence within the tier `parity`) and clearly loses less on held-out answers, or is nearer."""
    dtype: Literal["auto", "float16", "bfloat16"] = "auto"
    """Of the merged weights; auto: the base's own, and float16 for a float32 base that fits into it."""


def run(job: Job[Merge]) -> Facts:
    import numpy as np

    from edgeft import merging
    from edgeft.merging import dequantized
    from edgeft.parity import evidence

    base, train, said = job.inputs["base"].path / "model", job.inputs["train"], job.inputs["reference"].path
    qlora, adapter = train.facts["method"] == "qlora", train.path / "adapter"
    compute = train.facts["compute_dtype"]
    reference = evidence.Reference.of(dict(np.load(said / "reference.npz")))
    aside, bases, lost = job.out / "aside", {"original": base}, None
    if qlora and job.params.base != "original":
        bases["dequantized"] = aside / "base"
        lost = dequantized.write(base, bases["dequantized"], compute_dtype=compute, dtype=job.params.dtype)
    elif qlora:
        lost = dequantized.losses(base, train.facts["adapted"], compute_dtype=compute)
    if job.params.base == "dequantized":
        del bases["original"]
    merged, scores = {}, {}
    for name, folder in bases.items():
        merged[name] = merging.merge(folder, adapter, aside / name, dtype=job.params.dtype)
        scores[name] = _measure(aside / name, compute, reference, said)
    candidates = {name: _candidate(reference, found) for name, found in scores.items()}
    taken, reason = _choose(reference, scores, candidates)
    checks = _checked(bases[taken], adapter, aside / taken)
    np.savez(job.out / "scores.npz", **evidence.as_arrays({"domain": scores[taken]}))
    (aside / taken).rename(job.out / "model")
    shutil.rmtree(aside)
    what = merged[taken]
    return {
        "summary": f"{what.adapted} weights changed, {what.untouched} as in the base, {what.dtype}; "
        + _sentence(taken, reason, candidates),
        **asdict(what),
        "changed": what.adapted,
        "merge_base": taken,
        "merge_reason": reason,
        "candidates": {name: asdict(c) for name, c in candidates.items()},
        "nf4_noise": asdict(dequantized.noise(lost, adapter)) if lost is not None else None,
        "checks": [c.facts() for c in checks],
    }


def check(step: Step, done: Mapping[str, Artifact]) -> None:
    """Only QLoRA has a quantized base: refuse to dequantize one that there will not be."""
    assert isinstance(step.params, Merge)
    train = step.find("train")
    method = getattr(train.params, "method", "") if train else ""
    if step.params.base == "dequantized" and method in ("lora", "grid-merged"):
        raise RecipeError(
            f'merge.base is "dequantized", but train.method is "{method}", which trains on the original weights',
            hint='leave merge.base at "auto"',
        )


def _measure(folder: Path, compute_dtype: str, reference: Reference, said: Path) -> Scores:
    """The merged model's scores on the held-out windows, against what the trained model said there.

    In float32 where it is small enough: so the file's own weights are measured, and not what a 16-bit product makes of
    them.
    """
    import gc

    import torch
    from transformers import AutoTokenizer

    from edgeft import training
    from edgeft.parity import evidence
    from edgeft.parity.checks.exact import FLOAT32_BELOW
    from edgeft.parity.speakers import Torch

    exact = sum(f.stat().st_size for f in folder.glob("*.safetensors")) / 2 < FLOAT32_BELOW
    model: Any = training.load_base(
        folder, method="lora", compute_dtype="float32" if exact or compute_dtype == "float32" else "bfloat16"
    )
    speaker = Torch(model, AutoTokenizer.from_pretrained(folder))
    scores = evidence.measure(speaker, reference, said, texts=("domain",))["domain"]
    del model, speaker
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return scores


def _candidate(reference: Reference, scores: Scores) -> Candidate:
    found = reference.compare({"domain": scores})["domain"]
    return Candidate(
        loss=float(scores.nll[reference.texts["domain"].counted].mean()),
        kld=found.kld, kld_bound=found.kld_bound, ppl_ratio=found.ppl_ratio,
    )  # fmt: skip


def _choose(
    reference: Reference, scores: Mapping[str, Scores], candidates: Mapping[str, Candidate]
) -> tuple[str, str]:
    """The name of the base to take, and why; no reason where there was no choice."""
    from edgeft.parity import statistics
    from edgeft.parity.gates import TIERS

    if len(candidates) == 1:
        return next(iter(candidates)), ""
    gap = statistics.interval(
        scores["original"].nll - scores["dequantized"].nll, reference.texts["domain"].counted
    )
    choice = choose(
        candidates["original"], candidates["dequantized"], gap_low=gap.low, gap_high=gap.high,
        max_kld=TIERS["parity"]["max_kld"],
    )  # fmt: skip
    return choice.base, choice.reason


def _checked(base: Path, adapter: Path, merged: Path) -> list[Check]:
    """The weights looked at by other code than wrote them. Raises ParityError with what is wrong."""
    from edgeft.parity.checks import weights
    from edgeft.parity.checks.check import failed

    checks: list[Check] = weights.merged(base, adapter, merged)
    if wrong := failed(checks):
        raise ParityError("the merge is wrong: " + "; ".join(c.said for c in wrong))
    return checks


def _sentence(taken: str, reason: str, candidates: Mapping[str, Candidate]) -> str:
    numbers = {name: f"held-out loss {c.loss:.4f}, KLD {c.kld:.2g}" for name, c in candidates.items()}
    text = f"into the {taken} base: {numbers.pop(taken)}"
    for name, other in numbers.items():
        text += f" ({name}: {other}); {reason}"
    return text


STAGE = Stage(
    name="merge",
    params=Merge,
    run=run,
    needs=("base", "train", "reference"),
    makes=("model/config.json", "scores.npz"),
    extra="train",
    check=check,
    estimate=estimates.merge,
    when=Where(table="train", key="method", values=("qlora", "lora", "grid-merged")),
    version=3,
)
