"""From sources to training data: the order of the steps, what each takes away, and the card that says so."""

from __future__ import annotations

import hashlib
import logging
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgeft.corpus import card, duplicates, findings, rules, split
from edgeft.corpus.conversation import Conversation
from edgeft.corpus.rows import Row, write_rows
from edgeft.corpus.rules import Filters
from edgeft.corpus.sources import Loaded, Source, load
from edgeft.corpus.template import Rendered, Template
from edgeft.errors import DataError, RecipeError
from edgeft.progress import report

log = logging.getLogger(__name__)
_BATCH = 256


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a recipe says about the data as a whole."""

    holdout: float = 0.05
    """Below 1 a share of the rows, else a number of rows; unused when a source is held out as a whole."""
    max_tokens: int = 1024
    seed: int = 0
    system: str = ""
    max_overlap: float = 0.5
    """A held-out row is dropped when this share of its answer's 8-grams stands in the training answers."""
    filters: Filters = field(default_factory=Filters)


@dataclass(frozen=True)
class _Run:
    """The state one preparation hands from step to step: all conversations, and which of them are still in."""

    rows: Sequence[Conversation]
    rendered: dict[int, Rendered]
    dropped: findings.Dropped

    def without(self, kept: Sequence[int], rule: str, why: Mapping[int, str]) -> list[int]:
        """`kept` less the rows in `why`, which are counted under `rule` with their reasons."""
        for i in kept:
            if i in why:
                self.dropped.add(self.rows[i], rule, why[i])
        return [i for i in kept if i not in why]


@dataclass(frozen=True, kw_only=True)
class _Sides:
    train: list[int]
    heldout: list[int]
    shared: set[int]
    """Held-out rows whose group or cluster also has training rows; only a held-out source can have them."""
    facts: dict[str, Any]


def prepare(sources: Sequence[Source], settings: Settings, template: Template, out: Path) -> dict[str, Any]:
    """Write train.jsonl, heldout.jsonl, card.json and card.md into `out`; return the card.

    The files depend on nothing but the arguments' contents. Raises DataError (malformed rows, nothing left,
    no split without a leak) and RecipeError (weights on some sources only).
    """
    check(sources)
    loaded = load(sources, system=settings.system)
    # Training sources first: of two rows that are alike the earlier stays, so held-out rows give way.
    rows = [r for one in sorted(loaded, key=lambda one: one.source.heldout) for r in one.rows]
    run = _Run(rows, {}, findings.Dropped())
    kept = _filtered(run, sources, settings, template)
    parted = _split(run, kept, sources, settings)
    leak, heldout = _without_leaks(run, parted, settings)
    train = _mixed(run, parted.train, sources, settings.seed)
    _refuse_nothing(run, {"train on": train, "hold out": heldout})
    sides = {"train": _final(run, train), "heldout": _final(run, heldout)}
    outputs = {}
    for side, finished in sides.items():
        write_rows(out / f"{side}.jsonl", finished)
        outputs[f"{side}.jsonl"] = _identity(out / f"{side}.jsonl")
    made = {
        "split": {"train": len(train), "heldout": len(heldout), **parted.facts},
        "tokens": {side: findings.tokens(finished) for side, finished in sides.items()},
        "max_length": max(len(r.ids) for finished in sides.values() for r in finished),
        "max_tokens": settings.max_tokens,
        "seed": settings.seed,
        "system": settings.system,
        "filters": vars(settings.filters),
        "dropped": run.dropped.totals(),
        "sources": [_source_facts(run, n, one, kept, train, heldout) for n, one in enumerate(loaded)],
        "leak": leak,
        "remarks": findings.remarks([rows[i] for i in sorted({*train, *heldout})]),
        "template": findings.template_facts(template),
        "outputs": outputs,
    }
    for number, source in enumerate(sources, 1):
        if source.notice:
            # The name begins as a bundle's collector of notices expects it, and differs for two sources.
            (out / f"NOTICE-data-{number}-{source.notice.name}").write_bytes(source.notice.read_bytes())
    (out / "card.json").write_text(card.as_json(made), encoding="utf-8", newline="\n")
    (out / "card.md").write_text(card.as_markdown(made), encoding="utf-8", newline="\n")
    return made


def check(sources: Sequence[Source]) -> None:
    """Refuse sources that cannot be mixed. Raises RecipeError."""
    train = [s for s in sources if not s.heldout]
    if not train:
        raise RecipeError("data.sources: every source is held out; none is left to train on")
    unweighted = [s.name for s in train if s.weight is None]
    if unweighted and len(unweighted) < len(train):
        raise RecipeError(
            f"data.sources: {unweighted[0]} has no weight while other sources have one",
            hint="give every training source a weight, or none",
        )


