"""The data card as JSON and as a page: what was read, dropped and why, how long rows are, how much leaks."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

from edgeft.corpus.findings import RULES


def as_json(card: dict[str, Any]) -> str:
    return json.dumps(card, ensure_ascii=False, indent=2) + "\n"


def as_markdown(card: dict[str, Any]) -> str:
    """The card for people. Nothing is in it that is not in the JSON."""
    lines = ["# Data card", "", *_overview(card), "", "## Sources", "", *_sources(card["sources"])]
    lines += [
        "",
        "## Tokens",
        "",
        *_lengths(card["tokens"]),
        "",
        "## Dropped rows",
        "",
        *_dropped(card["sources"]),
    ]
    lines += [
        "",
        "## Leak",
        "",
        *_leak(card["leak"]),
        "",
        "## Noticed and kept",
        "",
        *_remarks(card["remarks"]),
    ]
    lines += ["", "## Files", "", *_files(card["outputs"])]
    return "\n".join(lines) + "\n"


def _overview(card: dict[str, Any]) -> Iterable[str]:
    split, template = card["split"], card["template"]
    yield (
        f"{split['train']} rows to train on, {split['heldout']} held out. Kept together by {split['by']}: "
        f"{split['units']} of them, the largest of {split['largest_unit']} rows, {split['heldout_units']} held out."
    )
    if split["entangled_units"]:
        yield ""
        yield f"{split['entangled_units']} of them say so much that others say too that they are only trained on."
    yield ""
    yield (
        f"Rendered with the base model's chat template (sha256 `{template['sha256'][:16]}`); a turn ends with "
        f"`{template['end_of_turn']}` (id {template['end_of_turn_id']}), which is learnt in every row. "
        f"Rows may have {card['max_tokens']} tokens; the longest has {card['max_length']}. Seed {card['seed']}."
    )


def _sources(sources: Sequence[dict[str, Any]]) -> Iterable[str]:
    yield "| source | format | read | kept | train | held out | weight | share of train | identity |"
    yield "|---|---|---:|---:|---:|---:|---:|---:|---|"
    for s in sources:
        identity = f"sha256 `{s['sha256'][:16]}`" if s["sha256"] else f"revision `{s['revision'][:12]}`"
        weight = "" if s["weight"] is None else f"{s['weight']:g}"
        yield (
            f"| {_cell(s['name'])} | {s['format']} | {s['read']} | {s['kept']} | {s['train']} | {s['heldout']} | {weight} "
            f"| {s['share']:.1%} | {identity} |"
        )


def _lengths(sides: dict[str, Any]) -> Iterable[str]:
    yield "| side | part | p50 | p90 | p99 | max |"
    yield "|---|---|---:|---:|---:|---:|"
    for side, found in sides.items():
        for part, p in found["lengths"].items():
            yield f"| {side} | {part} | {p['p50']} | {p['p90']} | {p['p99']} | {p['max']} |"
    yield ""
    for side, found in sides.items():
        yield f"- {side}: {found['total']} tokens, {found['supervised']} ({found['supervised_share']:.1%}) of them learnt"


def _dropped(sources: Sequence[dict[str, Any]]) -> Iterable[str]:
    none = True
    for source in sources:
        for rule, found in source["dropped"].items():
            none = False
            yield f"**{_cell(source['name'])}**: {found['count']} × {RULES[rule]} (`{rule}`)"
            yield ""
            for e in found["examples"]:
                yield f"- {_cell(e['origin'])}: {e['reason']}: {_cell(e['text'])}"
            yield ""
    if none:
        yield "None."


def _leak(leak: dict[str, Any]) -> Iterable[str]:
    yield (
        f"Share of a held-out answer's {leak['ngram']}-word runs that occur in the training answers "
        f"(short answers: in question and answer). Rows at {leak['limit']:.0%} or more were taken out."
    )
    yield ""
    yield "| held-out rows | rows | mean | max | ≥ 50 % | ≥ 90 % |"
    yield "|---|---:|---:|---:|---:|---:|"
    for label, key in (("as split", "before"), ("as kept", "after")):
        m = leak[key]
        counts = f"{m['over_50_percent']} | {m['over_90_percent']}"
        yield f"| {label} | {m['rows']} | {m['mean']:.1%} | {m['max']:.1%} | {counts} |"


def _remarks(remarks: dict[str, Any]) -> Iterable[str]:
    if not any(found["count"] for found in remarks.values()):
        yield "Nothing."
    for found in remarks.values():
        if found["count"]:
            yield f"{found['count']} × {found['what']}"
            yield ""
            yield from (f"- {_cell(e['origin'])}: {_cell(e['text'])}" for e in found["examples"])
            yield ""


def _files(outputs: dict[str, Any]) -> Iterable[str]:
    yield from (f"- `{name}`: {f['bytes']} bytes, sha256 `{f['sha256']}`" for name, f in outputs.items())


def _cell(text: str) -> str:
    """Text that can break neither a table nor a list, nor smuggle markup into the page."""
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("`", "'")
