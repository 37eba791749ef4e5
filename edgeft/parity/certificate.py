"""The certificate: all that was measured and checked between the trained model and the file that ships, as one document.

This module owns the document's shape, which is what `certificate.json` holds. `evidence` makes its parts, `page` draws
it for a browser, and `table` for a terminal.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from edgeft.parity.checks.check import Check, failed
from edgeft.parity.gates import ON_BOARD, Finding, Limits, Verdict
from edgeft.parity.statistics import Comparison, Retention

LLAMA_CPP = "llama.cpp"
"""The runtime of GGUF files; which one exactly, the provenance says."""
SCHEMA = 1
"""Raised when a key of certificate.json changes its meaning or goes away."""


@dataclass(frozen=True, kw_only=True)
class StepCost:
    """One model on the way, measured on the domain text's counted tokens."""

    step: str
    """"base" (before training), "trained", "merged", "gguf", "quantized", "served" (the same file on a board).

    A board's log tells means over all scored tokens, not over the counted ones alone: "served" is the difference on all
    of them, put on top of the numbers of the step before it.
    """
    title: str
    """For people: "merged into the original base"."""
    loss: float
    """Mean negative log-likelihood, nats per token."""
    cost: float | None
    """This loss minus the previous model's: what the step cost; None for the first."""
    cost_low: float | None
    """One-sided 95 % bounds of the cost, from the paired bootstrap."""
    cost_high: float | None
    kld: float | None
    """Mean KL(trained || this), nats; None for "base" and 0 for "trained"."""
    kld_low: float | None
    kld_high: float | None
    kld_added: float | None
    """This kld minus the previous model's, on the same windows."""
    windows: int
    """Of the domain text."""


@dataclass(frozen=True, kw_only=True)
class Bin:
    """Mean KL divergence of the scored tokens at some positions of the window."""

    text: str
    first: int
    last: int
    kld: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Word:
    """A token that the file gets worst, in its context."""

    text: str
    """"domain" or "general"."""
    before: str
    token: str
    after: str
    expected: str
    """What the reference finds most probable there."""
    got: str
    """What the file finds most probable."""
    kld: float
    p_reference: float
    """Probability of the true token under the reference, and under the file."""
    p: float


@dataclass(frozen=True, kw_only=True)
class Answer:
    """The same question to each model, greedy. Shown, never judged by its words."""

    question: str
    expected: str
    replies: dict[str, str]
    """By "base", "trained", "shipped"; a model that was not asked is missing."""
    stopped: dict[str, bool]
    """Whether the answer ended by itself."""


@dataclass(frozen=True, kw_only=True)
class Manners:
    """What a model's answers look like as a whole."""

    model: str
    """"base", "trained", "shipped"."""
    answers: int
    stopped: float
    """Share that ended by themselves."""
    repeats: float
    """Share of an answer's 4-grams of tokens that were there before in it, mean over answers."""
    distinct: float
    """Different tokens over all tokens, mean over answers."""


@dataclass(frozen=True, kw_only=True)
class Served:
    """The same file on one text under a board's kernels, as the log of llama-perplexity tells, beside this machine's.

    All numbers are means over all scored tokens of the text, against the same base file.
    """

    text: str
    """"domain" or "general"."""
    log: str
    """The log's file name."""
    sha256: str
    """Of the log's text."""
    kernels: str
    """The processor features that the board's program was compiled for, in its words; "" when the log does not say."""
    windows: int
    tokens: int
    kld: float
    """KL(reference || file on the board), nats; as printed, with six decimals."""
    kld_error: float
    """The log's own standard error of it."""
    kld_here: float
    """The same file, text and base file under this machine's kernels."""
    moved: float
    """kld - kld_here."""
    moved_low: float
    """One-sided 95 % bounds of it, paired by window."""
    moved_high: float
    limit: float | None
    """What `moved` may be, either way; None when no noise could be measured here that it could be held against."""
    limit_from: str
    """Where the limit comes from, for people."""
    cost: float
    """Loss on the board minus loss here, nats per token. Not judged."""
    cost_low: float
    cost_high: float
    same_top: float
    same_top_here: float


