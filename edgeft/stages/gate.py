"""Refuse a file whose measured drift is over the recipe's limit, or of which it cannot be told yet."""

from __future__ import annotations

import json
from typing import Literal

from pydantic import Field

from edgeft.errors import EdgeftError, ParityError, UndecidedError
from edgeft.parity.certificate import File
from edgeft.parity.gates import Limits
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
    min_retention: float | None = Field(None, ge=-10, le=2)
    """Share of what training gained on held-out answers that the file must keep."""

    def limits(self) -> Limits:
        """The same, as the parity package takes them."""
        return Limits.of(**self.model_dump())


def run(job: Job[Gate]) -> Facts:
    from edgeft.parity import collected

    file = collected.file(job.inputs, job.params.limits())
    if file.verdict != "PASS":
        raise refusal(file)
    # Without a date: the same build gives the same bytes. The exporter adds the target.
    found = collected.certificate(
        [file], job.inputs, name=file.title, command="edgeft build", target={}, when="", versions={},
        keys={name: a.key for name, a in sorted(job.inputs.items())},
    )  # fmt: skip
    text = json.dumps(found.as_json(), indent=1, ensure_ascii=False) + "\n"
    (job.out / "certificate.json").write_text(text, encoding="utf-8")
    reached = f"; reaches tier {file.tier}" if file.tier not in ("", job.params.tier) else ""
    return {
        "summary": f"PASS: every 95 % bound is within the limits ({file.limits.said}){reached}",
        "verdict": file.verdict, "tier": file.tier, "limits": file.limits.facts(),
    }  # fmt: skip


def refusal(file: File) -> EdgeftError:
    """The error that says why a file did not pass."""
    why = "; ".join(file.because)
    if file.verdict == "UNDECIDED":
        more = file.more_windows
        return UndecidedError(
            f"{file.title} is UNDECIDED: {why}",
            hint=f"about {more} more windows would decide: [reference] windows, and rows held out for them: [data] holdout"
            if more
            else "the number is as close to its limit as can be measured: choose another limit in [gate], or more bits",
        )
    at_fault = f" The step at fault is {file.culprit!r}." if file.culprit else ""
    return ParityError(f"{file.title} FAILED: {why}.{at_fault}", hint=_way_out(file))


def _way_out(file: File) -> str:
    """What to do about a file that failed."""
    if any(c.ok is False for c in file.checks):
        return "nothing was shipped: see the certificate"
    accept = f", or accept it knowingly: [gate] tier = {file.tier!r}" if file.tier else ""
    if file.culprit == "merged":
        return f'[merge] base = "dequantized" ships the model that was trained, or train with method = "lora"{accept}'
    return f"quantize with more bits{accept}"


STAGE = Stage(
    name="gate", params=Gate, run=run, needs=("reference", "quantize/gguf", "verify"), takes=("merge", "gguf"),
    extra="train", makes=("certificate.json",), version=2,
)  # fmt: skip

SERVED = Stage(
    name="gate", kind="served", table="gate", params=Gate, run=run,
    needs=("reference", "quantize/served", "verify/served", "merge"), extra="train", makes=("certificate.json",),
)  # fmt: skip
"""The same of a folder that another runtime serves."""
