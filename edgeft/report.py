"""What one build made, as JSON and Markdown. Derived from what the steps recorded; no step writes into it."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeft import __version__
from edgeft.boards import record
from edgeft.build import Report, Result
from edgeft.stage import Artifact, Step
from edgeft.store import Store, read_manifest, write_atomically

if TYPE_CHECKING:
    from edgeft.parity.certificate import Certificate, File

OnBoards = Callable[[str, "File", Mapping[str, Artifact]], "File"]
"""A file's variant, the file, and the steps behind it; the file with what boards said of it."""

SCHEMA = 1
"""Raised when a key of report.json changes its meaning or goes away."""
BOARDS = "boards.json"
"""Beside the report: what `edgeft verify` measured."""


def write(report: Report, store: Store, recipe: str, target: str) -> Path:
    """Write `reports/<recipe>/report.json` and `report.md` into the store; returns the Markdown file."""
    folder = store.root / "reports" / recipe
    document = as_document(report, recipe, target)
    shipped = {s["facts"].get("sha256") for s in document["steps"] if s["stage"] == "verify"}
    document["boards"] = [b for b in record.known(folder / BOARDS) if b["file_sha256"] in shipped]
    _write(document, folder)
    return folder / "report.md"


def add_boards(store: Store, recipe: str, found: Sequence[dict[str, Any]]) -> Path | None:
    """Put what machines did with the shipped files into the last report; the Markdown file, None without a report.

    Of two records of one file on one kind of machine the newer stays. They are kept in BOARDS, from where the next
    build's report takes those of files that are still the same.
    """
    folder = store.root / "reports" / recipe
    kept = record.merged(record.known(folder / BOARDS), found)
    write_atomically(folder / BOARDS, json.dumps(kept, indent=1, ensure_ascii=False) + "\n")
    try:
        document = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    shipped = {s["facts"].get("sha256") for s in document["steps"] if s["stage"] == "verify"}
    document["boards"] = [b for b in kept if b["file_sha256"] in shipped]
    _write(document, folder)
    return folder / "report.md"


def _write(document: dict[str, Any], folder: Path) -> None:
    write_atomically(folder / "report.json", json.dumps(document, indent=1, ensure_ascii=False) + "\n")
    write_atomically(folder / "report.md", as_markdown(document))


def certify(
    report: Report, store: Store, recipe: str, recipe_path: str, *, served: OnBoards | None = None
) -> Certificate | None:
    """Write `certificate.json` and `certificate.html` beside the report and return the document.

    It covers every file that was measured, whatever the gate said. None when no file was. The certificate of the same
    steps that is there already is kept, with what boards said of its files. With `served` it is made again; that is
    given each file by variant, with the steps behind it, and hands back what becomes of it.
    """
    from edgeft.parity import collected, page
    from edgeft.staging import predicted, target

    made = {r.step.key: r.artifact for r in report.results if r.artifact}
    by_variant = {r.step.variant: _behind(r.step, made) for r in built(report, *collected.VERIFIED)}
    if not by_variant:
        return None
    others = {r.step.stage.id: r.artifact.facts for r in report.results if r.artifact}
    device, serve = others.get("device", {}), others.get("serve", {})
    folder = store.root / "reports" / recipe
    keys = {r.step.title: r.step.key for r in report.results if r.artifact}
    if served is None and (known := _known(folder, keys)):
        return known
    files = []
    for variant, steps in by_variant.items():
        memory = None
        if device and (gguf := steps.get("quantize/gguf")):
            memory = predicted(gguf.path / "model.gguf", gguf.facts["type"], device, serve)[0]["total"]
        gate = next(
            r.step.params for r in report.results if r.step.stage.name == "gate" and r.step.variant == variant
        )
        one = collected.file(steps, gate.limits(), memory_mb=memory)  # type: ignore[attr-defined]
        files.append(served(variant, one, steps) if served else one)
    found = collected.certificate(
        files, next(iter(by_variant.values())), name=recipe, command=f"edgeft build {recipe_path}",
        target=target(device) if device else {}, when=datetime.now(UTC).isoformat(timespec="seconds"),
        versions=_versions(report), keys=keys,
    )  # fmt: skip
    references = dict.fromkeys(steps["reference"].facts["title"] for steps in by_variant.values())
    found = replace(found, reference="; ".join(references))
    write_atomically(
        folder / "certificate.json", json.dumps(found.as_json(), indent=1, ensure_ascii=False) + "\n"
    )
    write_atomically(folder / "certificate.html", page.render(found))
    return found


