"""The certificate of a build, collected from what its steps left behind: folders with arrays, and facts."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import edgeft
from edgeft.llamacpp.score import Scores
from edgeft.parity import evidence
from edgeft.parity.certificate import LLAMA_CPP, Answer, Certificate, File, Manners, Word, overall
from edgeft.parity.checks.check import Check
from edgeft.parity.gates import Limits
from edgeft.parity.statistics import Comparison, Retention

QUANTIZED = ("quantize/gguf", "quantize/served")
"""The step that made what ships; a build has one of the two for each variant."""
VERIFIED = ("verify", "verify/served")
"""The step that measured it."""
EXPORTED = ("reference", "merge", "gguf", *QUANTIZED, *VERIFIED)
"""The steps that a file's part of the certificate is collected from. Only a merged model has `merge`."""


class Made(Protocol):
    """A finished step."""

    @property
    def path(self) -> Path: ...
    @property
    def facts(self) -> dict[str, Any]: ...


def one_of(names: Sequence[str], made: Mapping[str, Made]) -> Made:
    """The step that is there, of several that never are together."""
    return next(made[name] for name in names if name in made)


def file(made: Mapping[str, Made], limits: Limits, *, memory_mb: float | None = None) -> File:
    """One shipped file's part, judged by `limits`. `made` holds the steps named in EXPORTED.

    `memory_mb` is what the target is predicted to need for it.
    """
    import numpy as np

    shipped, verified = one_of(QUANTIZED, made).facts, one_of(VERIFIED, made).facts
    reference = evidence.Reference.of(dict(np.load(made["reference"].path / "reference.npz")))
    scores = _scores(one_of(VERIFIED, made))
    runtime = verified.get("runtime", LLAMA_CPP)
    title = shipped["type"] if runtime == LLAMA_CPP else f"{shipped['type']}, served by {runtime}"
    chain = [*_merged(made), ("quantized", title, scores["domain"])]
    found = File(
        name=shipped["type"].lower(), title=shipped["type"], sha256=verified["sha256"], bytes=shipped["bytes"],
        bits_per_weight=shipped["bits_per_weight"], types=shipped["types"], memory_mb=memory_mb, verdict="UNDECIDED",
        because=[], culprit="", more_windows=None, tier="", limits=limits,
        domain=Comparison.of(verified["comparisons"]["domain"]),
        general=Comparison.of(verified["comparisons"]["general"]) if "general" in scores else None,
        retention=Retention.of(verified["retention"]) if verified["retention"] else None, findings=[],
        checks=[Check.of(c) for name in (*EXPORTED, "imatrix") if name in made for c in made[name].facts.get("checks", ())],
        steps=evidence.step_costs(reference, chain, trained="as trained"),
        bins=evidence.bins(reference, scores), worst=[Word(**w) for w in verified["worst"]],
        answers=[Answer(**a) for a in verified["answers"]], manners=[Manners(**m) for m in verified["manners"]],
        floor=verified["floor"], notes=_notes(verified, reference), runtime=runtime,
    )  # fmt: skip
    comparisons = {"domain": found.domain} | ({"general": found.general} if found.general else {})
    return evidence.judged(found, comparisons, found.retention, limits)


def certificate(
    files: Sequence[File], made: Mapping[str, Made], *, name: str, command: str, target: dict[str, Any], when: str,
    versions: Mapping[str, str], keys: Mapping[str, str],
) -> Certificate:  # fmt: skip
    """The document for files of one build. `when` is a UTC time or ""; `keys` are the steps' keys by title."""
    said, merge = made["reference"].facts, made["merge"].facts if "merge" in made else {}
    merges: dict[str, Any] = {
        "chosen": merge.get("merge_base", ""), "why": merge.get("merge_reason", ""), "candidates": merge.get("candidates", {}),
    }  # fmt: skip
    found = Certificate(
        name=name, verdict=overall(files), made=when, edgeft=edgeft.__version__, command=command, machine=machine(),
        reference=said["title"], target={}, texts=said["texts"], files=list(files),
        merges=merges if merges["candidates"] else {},
        provenance={
            **provenance(), **versions, **scored_by(files), **{f"step {title}": key for title, key in keys.items()},
        },
    )  # fmt: skip
    return aimed(found, target)


