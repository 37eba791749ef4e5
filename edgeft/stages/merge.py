"""Fold the adapter into the base's 16-bit weights."""

from __future__ import annotations

from dataclasses import asdict
from typing import Literal

from edgeft import estimates
from edgeft.stage import Facts, Job, Params, Stage


class Merge(Params):
    dtype: Literal["auto", "float16", "bfloat16"] = "auto"
    """Of the merged weights; auto: the base's own, and float16 for a float32 base that fits into it."""


def run(job: Job[Merge]) -> Facts:
    from edgeft import merging

    base, adapter = job.inputs["base"].path / "model", job.inputs["train"].path / "adapter"
    merged = merging.merge(base, adapter, job.out / "model", dtype=job.params.dtype)
    return {
        "summary": f"{merged.adapted} weights changed, {merged.untouched} as in the base, {merged.dtype}",
        **asdict(merged),
        "changed": merged.adapted,
    }


STAGE = Stage(
    name="merge",
    params=Merge,
    run=run,
    needs=("base", "train"),
    makes=("model/config.json",),
    extra="train",
    estimate=estimates.merge,
)
