"""From measurements to the parts of a certificate: what each step cost, where it drifts, and the verdict on one file."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeft import progress
from edgeft.llamacpp import kernels, score
from edgeft.llamacpp.score import Scores
from edgeft.parity import gates, statistics
from edgeft.parity.certificate import Answer, Bin, File, Manners, StepCost, Word, culprit
from edgeft.parity.checks.check import Check, failed
from edgeft.parity.gates import Finding, Limits, Verdict
from edgeft.parity.speakers import Reply, Speaker
from edgeft.parity.suite import Text

if TYPE_CHECKING:
    from edgeft.parity.statistics import Array

Detokenize = Callable[[Sequence[int]], str]


@dataclass(frozen=True, kw_only=True)
class Reference:
    """What the reference says on every text; negative log-likelihoods in nats, [windows, scored]."""

    texts: Mapping[str, Text]
    """By name: "domain", and "general" if it was measured."""
    nll: Mapping[str, Array]
    """Of the reference, exact."""
    base: Array | None
    """Of the model before training, on the domain text; None when it is not known."""

    def arrays(self) -> dict[str, Any]:
        """For `numpy.savez`."""
        out: dict[str, Any] = {} if self.base is None else {"base": self.base}
        for name, text in self.texts.items():
            out |= {f"{name}_{key}": value for key, value in text.arrays().items()}
            out[f"{name}_nll"] = self.nll[name]
        return out

    @classmethod
    def of(cls, arrays: Any) -> Reference:
        """What `arrays` wrote, from an opened .npz file or a dict."""
        names = [n for n in ("domain", "general") if f"{n}_ids" in arrays]
        texts = {n: Text.of(n, {k: arrays[f"{n}_{k}"] for k in ("ids", "counted")}) for n in names}
        return cls(
            texts=texts, nll={n: arrays[f"{n}_nll"] for n in names}, base=arrays.get("base"),
        )  # fmt: skip

    def compare(self, scores: Mapping[str, Scores]) -> dict[str, statistics.Comparison]:
        """The summary of each text's scores, against the exact losses of the reference."""
        return {
            name: statistics.compare(s, self.texts[name].counted, nll_reference=self.nll[name])
            for name, s in scores.items()
        }

    def retention(self, domain: Scores) -> statistics.Retention | None:
        """How much of the gain is kept, or None when the model before training is not known."""
        if self.base is None:
            return None
        return statistics.retention(self.base, self.nll["domain"], domain.nll, self.texts["domain"].counted)


def measure(
    speaker: Speaker, reference: Reference, folder: Path, texts: Sequence[str] = ("domain", "general"),
    *, floor: tuple[int, Path] | None = None,
) -> dict[str, Scores]:  # fmt: skip
    """Score a model against the reference's base files `folder/<text>.kld`, for each of `texts` that it has.

    With `floor`, a number of windows and a file, the logits of the first windows go into that file for `kernels.floor`.
    """
    logits = kernels.remembered(speaker.logits, *floor) if floor else speaker.logits
    return {
        name: score.compare(folder / f"{name}.kld", logits, doing=f"score the {name} text")
        for name in texts
        if name in reference.texts
    }


def as_arrays(scores: Mapping[str, Scores]) -> dict[str, Any]:
    """Scores by text, for `numpy.savez`."""
    return {key: value for name, s in scores.items() for key, value in s.arrays(f"{name}_").items()}


def scores_of(arrays: Any) -> dict[str, Scores]:
    """What `as_arrays` wrote, from a dict."""
    return {name: Scores.of(arrays, f"{name}_") for name in ("domain", "general") if f"{name}_kld" in arrays}


def ask(speaker: Speaker, prompts: Sequence[Sequence[int]], max_tokens: int) -> list[Reply]:
    """The greedy answer to each rendered prompt."""
    replies = []
    for number, prompt in enumerate(prompts):
        progress.report("answer questions", number, len(prompts))
        replies.append(speaker.answer(prompt, max_tokens))
    return replies