def aimed(found: Certificate, target: dict[str, Any]) -> Certificate:
    """The certificate for a target: its `name`, `memory_mb`, and `arch` (arm64, amd64).

    Each file gets a note when the target computes with other kernels than those it was measured with.
    """
    here = {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine(), platform.machine())
    if target.get("arch", here) == here:
        return replace(found, target=target)
    files = []
    for one in found.files:
        if one.served:
            files.append(one)
            continue
        if one.runtime != LLAMA_CPP:
            note = f"scored on {here}; {target['name']} is {target['arch']}, whose kernels round otherwise. It was not run there"
            files.append(replace(one, notes=[*one.notes, note]))
            continue
        moves = f" (KL divergence {one.floor['largest']:.1e} between two kinds here)" if one.floor else ""
        note = (
            f"measured with the kernels of {here}; {target['name']} is {target['arch']}, whose kernels round otherwise{moves}. "
            "llama-perplexity measures it there: docs/device-kernels.md"
        )
        files.append(replace(one, notes=[*one.notes, note]))
    return replace(found, target=target, files=files)


def provenance() -> dict[str, str]:
    """Where converter, quantizer and kernels came from."""
    from edgeft.llamacpp import pin

    found = pin.load()
    return {
        "llama.cpp": f"{found.llama}, commit {found.commit}",
        "llama.cpp source": f"{found.package} {found.version}, sha256 {found.sha256}",
    }


def scored_by(files: Sequence[File]) -> dict[str, str]:
    """Who gave the numbers of each file that llama.cpp did not."""
    return {f"runtime of {f.title}": f.runtime for f in files if f.runtime != LLAMA_CPP}


def machine() -> str:
    """The processor that measured, without the machine's name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8", errors="replace").splitlines() if info.is_file() else []
    model = next((x.partition(":")[2].strip() for x in lines if x.startswith(("model name", "Model"))), "")
    return f"{platform.machine()}{', ' + model if model else ''}, {platform.system()}, Python {platform.python_version()}"


def _merged(made: Mapping[str, Made]) -> list[tuple[str, str, Scores]]:
    """The steps between training and quantizing, where the adapter was merged."""
    if "merge" not in made:
        return []
    merge = made["merge"]
    found = [("merged", f"merged into the {merge.facts['merge_base']} base", _scores(merge)["domain"])]
    if "gguf" in made:
        found.append(("gguf", f"GGUF, {made['gguf'].facts['type']}", _scores(made["gguf"])["domain"]))
    return found


def _scores(made: Made) -> dict[str, Scores]:
    import numpy as np

    return evidence.scores_of(dict(np.load(made.path / "scores.npz")))


def runtime_note(runtime: str, floor: Mapping[str, Any] | None) -> str:
    """What is to be known of a file that llama.cpp did not score."""
    noise = "was not measured here" if floor is None else f"is {floor['largest']:.1e} nats per token"
    return (
        f"scored, and answered for, by {runtime}. The noise of its kernels {noise}; another processor, a GPU or another "
        "version rounds otherwise"
    )


def _notes(verified: Mapping[str, Any], reference: evidence.Reference) -> list[str]:
    notes = []
    if "runtime" in verified:
        notes.append(runtime_note(verified["runtime"], verified["floor"]))
    if "adapter_sha256" in verified:
        notes.append(f"measured with the adapter beside it, sha256 {verified['adapter_sha256']}")
    for text, moved in verified.get("over_start", {}).items():
        notes.append(
            f"training through the rounding changed the loss on the {text} text by {moved['change']:+.4f} nats per token "
            f"({moved['low']:+.4f} to {moved['high']:+.4f}): {moved['start']:.4f} as it was quantized, {moved['loss']:.4f} now"
        )
    if len(reference.texts["domain"].ids) < 32:
        notes.append(
            f"the domain text has {len(reference.texts['domain'].ids)} windows; 32 or more give tighter bounds"
        )
    if "general" not in reference.texts:
        notes.append("nothing was measured outside the domain text")
    if verified["retention"] is None or verified["retention"]["retention"] is None:
        notes.append("training gained nothing that is clearly above zero, so no share of it can be told")
    return notes