def _filtered(run: _Run, sources: Sequence[Source], settings: Settings, template: Template) -> list[int]:
    """The rows that no rule drops; those are rendered. Rules come in the order of `findings.RULES`."""
    filters = settings.filters
    kept = []
    for i, row in enumerate(run.rows):
        rule, reason = next(rules.broken_rules(row, filters), ("", ""))
        if not rule and (token := template.control_token(row)):
            rule, reason = "control_tokens", f"the text contains {token!r}"
        if rule:
            run.dropped.add(row, rule, reason)
        else:
            kept.append(i)
    if filters.duplicates == "drop":
        kept = run.without(kept, "duplicates", _same_as(run, kept, duplicates.exact))
    _render(run, kept, template)
    long = {i: f"{n} tokens" for i in kept if (n := len(run.rendered[i].ids)) > settings.max_tokens}
    if long and filters.over_long == "refuse":
        first = next(iter(long))
        raise DataError(
            f"{len(long)} rows have more than {settings.max_tokens} tokens, the first {run.rows[first].origin} "
            f"({long[first]})",
            hint='raise max_tokens, shorten the rows, or set over_long = "drop"',
        )
    kept = run.without(kept, "over_long", long)
    if filters.near_duplicates == "drop":
        threshold = filters.near_duplicate_threshold
        kept = run.without(
            kept, "near_duplicates", _same_as(run, kept, lambda r: duplicates.near(r, threshold))
        )
    kept = _capped(run, kept, sources, settings.seed)
    _refuse_nothing(run, {"use": kept})
    return kept


def _same_as(
    run: _Run, kept: Sequence[int], find: Callable[[Sequence[Conversation]], Mapping[int, int]]
) -> dict[int, str]:
    found = find([run.rows[i] for i in kept])
    return {kept[i]: f"like {run.rows[kept[j]].origin}" for i, j in found.items()}


def _render(run: _Run, kept: Sequence[int], template: Template) -> None:
    for at in range(0, len(kept), _BATCH):
        report("tokenizing", at, len(kept), unit="rows")
        batch = kept[at : at + _BATCH]
        run.rendered.update(zip(batch, template.render([run.rows[i] for i in batch]), strict=True))


def _capped(run: _Run, kept: Sequence[int], sources: Sequence[Source], seed: int) -> list[int]:
    over: dict[int, str] = {}
    for number, source in enumerate(sources):
        own = [i for i in kept if run.rows[i].source == number]
        if source.rows is not None:
            over |= dict.fromkeys(
                split.in_seeded_order(own, run.rows, seed)[source.rows :],
                f"the source may give {source.rows} rows",
            )
    return run.without(kept, "rows", over)


def _split(run: _Run, kept: Sequence[int], sources: Sequence[Source], settings: Settings) -> _Sides:
    rows = [run.rows[i] for i in kept]
    units = [r.group for r in rows]
    if not all(units):
        alike = duplicates.clusters(rows)
        units = [r.group or f"\0{c}" for r, c in zip(rows, alike, strict=True)]
    given = any(s.heldout for s in sources)
    tied = set() if given else split.entangled(rows, units, settings.max_overlap)
    if given:
        found = _given_split(rows, units, sources, settings.seed)
    else:
        found = split.split(rows, units, holdout=settings.holdout, seed=settings.seed, entangled=tied)
    aim = settings.holdout * len(rows) if settings.holdout < 1 else settings.holdout
    if not given and len(found.heldout) < aim / 2:
        log.warning("only %d rows could be held out of %.0f asked for", len(found.heldout), aim)
    shared = {units[i] for i in found.train} & {units[i] for i in found.heldout}
    return _Sides(
        train=[kept[i] for i in found.train],
        heldout=[kept[i] for i in found.heldout],
        shared={kept[i] for i in found.heldout if units[i] in shared},
        facts={
            "by": _kept_together_by(sources), "units": found.units, "heldout_units": found.heldout_units - len(shared),
            "largest_unit": found.largest_unit, "entangled_units": len(tied),
        },
    )  # fmt: skip


def _kept_together_by(sources: Sequence[Source]) -> str:
    columns = dict.fromkeys(s.group for s in sources if s.group)
    by = f"column {', '.join(columns)}" if columns else "clusters of related rows"
    return f"a held-out source, checked by {by}" if any(s.heldout for s in sources) else by