def step_costs(
    reference: Reference, chain: Sequence[tuple[str, str, Scores]], *, trained: str
) -> list[StepCost]:
    """What each model on the way cost. `chain` holds step, title and domain scores, in order.

    A model that was measured on fewer windows is paired with its predecessor on those. `trained` is the reference's
    title.
    """
    counted = reference.texts["domain"].counted
    costs = []
    before: tuple[Array, Any] | None = None
    known: list[tuple[str, str, Array, Any]] = [
        *([("base", "before training", reference.base, None)] if reference.base is not None else []),
        ("trained", trained, reference.nll["domain"], reference.nll["domain"] * 0),
        *((step, title, s.nll, s.kld) for step, title, s in chain),
    ]
    for step, title, nll, kld in known:
        n = len(nll)
        mask = counted[:n]
        difference = added = None
        if before is not None:
            m = min(n, len(before[0]))
            difference = statistics.interval(nll[:m] - before[0][:m], counted[:m])
            if kld is not None and before[1] is not None:
                added = float((kld[:m] - before[1][:m])[counted[:m]].mean())
        divergence = None if kld is None else statistics.interval(kld, mask)
        costs.append(StepCost(
            step=step, title=title, loss=float(nll[mask].mean()), windows=n, kld_added=added,
            cost=difference.mean if difference else None, cost_low=difference.low if difference else None,
            cost_high=difference.high if difference else None, kld=divergence.mean if divergence else None,
            kld_low=divergence.low if divergence else None, kld_high=divergence.high if divergence else None,
        ))  # fmt: skip
        before = (nll, kld)
    return costs


def bins(reference: Reference, scores: Mapping[str, Scores], count: int = 8) -> list[Bin]:
    """KL divergence by position in the window, in `count` bins of the scored half, counted tokens only."""
    found = []
    for name, s in scores.items():
        text = reference.texts[name]
        width = s.kld.shape[1]
        first = score.first_scored(text.n_ctx) + 1
        edges = [round(i * width / count) for i in range(count + 1)]
        for a, b in pairwise(edges):
            if a < b and text.counted[:, a:b].any():
                i = statistics.interval(s.kld[:, a:b], text.counted[:, a:b])
                found.append(
                    Bin(text=name, first=first + a, last=first + b - 1, kld=i.mean, low=i.low, high=i.high)
                )
    return found


def worst(
    reference: Reference, scores: Mapping[str, Scores], spell: Detokenize, most: int = 10
) -> list[Word]:
    """The counted tokens with the largest KL divergence, in context; at most `most` over all texts."""
    import numpy as np

    candidates = []
    for name, s in scores.items():
        kld = np.where(reference.texts[name].counted, s.kld, -1.0)
        for at in np.argsort(kld, axis=None)[::-1][:most]:
            w, t = np.unravel_index(at, kld.shape)
            if kld[w, t] >= 0:
                candidates.append((float(kld[w, t]), name, int(w), int(t)))
    words = []
    for kld_of, name, w, t in sorted(candidates, reverse=True)[:most]:
        s, text = scores[name], reference.texts[name]
        ids, at = text.ids[w], score.first_scored(text.n_ctx) + 1 + t
        words.append(Word(
            text=name, before=spell(ids[max(0, at - 24) : at]), token=spell([ids[at]]), after=spell(ids[at + 1 : at + 7]),
            expected=spell([int(s.top_base[w, t])]), got=spell([int(s.top[w, t])]), kld=kld_of,
            p_reference=float(np.exp(-reference.nll[name][w, t])), p=float(np.exp(-s.nll[w, t])),
        ))  # fmt: skip
    return words