def _known(folder: Path, keys: dict[str, str]) -> Certificate | None:
    from edgeft.parity import certificate

    try:
        found = certificate.load(json.loads((folder / "certificate.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError):
        return None
    noted = {k.removeprefix("step "): v for k, v in found.provenance.items() if k.startswith("step ")}
    page = folder / "certificate.html"
    return found if noted == keys and found.edgeft == __version__ and page.is_file() else None


def _behind(step: Step, made: Mapping[str, Artifact]) -> dict[str, Artifact]:
    """What a step and those before it left, under the names by which the step takes them."""
    sources = {**step.inputs, step.stage.id: step}
    if imatrix := step.find("imatrix"):
        sources["imatrix"] = imatrix
    return {name: made[source.key] for name, source in sources.items() if source.key in made}


def _versions(report: Report) -> dict[str, str]:
    """Versions of the heavy libraries, as the reference's step recorded them."""
    for r in built(report, "reference"):
        manifest = read_manifest(r.artifact.path) if r.artifact else None
        return dict((manifest or {}).get("versions", {}))
    return {}


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
    lines = [f"# {document['recipe']} for {document['target'] or 'no target'}", ""]
    lines += [
        f"**{'Built.' if document['ok'] else 'Not built: ' + str(document['error'])}** {document['machine']}",
        "",
    ]
    lines += _training(steps)
    lines += _files(steps)
    lines += record.as_markdown(document.get("boards", []))
    lines += _answers(steps)
    lines += ["## Steps", "", "| step | | seconds | what came of it |", "|---|---|---|---|"]
    lines += [
        f"| {s['step']} | {s['state']} | {s['seconds']:.1f} | {_cell(s['error'] or s['facts'].get('summary', ''))} |"
        for s in steps
    ]
    return "\n".join(lines) + "\n"


def _training(steps: list[dict[str, Any]]) -> list[str]:
    trained = [s for s in steps if s["stage"] == "train" and "heldout_loss" in s["facts"]]
    if not trained:
        return []
    lines = ["## Training", ""]
    for step in trained:
        f = step["facts"]
        title = f"{step['variant']}: " if step["variant"] else ""
        started = f.get("started_from", "base")
        lines += [
            (f"{title}Held-out loss on answers, nats per token: **{f['heldout_loss_base']:.3f}** ({started}) → "
            f"**{f['heldout_loss']:.3f}** (trained); {f['method']} on {f['device']}, {f['steps']} steps."), "",
        ]  # fmt: skip
    return lines


def _files(steps: list[dict[str, Any]]) -> list[str]:
    found = {stage: {s["variant"]: s["facts"] for s in steps if s["stage"] == stage and s["facts"]} for stage in (
        "quantize/gguf", "tune", "pack", "start", "verify")}  # fmt: skip
    served = {
        s["variant"]: s["facts"]
        for s in steps
        if s["facts"].get("format") and s["stage"].startswith("quantize/")
    }
    found["verify"] |= {
        s["variant"]: s["facts"] for s in steps if s["stage"] == "verify/served" and s["facts"]
    }
    final = (found["tune"] or found["pack"] or found["quantize/gguf"]) | served
    gates = {s["variant"]: s for s in steps if s["stage"] in ("gate", "gate/served")}
    if not any(found.values()) and not served:
        return []
    lines = [
        "## Files against the trained model", "",
        ("Answers of held-out conversations; `≤` is the one-sided 95 % bound over windows. "
        "Kept: share of what training gained. All of it, with pictures: certificate.html beside this file."), "",
        "| file | MB | bits/weight | types inside | PPL ratio | KLD | same top | kept | verdict |",
        "|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for variant, facts in found["start"].items():
        title = f"{variant}, before the rounding was trained"
        lines.append(_row([title, *_inside(found["quantize/gguf"][variant]), *_numbers(facts), "—"]))
    for variant, facts in final.items():
        gate = gates.get(variant, {"state": "not tried", "error": None})
        verdict = {"made": "PASS", "stored": "PASS"}.get(gate["state"], _verdict(gate["error"]))
        lines.append(_row([variant, *_inside(facts), *_numbers(found["verify"].get(variant)), verdict]))
    return [*lines, "", *_runtimes(found["verify"]), *_tuned(found["verify"])]


def _runtimes(measured: dict[str, dict[str, Any]]) -> list[str]:
    """Who scored what llama.cpp did not."""
    said = [f"{variant} by {f['runtime']}" for variant, f in measured.items() if "runtime" in f]
    return [f"Scored by what serves it: {'; '.join(said)}; the others by llama.cpp.", ""] if said else []


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(_cell(c) for c in cells) + " |"


def _inside(f: dict[str, Any]) -> list[str]:
    types = ", ".join(f"{name} ×{n}" for name, n in f["types"].items())
    beside = f" (adapter {f['adapter_bytes'] / 1e6:,.1f})" if "adapter_bytes" in f else ""
    return [f"{f['bytes'] / 1e6:,.1f}{beside}", f"{f['bits_per_weight']:.2f}", types]


def _tuned(measured: dict[str, dict[str, Any]]) -> list[str]:
    """The file that was quantized, and what training through its rounding made of it, on the same windows."""
    rows = [(variant, f["over_start"]) for variant, f in measured.items() if "over_start" in f]
    if not rows:
        return []
    lines = [
        "## What training through the rounding changed", "",
        ("Mean loss of the two files in nats per token, in llama.cpp, on the same tokens, and the paired difference with "
        "its 95 % bounds. In the table above each is held against the model that it was made from: the plain file against "
        "the adapter's training, which had only its share of the steps, the other against the model as it was tuned."), "",
        "| file | text | plain | tuned | difference |", "|---|---|---|---|---|",
    ]  # fmt: skip
    for variant, texts in rows:
        for name, m in texts.items():
            change = f"{m['change']:+.4f} ({m['low']:+.4f} to {m['high']:+.4f})"
            lines.append(_row([variant, name, f"{m['start']:.4f}", f"{m['loss']:.4f}", change]))
    return [*lines, ""]


def _numbers(found: dict[str, Any] | None) -> list[str]:
    if not found:
        return ["—"] * 4
    c, kept = found["comparisons"]["domain"], (found["retention"] or {}).get("retention")
    return [f"{c['ppl_ratio']:.4f} (≤ {c['ppl_ratio_bound']:.4f})", f"{c['kld']:.4f} (≤ {c['kld_bound']:.4f})",
            f"{c['same_top']:.1%}", "—" if kept is None else f"{kept:.0%}"]  # fmt: skip


def _verdict(error: str | None) -> str:
    return "—" if error is None else "UNDECIDED" if " is UNDECIDED" in error else "FAIL"


def _answers(steps: list[dict[str, Any]]) -> list[str]:
    measured = [s for s in steps if s["stage"] in ("verify", "verify/served") and s["facts"].get("answers")]
    if not measured:
        return []
    shown = measured[0]
    lines = ["## Held-out questions", ""]
    for a in shown["facts"]["answers"]:
        said = a["replies"]
        lines += [f"**{_cell(a['question'])}**", "", "| who | answer |", "|---|---|", f"| expected | {_cell(a['expected'])} |",
                  f"| base | {_cell(said['base'])} |", f"| trained | {_cell(said['trained'])} |",
                  f"| shipped ({shown['variant']}) | {_cell(said['shipped'])} |", ""]  # fmt: skip
    return lines


def _cell(text: object) -> str:
    return " ".join(str(text).replace("|", "\\|").split())


def built(report: Report, *stages: str) -> Iterable[Result]:
    """The steps of some stages that have a result."""
    return (r for r in report.results if r.step.stage.id in stages and r.artifact)
