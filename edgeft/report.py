"""What one build made, as JSON and Markdown. Derived from what the steps recorded; no step writes into it."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from edgeft import __version__
from edgeft.build import Report, Result
from edgeft.store import Store, read_manifest, write_atomically

SCHEMA = 1
"""Raised when a key of report.json changes its meaning or goes away."""


def write(report: Report, store: Store, recipe: str, target: str) -> Path:
    """Write `reports/<recipe>/report.json` and `report.md` into the store; returns the Markdown file."""
    folder = store.root / "reports" / recipe
    document = as_document(report, recipe, target)
    write_atomically(folder / "report.json", json.dumps(document, indent=1, ensure_ascii=False) + "\n")
    write_atomically(folder / "report.md", as_markdown(document))
    return folder / "report.md"


def as_document(report: Report, recipe: str, target: str) -> dict[str, Any]:
    """The report as plain data, schema `SCHEMA`."""
    return {
        "schema": SCHEMA,
        "edgeft": __version__,
        "recipe": recipe,
        "target": target,
        "machine": f"{platform.machine()}, {platform.system()} {platform.release()}, Python {platform.python_version()}",
        "ok": report.error is None,
        "error": str(report.error) if report.error else None,
        "steps": [_step(r) for r in report.results],
    }


def _step(result: Result) -> dict[str, Any]:
    state = (
        "failed"
        if result.error
        else "stored"
        if result.cached
        else "made"
        if result.artifact
        else "not tried"
    )
    return {
        "step": result.step.title, "stage": result.step.stage.id, "variant": result.step.variant,
        "key": result.step.key, "state": state, "seconds": _seconds(result),
        "error": str(result.error) if result.error else None,
        "path": str(result.artifact.path) if result.artifact else None,
        "facts": result.artifact.facts if result.artifact else {},
    }  # fmt: skip


def _seconds(result: Result) -> float:
    """How long the step took when it was made, which may have been in an earlier build."""
    manifest = read_manifest(result.artifact.path) if result.artifact else None
    return round(float(manifest["seconds"]) if manifest else result.seconds, 2)


def as_markdown(document: dict[str, Any]) -> str:
    """The same for people."""
    steps = document["steps"]
    facts = {s["stage"]: s["facts"] for s in steps}
    lines = [f"# {document['recipe']} for {document['target'] or 'no target'}", ""]
    lines += [
        f"**{'Built.' if document['ok'] else 'Not built: ' + str(document['error'])}** {document['machine']}",
        "",
    ]
    lines += _training(facts.get("train", {}))
    lines += _files(steps)
    lines += _answers(steps)
    lines += ["## Steps", "", "| step | | seconds | what came of it |", "|---|---|---|---|"]
    lines += [
        f"| {s['step']} | {s['state']} | {s['seconds']:.1f} | {_cell(s['error'] or s['facts'].get('summary', ''))} |"
        for s in steps
    ]
    return "\n".join(lines) + "\n"


def _training(train: dict[str, Any]) -> list[str]:
    if "heldout_loss" not in train:
        return []
    before, after = train["heldout_loss_base"], train["heldout_loss"]
    return [
        "## Training", "",
        (f"Held-out loss on answers, nats per token: **{before:.3f}** (base) → **{after:.3f}** (trained); "
        f"{train['method']} on {train['device']}, {train['steps']} steps."), "",
    ]  # fmt: skip


def _files(steps: list[dict[str, Any]]) -> list[str]:
    files = {s["variant"]: s["facts"] for s in steps if s["stage"] == "quantize/gguf" and s["facts"]}
    measured = {s["variant"]: s["facts"] for s in steps if s["stage"] == "verify" and s["facts"]}
    gates = {s["variant"]: s for s in steps if s["stage"] == "gate"}
    if not files:
        return []
    lines = [
        "## Files against the trained model", "",
        ("Held-out conversations; `≤` is the one-sided 95 % bound over windows. "
        "Kept: share of what training gained on the answers."), "",
        "| file | MB | bits/weight | types inside | PPL ratio | KLD | same top | kept | verdict |",
        "|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for variant, f in files.items():
        m = measured.get(variant)
        types = ", ".join(f"{name} ×{n}" for name, n in f["types"].items())
        row = [variant, f"{f['bytes'] / 1e6:,.1f}", f"{f['bits_per_weight']:.2f}", types]
        if m:
            kept = m["retention"]["retention"]
            row += [f"{m['ppl_ratio']:.4f} (≤ {m['ppl_ratio_bound']:.4f})", f"{m['kld']:.4f} (≤ {m['kld_bound']:.4f})",
                    f"{m['same_top']:.1%}", "—" if kept is None else f"{kept:.0%}"]  # fmt: skip
        else:
            row += ["—"] * 4
        gate = gates.get(variant, {"state": "not tried"})
        row.append(
            "pass" if gate["state"] in ("made", "stored") else "FAIL" if gate["state"] == "failed" else "—"
        )
        lines.append("| " + " | ".join(_cell(c) for c in row) + " |")
    return [*lines, ""]


def _answers(steps: list[dict[str, Any]]) -> list[str]:
    measured = [s for s in steps if s["stage"] == "verify" and s["facts"].get("answers")]
    if not measured:
        return []
    shown = measured[0]
    lines = ["## Held-out questions", ""]
    for a in shown["facts"]["answers"]:
        lines += [f"**{_cell(a['question'])}**", "", "| who | answer |", "|---|---|", f"| expected | {_cell(a['expected'])} |",
                  f"| base | {_cell(a['base'])} |", f"| trained | {_cell(a['trained'])} |",
                  f"| shipped ({shown['variant']}) | {_cell(a['shipped'])} |", ""]  # fmt: skip
    return lines


def _cell(text: object) -> str:
    return " ".join(str(text).replace("|", "\\|").split())


def built(report: Report, stage: str) -> Iterable[Result]:
    """The steps of a stage that have a result."""
    return (r for r in report.results if r.step.stage.id == stage and r.artifact)