def manners(model: str, replies: Sequence[Reply]) -> Manners:
    """How a model's answers look as a whole (C-22, C-36): do they stop, do they repeat themselves.

    Each answer counts once, however long: a single one that runs on in a loop would otherwise drown the others.
    """
    repeated, distinct = [], []
    for reply in replies:
        grams = [tuple(reply.ids[i : i + 4]) for i in range(len(reply.ids) - 3)]
        repeated.append(1 - len(set(grams)) / len(grams) if grams else 0.0)
        if reply.ids:
            distinct.append(len(set(reply.ids)) / len(reply.ids))
    return Manners(
        model=model, answers=len(replies), stopped=sum(r.stopped for r in replies) / max(1, len(replies)),
        repeats=sum(repeated) / max(1, len(repeated)), distinct=sum(distinct) / len(distinct) if distinct else 0.0,
    )  # fmt: skip


def behaviour(trained: Manners, shipped: Manners) -> list[Check]:
    """Whether the file's answers stop and vary as the reference's do. Loose: a few answers say little."""
    if not trained.answers or trained.answers != shipped.answers:
        return []
    lost = round((trained.stopped - shipped.stopped) * trained.answers)
    stops = Check(
        step="quantized", name="answers stop", codes=("C-21", "C-22"), ok=shipped.stopped >= trained.stopped / 2,
        said=f"{shipped.stopped:.0%} of {shipped.answers} answers end by themselves, {trained.stopped:.0%} of the reference's"
        + (f": {lost} run on" if lost > 0 else ""),
    )  # fmt: skip
    varies = Check(
        step="quantized", name="answers vary", codes=("C-36",), ok=shipped.repeats <= trained.repeats + 0.3,
        said=f"{shipped.repeats:.0%} of an answer's 4-grams repeat an earlier one, {trained.repeats:.0%} in the reference's answers",
    )  # fmt: skip
    return [stops, varies]


def answer(question: str, expected: str, replies: Mapping[str, Reply]) -> Answer:
    """One question's answers side by side; `replies` by "base", "trained", "shipped"."""
    return Answer(
        question=question, expected=expected, replies={k: r.text for k, r in replies.items()},
        stopped={k: r.stopped for k, r in replies.items()},
    )  # fmt: skip


def judged(
    file: File, comparisons: Mapping[str, statistics.Comparison], retention: statistics.Retention | None, limits: Limits
) -> File:  # fmt: skip
    """`file` with findings, verdict, reasons and the step at fault, from its checks, its steps and what boards said."""
    boards = [
        gates.on_board(s.text, s.moved, s.moved_low, s.moved_high, s.limit, s.windows, of=s.limit_from)
        for s in file.served
    ]
    findings = [*gates.judge(comparisons, retention, limits), *boards]
    verdict = gates.verdict(findings, file.checks)
    file = replace(file, limits=limits)
    return replace(
        file, findings=findings, verdict=verdict, because=_because(verdict, findings, file),
        culprit=culprit(file.checks, findings, file.steps),
        tier=gates.best_tier(comparisons, retention) if gates.verdict(boards) == "PASS" else "",
        more_windows=_more(verdict, findings),
    )  # fmt: skip


def _because(verdict: Verdict, findings: Sequence[Finding], file: File) -> list[str]:
    wrong = [f"{c.step}: {c.said}" for c in failed(file.checks)]
    over = [f.said for f in findings if f.verdict == "FAIL"]
    open_ = [f.said for f in findings if f.verdict == "UNDECIDED"]
    if verdict == "PASS":
        unasked = sum(c.ok is None for c in file.checks)
        return [
            f"every bound is within the limits ({file.limits.said}), and of {len(file.checks)} checks none found a fault"
            + (f" ({unasked} could not be asked)" if unasked else "")
        ]
    return [*wrong, *over, *open_]


def _more(verdict: Verdict, findings: Sequence[Finding]) -> int | None:
    """How many windows would decide everything that is open; None when something cannot be decided."""
    wanted = [f.more for f in findings if f.verdict == "UNDECIDED"]
    if verdict != "UNDECIDED" or any(n is None for n in wanted):
        return None
    return max(n for n in wanted if n is not None)
