"""Refuse a file whose measured drift is over the recipe's limit."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from edgeft.errors import ParityError
from edgeft.parity.gates import Limits, best_tier, violations
from edgeft.parity.statistics import Comparison
from edgeft.stage import Facts, Job, Params, Stage


class Gate(Params):
    tier: Literal["near-lossless", "parity", "degraded"] = "parity"
    """Limits that 95 % bounds must respect; each number below replaces the tier's own."""
    max_kld: float | None = Field(None, gt=0)
    """Mean KL divergence to the trained model, nats per token."""
    max_ppl_ratio: float | None = Field(None, gt=0)
    """Perplexity of the file over perplexity of the trained model."""
    min_same_top: float | None = Field(None, ge=0, le=1)
    """Share of tokens with the same most probable next token."""


def run(job: Job[Gate]) -> Facts:
    p, facts = job.params, job.inputs["verify"].facts
    found = Comparison(**{name: facts[name] for name in Comparison.__dataclass_fields__})
    limits = Limits.of(p.tier, p.max_kld, p.max_ppl_ratio, p.min_same_top)
    if broken := violations(found, limits):
        tier = best_tier(found)
        raise ParityError(
            "the file strayed too far from the trained model: " + "; ".join(broken),
            hint="quantize with more bits"
            + (f", or accept it knowingly: [gate] tier = {tier!r}" if tier else ""),
        )
    tier = best_tier(found)
    return {"summary": f"within the limits ({p.tier})" + (f"; reaches tier {tier}" if tier else ""), "tier": tier,
            "limits": {name: getattr(limits, name) for name in limits.__dataclass_fields__}}  # fmt: skip


STAGE = Stage(name="gate", params=Gate, run=run, needs=("verify",))