@dataclass(frozen=True, kw_only=True)
class File:
    """One shipped file and its verdict."""

    name: str
    """Its variant, "q4_k_m", or its file name."""
    title: str
    """For people: "Q4_K_M"."""
    sha256: str
    bytes: int
    bits_per_weight: float
    types: dict[str, int]
    """Tensors by ggml type, as they really are in the file."""
    memory_mb: float | None
    """Predicted on the target; None without one."""
    verdict: Verdict
    because: list[str]
    """Sentences, the most important first."""
    culprit: str
    """The step that is at fault, or that lost most; "" when nothing is wrong."""
    more_windows: int | None
    """UNDECIDED: how many more windows would decide."""
    tier: str
    """The strictest tier that it surely reaches, or ""."""
    limits: Limits
    domain: Comparison
    general: Comparison | None
    retention: Retention | None
    findings: list[Finding]
    checks: list[Check]
    steps: list[StepCost]
    bins: list[Bin]
    worst: list[Word]
    answers: list[Answer]
    manners: list[Manners]
    floor: dict[str, Any] | None
    """The noise floor of this file's kernels, as `llamacpp.kernels.Floor.facts()`; None when not measured."""
    notes: list[str] = field(default_factory=list)
    """What could not be measured here, and other things worth knowing; one sentence each."""
    runtime: str = LLAMA_CPP
    """Who gave its logits and answers: what serves it, with its version and device."""
    served: list[Served] = field(default_factory=list)
    """What boards' logs say of it, one for each text; empty when none was given."""


@dataclass(frozen=True, kw_only=True)
class Certificate:
    """The whole document."""

    name: str
    """The recipe's name, or the reference's."""
    verdict: Verdict
    """FAIL if any file failed, else UNDECIDED if any is, else PASS."""
    made: str
    """UTC, ISO 8601."""
    edgeft: str
    command: str
    """The command that makes it again."""
    machine: str
    reference: str
    """What everything was compared with: "SmolLM2-135M-Instruct in NF4 with the adapter attached"."""
    target: dict[str, Any]
    """`name` and `memory_mb` (what it leaves for a model); empty without a target."""
    texts: list[dict[str, Any]]
    """`Text.facts()` of each."""
    files: list[File]
    merges: dict[str, Any]
    """The merges that were tried and which one was taken; empty when there was no choice."""
    provenance: dict[str, str]
    """What, by which version or hash: base, data, adapter, llama.cpp, torch …"""
    schema: int = SCHEMA

    def as_json(self) -> dict[str, Any]:
        """The document as plain data. A file without `runtime` is llama.cpp's: its part is as it always was."""
        document = asdict(self)
        for file in document["files"]:
            if file["runtime"] == LLAMA_CPP:
                del file["runtime"]
        return document


def overall(files: Sequence[File]) -> Verdict:
    """The verdict over several files."""
    said = {f.verdict for f in files}
    return "FAIL" if "FAIL" in said else "UNDECIDED" if "UNDECIDED" in said or not said else "PASS"


def load(document: dict[str, Any]) -> Certificate:
    """The certificate that `as_json` wrote. Raises ValueError for another schema."""
    if document.get("schema") != SCHEMA:
        raise ValueError(f"this certificate has schema {document.get('schema')}, not {SCHEMA}")
    return Certificate(**{**document, "files": [_file(f) for f in document["files"]]})


def _file(d: dict[str, Any]) -> File:
    return File(**{
        **d, "limits": Limits(**d["limits"]), "domain": Comparison.of(d["domain"]),
        "general": Comparison.of(d["general"]) if d["general"] else None,
        "retention": Retention.of(d["retention"]) if d["retention"] else None,
        "findings": [Finding(**x) for x in d["findings"]], "checks": [Check.of(x) for x in d["checks"]],
        "steps": [StepCost(**x) for x in d["steps"]], "bins": [Bin(**x) for x in d["bins"]],
        "worst": [Word(**x) for x in d["worst"]], "answers": [Answer(**x) for x in d["answers"]],
        "manners": [Manners(**x) for x in d["manners"]],
        # Documents of schema 1 from before boards' logs were read have no such key.
        "served": [Served(**x) for x in d.get("served", ())],
    })  # fmt: skip


def culprit(checks: Sequence[Check], findings: Sequence[Finding], steps: Sequence[StepCost]) -> str:
    """The step at fault: that of the first failed check, else the one that added most KL divergence.

    "served" when nothing but the difference between board and this machine is beyond its limit. Empty when nothing failed
    and nothing is undecided.
    """
    if wrong := failed(checks):
        return wrong[0].step
    bad = [f for f in findings if f.verdict == "FAIL"] or [f for f in findings if f.verdict == "UNDECIDED"]
    if not bad:
        return ""
    if all(f.metric == ON_BOARD for f in bad):
        return "served"
    added = {s.step: s.kld_added for s in steps if s.kld_added is not None and s.step != "served"}
    return max(added, key=lambda step: added[step]) if added else ""
