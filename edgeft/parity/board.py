"""The last step of the chain: the shipped file under a board's own kernels, from the log of its llama-perplexity.

The board scores the file against the reference's base file, which --keep-base or a build leaves; its log is held beside
this machine's numbers for the same file, text and base file. The log must be of that base file: its windows and the
base file's loss, which it prints after every window and which no kernel can move, must be ours.

What is gated is how far the KL divergence to the reference moved, board minus here. It is the one difference that the
log allows to be paired: its table gives the mean over the first windows, so each window's own mean follows, and the
bounds come from resampled windows as everywhere else. The log's own error takes tokens for independent and its
percentiles cannot be paired at all.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeft.errors import DataError
from edgeft.llamacpp import stock
from edgeft.llamacpp.score import Scores
from edgeft.llamacpp.stock import StockResult
from edgeft.parity import evidence, statistics
from edgeft.parity.certificate import File, Served, StepCost
from edgeft.parity.checks.check import Check
from edgeft.parity.evidence import Reference
from edgeft.parity.gates import ROOM

if TYPE_CHECKING:
    from edgeft.parity.collected import Made
    from edgeft.parity.statistics import Array

PLAIN = {"F32", "F16", "BF16"}
DIGITS = 1e-4
"""No limit is smaller: the table's five decimals give a window's mean to no better than this. Reached by files without
quantized weights, whose floor is about 0."""
HALF_SUMS_LIMIT = 1e-3
"""For a file without quantized weights where F16 products are summed in half precision (FP16_VA, ARM): a right build moved by 2e-4."""
SAME_LOSS = 1e-4
"""How far two base files' mean losses may differ and still be the same one, made again: a reference that is computed
with another number of threads moves by 1e-6, another model or text by 1e-2."""


@dataclass(frozen=True, kw_only=True)
class Log:
    """What a board's llama-perplexity printed."""

    name: str
    text: str


def read(path: Path) -> Log:
    """A log from a file. Raises DataError when it cannot be read or is no whole log of llama-perplexity."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as e:
        raise DataError(f"the log {path} cannot be read: {e.strerror}") from None
    stock.parse(text)
    return Log(name=path.name, text=text)


def held(
    file: File, reference: Reference, scores: Mapping[str, Scores], logs: Sequence[Log],
    floor_of: Callable[[str], dict[str, Any] | None] | None = None,
) -> File:  # fmt: skip
    """`file` with the step "served" from the boards' logs, judged again. Does nothing without logs.

    `scores` are this machine's, by text; `floor_of` gives a text's noise floor (`llamacpp.kernels.Floor.facts()`), without it
    the file's own is taken. Raises DataError for a log that holds no statistics, that is of another base file or of other
    windows, for two logs of one text, and when no noise floor was measured.
    """
    if not logs:
        return file
    served: dict[str, Served] = {}
    checks = []
    for log in logs:
        found = stock.parse(log.text)
        name = _text_of(log, found, reference, scores)
        if name in served:
            raise DataError(
                f"{served[name].log} and {log.name} are both of the {name} text", hint="one a text"
            )
        floor = floor_of(name) if floor_of else file.floor
        served[name] = _served(name, log, found, scores[name], floor, set(file.types))
        checks.append(_same_file(log, found, file))
    ordered = [served[name] for name in scores if name in served]
    file = replace(
        file, served=ordered, checks=[*file.checks, *checks], steps=[*file.steps, *_step(file.steps, served)],
        notes=[*file.notes, *_notes(file, ordered)],
    )  # fmt: skip
    comparisons = {"domain": file.domain} | ({"general": file.general} if file.general else {})
    return evidence.judged(file, comparisons, file.retention, file.limits)


def held_in_build(
    file: File, made: Mapping[str, Made], logs: Sequence[Log], *, windows: Mapping[str, int] | None = None
) -> File:
    """The same for a file of a build: `file` and `made` are what `collected.file` gave and took.

    The boards score against `domain.kld` and `general.kld` of the step "reference", or against base files cut to the
    first `windows` of them, by text; then this machine's numbers for the same windows are what they are held against.
    """
    import numpy as np

    reference = Reference.of(dict(np.load(made["reference"].path / "reference.npz")))
    scores = evidence.scores_of(dict(np.load(made["verify"].path / "scores.npz")))
    for name, count in (windows or {}).items():
        if name in scores and count < len(scores[name].kld):
            file = replace(file, notes=[*file.notes, _fewer(name, count, len(scores[name].kld))])
            scores[name] = scores[name].first(count)
    return held(file, reference, scores, logs)


def _fewer(name: str, count: int, of: int) -> str:
    return f"the board scored the first {count} of {of} windows of the {name} text; it is held against the same here"


def allowed(floor: float | None, types: set[str], kernels: str) -> tuple[float | None, str]:
    """How far the KL divergence may move on kernels that call themselves `kernels`, and why, for people.

    `floor` is the largest mean KLD between two kinds of kernels here, `types` the file's tensor types. None: nothing can
    be told. See docs/device-kernels.md.
    """
    twice = ROOM * (floor or 0.0)
    if types <= PLAIN:
        if re.search(r"\bFP16_VA = 1\b", kernels) and twice < HALF_SUMS_LIMIT:
            return HALF_SUMS_LIMIT, "room for half-precision sums at 16 or 32 bits"
    elif not floor:
        said = "all kernels of this machine agree bit for bit on this file, which says nothing of others"
        return None, said
    if twice < DIGITS:
        return DIGITS, "the least that a log's digits can show"
    return twice, f"{ROOM:g} times the {twice / ROOM:.1e} between two kinds of kernels here"


def _text_of(log: Log, found: StockResult, reference: Reference, scores: Mapping[str, Scores]) -> str:
    """Which text's base file the log is of. Raises DataError when of none, or when its table is not whole."""
    if found.windows not in (None, len(found.running)) or not found.running:
        raise DataError(
            f"{log.name} is cut off: its table has {len(found.running)} of {found.windows or 'its'} windows"
        )
    for name, s in scores.items():
        n_ctx = reference.texts[name].n_ctx
        if len(s.kld) == len(found.running) and found.n_ctx in (None, n_ctx) and _same_losses(found, s):
            return name
    given = f"{len(found.running)} windows{f' of {found.n_ctx}' if found.n_ctx else ''}, base perplexity {found.ppl_base:.4f}"
    ours = ", ".join(
        f"{len(s.kld)} of {reference.texts[name].n_ctx}, {math.exp(s.nll_base.mean()):.4f} ({name} text)"
        for name, s in scores.items()
    )
    raise DataError(
        f"{log.name} is of another base file: {given}; here {ours}",
        hint="let the board score the domain.kld and general.kld that --keep-base leaves, and certify with the same models, texts, "
        "windows and seed again",
    )