def _given_split(
    rows: Sequence[Conversation], units: Sequence[str], sources: Sequence[Source], seed: int
) -> split.Split:
    held = [i for i, r in enumerate(rows) if sources[r.source].heldout]
    rest = [i for i, r in enumerate(rows) if not sources[r.source].heldout]
    return split.Split(
        train=split.in_seeded_order(rest, rows, seed),
        heldout=split.in_seeded_order(held, rows, seed),
        units=len(set(units)),
        heldout_units=len({units[i] for i in held}),
        largest_unit=max(Counter(units).values()),
    )


def _without_leaks(run: _Run, sides: _Sides, settings: Settings) -> tuple[dict[str, Any], list[int]]:
    """The measured overlap before and after dropping the held-out rows that leak, and those that stay.

    Measured against every row that may be trained on, also those that a weight leaves out later.
    """
    train = [run.rows[i] for i in sides.train]
    shares = dict(
        zip(sides.heldout, split.overlaps(train, [run.rows[i] for i in sides.heldout]), strict=True)
    )
    leaks = {
        i: f"{share:.0%} of its answer's {split.NGRAM}-word runs stand in training answers"
        for i, share in shares.items()
        if share >= settings.max_overlap
    }
    related = dict.fromkeys(sides.shared - leaks.keys(), "in one group with a training row")
    heldout = run.without(sides.heldout, "leak", leaks | related)

    def measured(members: Sequence[int]) -> dict[str, Any]:
        return findings.overlap_summary([shares[i] for i in members], [run.rows[i] for i in members])

    before, after = measured(sides.heldout), measured(heldout)
    return {"ngram": split.NGRAM, "limit": settings.max_overlap, "before": before, "after": after}, heldout


def _mixed(run: _Run, train: Sequence[int], sources: Sequence[Source], seed: int) -> list[int]:
    """Training rows in their final order, once or more each, in the ratio of the weights."""
    members: dict[int, list[int]] = defaultdict(list)
    for i in train:
        members[run.rows[i].source].append(i)
    repeats = {n: s.repeat for n, s in enumerate(sources)}
    weights = {n: s.weight for n, s in enumerate(sources) if s.weight is not None and not s.heldout}
    take = {n: len(own) * repeats[n] for n, own in members.items()}
    if weights:
        take |= split.mixture(members, weights, repeats)
    chosen: list[tuple[str, int]] = []
    for n, own in members.items():
        copies = [(i, copy) for copy in range(repeats[n]) for i in own][: take[n]]
        chosen += [(split.row_hash(run.rows[i], seed, copy), i) for i, copy in copies]
        run.without(own[take[n] :], "weight", dict.fromkeys(own, f"weight {sources[n].weight}"))
    return [i for _, i in sorted(chosen)]


def _refuse_nothing(run: _Run, sides: Mapping[str, Sequence[int]]) -> None:
    for what, left in sides.items():
        if not left:
            took = [f"{findings.RULES[rule]} ({rule}): {n}" for rule, n in run.dropped.totals().items()]
            raise DataError(
                f"no row is left to {what}: of {len(run.rows)} rows read, the rules dropped\n  "
                + "\n  ".join(took),
                hint='see docs/data.md for each rule; under [data.filters] a rule can be set to "keep"',
            )


def _final(run: _Run, members: Sequence[int]) -> list[Row]:
    return [
        Row(
            messages=run.rows[i].as_dicts(), ids=run.rendered[i].ids, labels=run.rendered[i].labels,
            origin=run.rows[i].origin, group=run.rows[i].group,
        )
        for i in members
    ]  # fmt: skip


def _source_facts(
    run: _Run, number: int, one: Loaded, kept: Sequence[int], train: Sequence[int], heldout: Sequence[int]
) -> dict[str, Any]:
    def own(members: Sequence[int]) -> int:
        return sum(run.rows[i].source == number for i in members)

    return {
        "name": one.source.name, "sha256": one.sha256, "revision": one.source.revision, "licence": one.source.licence,
        "format": one.form.name, "columns": {k: v for k, v in vars(one.form.columns).items() if v},
        "heldout_source": one.source.heldout, "weight": one.source.weight,
        "read": len(one.rows), "kept": own(kept), "train": own(train), "heldout": own(heldout),
        "share": round(own(train) / len(train), 4),
        "dropped": run.dropped.of(number),
    }  # fmt: skip


def _identity(path: Path) -> dict[str, Any]:
    data = path.read_bytes()
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