def _same_losses(found: StockResult, scores: Scores) -> bool:
    """Whether the base file's mean loss after every window is ours. It comes from the file alone, not from kernels."""
    ours = _running_means(scores.nll_base)
    return all(
        abs(math.log(line.ppl) - line.log_ratio - loss) <= SAME_LOSS + 1e-4 / line.ppl  # the table's digits
        for line, loss in zip(found.running, ours, strict=True)
    )


def _served(
    name: str, log: Log, found: StockResult, scores: Scores, floor: dict[str, Any] | None, types: set[str]
) -> Served:
    if floor is None:
        raise DataError(
            f"{log.name} cannot be judged: the noise of this machine's kernels on the file was not measured",
            hint="--floor-windows 2",
        )
    limit, why = allowed(float(floor["largest"]), types, found.kernels)
    moved = _paired([line.kld for line in found.running], found.kld, scores.kld)
    cost = _paired([line.log_ratio for line in found.running], found.log_ratio, scores.nll - scores.nll_base)
    return Served(
        text=name, log=log.name, sha256=hashlib.sha256(log.text.encode()).hexdigest(), kernels=found.kernels,
        windows=len(scores.kld), tokens=int(scores.kld.size), kld=found.kld, kld_error=found.kld_error,
        kld_here=float(scores.kld.mean()), moved=moved.mean, moved_low=moved.low, moved_high=moved.high, limit=limit,
        limit_from=why, cost=cost.mean, cost_low=cost.low, cost_high=cost.high, same_top=found.same_top,
        same_top_here=float(scores.same_top.mean()),
    )  # fmt: skip


def _paired(running: Sequence[float], whole: float, here: Array) -> statistics.Interval:
    """Board minus here, by window: `running` are the board's means over the first windows, `whole` that over all, which
    has more digits; `here` is [windows, scored]."""
    import numpy as np

    sums = np.asarray(running) * np.arange(1, len(running) + 1)
    difference = np.diff(sums, prepend=0.0) - here.mean(axis=1)
    difference += whole - here.mean() - difference.mean()
    return statistics.interval(difference[:, None], np.ones((len(difference), 1), bool))


def _running_means(values: Array) -> list[float]:
    """Means over the first 1, 2, ... windows of [windows, scored]."""
    import numpy as np

    means: list[float] = (values.mean(axis=1).cumsum() / np.arange(1, len(values) + 1)).tolist()
    return means


def _same_file(log: Log, found: StockResult, file: File) -> Check:
    """Whether the types of the tensors that the board loaded are the file's. A hash would be better; the tool prints none."""
    ok = None if not found.types else found.types == file.types
    there, ours = (", ".join(f"{n} x {t[n]}" for n in sorted(t)) for t in (found.types, file.types))
    said = {
        None: f"{log.name} does not say which file was run; it does with -lv 4",
        True: f"{log.name} is of a file with this file's tensors: {ours}",
        False: f"{log.name} is of another file, with the tensors {there}; this one has {ours}",
    }[ok]
    return Check(step="served", name="file on the board", codes=("C-38", "C-39"), ok=ok, said=said)


def _step(steps: Sequence[StepCost], served: Mapping[str, Served]) -> list[StepCost]:
    """The board as a step of the domain text, on top of the one before it."""
    if not steps or "domain" not in served:
        return []
    last, s = steps[-1], served["domain"]
    before = last.kld or 0.0
    return [StepCost(
        step="served", title="on the board", loss=last.loss + s.cost, cost=s.cost, cost_low=s.cost_low,
        cost_high=s.cost_high, kld=before + s.moved, kld_low=before + s.moved_low, kld_high=before + s.moved_high,
        kld_added=s.moved, windows=s.windows,
    )]  # fmt: skip


def _notes(file: File, served: Sequence[Served]) -> list[str]:
    own = {(file.floor or {}).get("kernels"), *(p["kernels"] for p in (file.floor or {}).get("pairs", ()))}
    return [
        f"{s.log} comes from kernels that this machine has too: it may not be a board's"
        for s in served
        if s.kernels and s.kernels in own
    ]
