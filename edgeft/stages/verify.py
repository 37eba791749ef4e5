"""Measure how far a quantized file or folder strays from the trained model, and check what must be exact. `gate` judges."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from edgeft import llamacpp
from edgeft.stage import Artifact, Facts, Job, Params, Stage, Step, Where

if TYPE_CHECKING:
    from edgeft.llamacpp.score import Scores
    from edgeft.parity.evidence import Reference


class Verify(Params):
    floor_windows: int = Field(2, ge=0, le=64)
    """Windows on which the kernels' noise is measured for each file; 0: not at all."""
    awq: Literal["auto", "vllm", "transformers"] = "auto"
    """Which runtime scores and answers for AWQ folders; auto: vLLM where it can be started, else transformers."""


def run(job: Job[Verify]) -> Facts:
    llamacpp.activate()
    llamacpp.ensure("library")
    import numpy as np

    from edgeft.llamacpp.adapter import adapter_beside
    from edgeft.llamacpp.decode import Decoder
    from edgeft.parity import evidence, record, shipped
    from edgeft.parity.checks import rendering, weights
    from edgeft.parity.checks.check import Check
    from edgeft.parity.speakers import Gguf
    from edgeft.stage import digest

    p, said = job.params, job.inputs["reference"]
    file = job.inputs["quantize/gguf"].path / "model.gguf"
    adapter, native = adapter_beside(file), job.out / "native.f32"
    reference, asked = record.read(said.path)
    most = said.facts["max_answer_tokens"]
    longest = max((len(q.prompt_ids) for q in asked), default=0) + most
    with Decoder(file, n_ctx=max(said.facts["n_ctx"], longest), adapter=adapter) as decoder:
        # The kernels' noise is told from logits that this pass computes anyway.
        found = shipped.look(
            Gguf(decoder), reference, asked, said.path, decoder.detokenize, most=most,
            floor=(p.floor_windows, native) if p.floor_windows else None,
        )  # fmt: skip
    np.savez(job.out / "scores.npz", **evidence.as_arrays(found.scores))
    # What was not quantized from a merged model says for itself what it was made from: see `tune` and `pack`.
    checks: list[Check] = []
    if "gguf" in job.inputs:
        checks += weights.quantized(job.inputs["gguf"].path / "model.gguf", file)
    if "merge" in job.inputs:
        checks += rendering.against_checkpoint(job.inputs["merge"].path / "model", file)
    return {
        **shipped.facts(found, reference, asked, checks),
        "floor": _floor(file, adapter, reference, p.floor_windows, native),
        "sha256": digest(file),
        **({"adapter_sha256": digest(adapter)} if adapter else {}),
        **({"over_start": _over(job.inputs["start"].path, reference, found.scores)} if "start" in job.inputs else {}),
    }  # fmt: skip


def run_served(job: Job[Verify]) -> Facts:
    """The same of a folder that another runtime serves: that runtime gives the logits and the answers, reads the texts and
    renders the chats."""
    import numpy as np

    from edgeft.parity import evidence, noise, record, served, shipped
    from edgeft.parity.checks import folder as checking
    from edgeft.parity.checks import packed_weights
    from edgeft.stage import digest

    said, merge, made = job.inputs["reference"], job.inputs["merge"], job.inputs["quantize/served"]
    folder, kind, native = made.path / "model", str(made.facts["format"]), job.out / "native.f32"
    reference, asked = record.read(said.path)
    most = said.facts["max_answer_tokens"]
    longest = max((len(q.prompt_ids) for q in asked), default=0) + most
    checkpoint = merge.path / "model"
    base = job.inputs["base"].path / "model" if "base" in job.inputs else None
    checks = packed_weights.checks(kind, folder, checkpoint, base)
    n_ctx, few = max(said.facts["n_ctx"], longest), job.params.floor_windows
    with served.open_served(kind, folder, n_ctx=n_ctx, runtime=_runtime(kind, job.params)) as session:
        checks += checking.against_checkpoint(checkpoint, folder, session)
        found = shipped.look(
            served.Served(session), reference, asked, said.path, session.detokenize, most=most,
            floor=(few, native) if few else None,
        )  # fmt: skip
        runtime = session.said
    windows = reference.texts["domain"].ids[:few]
    floor = noise.floor(kind, folder, windows, native, runtime, job.out) if windows else None
    np.savez(job.out / "scores.npz", **evidence.as_arrays(found.scores))
    return {
        **shipped.facts(found, reference, asked, checks), "runtime": runtime, "floor": floor, "sha256": digest(folder),
    }  # fmt: skip


def _runtime(kind: str, params: Verify) -> str:
    return params.awq if kind == "awq" else "auto"


def check_served(step: Step, artifacts: Mapping[str, Artifact]) -> None:
    """Refuse a folder that nothing on this machine can score, before anything is made."""
    if step.key in artifacts:
        return
    from edgeft.parity import served

    kind = step.inputs["quantize/served"].stage.kind
    assert isinstance(step.params, Verify)
    if kind in served.RUNTIMES:
        served.insist(kind, _runtime(kind, step.params))


def run_start(job: Job[Verify]) -> Facts:
    """The numbers alone, of the file that training through the rounding starts from."""
    llamacpp.activate()
    llamacpp.ensure("library")
    import numpy as np

    from edgeft.llamacpp.decode import Decoder
    from edgeft.parity import evidence, record
    from edgeft.parity.speakers import Gguf

    said = job.inputs["reference"]
    reference, _ = record.read(said.path)
    with Decoder(job.inputs["quantize/gguf"].path / "model.gguf", n_ctx=said.facts["n_ctx"]) as decoder:
        scores = evidence.measure(Gguf(decoder), reference, said.path)
    np.savez(job.out / "scores.npz", **evidence.as_arrays(scores))
    comparisons, kept = reference.compare(scores), reference.retention(scores["domain"])
    domain = comparisons["domain"]
    return {
        "summary": f"before training through the rounding: KLD {domain.kld:.4f}, PPL ratio {domain.ppl_ratio:.4f}",
        "comparisons": {name: c.facts() for name, c in comparisons.items()},
        "retention": kept.facts() if kept else None,
    }


def _over(start: Path, reference: Reference, scores: Mapping[str, Scores]) -> dict[str, dict[str, float]]:
    """What training through the rounding changed, by text: losses of both files and the paired difference's bounds."""
    import numpy as np

    from edgeft.parity import evidence, statistics

    plain, found = evidence.scores_of(dict(np.load(start / "scores.npz"))), {}
    for name, tuned in scores.items():
        counted = reference.texts[name].counted
        moved = statistics.interval(tuned.nll - plain[name].nll, counted)
        found[name] = {
            "start": float(plain[name].nll[counted].mean()), "loss": float(tuned.nll[counted].mean()),
            "change": moved.mean, "low": moved.low, "high": moved.high,
        }  # fmt: skip
    return found


def _floor(
    file: Path, adapter: Path | None, reference: Reference, windows: int, native: Path
) -> dict[str, Any] | None:
    """The noise of this machine's kernels on this file, on the first windows of the domain text. `native` holds this
    machine's own logits of them, and is deleted."""
    from edgeft.llamacpp import kernels

    if not windows:
        return None
    try:
        ids = reference.texts["domain"].ids[:windows]
        return kernels.floor(file, ids, native=native, adapter=adapter).facts()
    finally:
        native.unlink(missing_ok=True)


STAGE = Stage(
    name="verify", params=Verify, run=run, needs=("reference", "quantize/gguf"), takes=("merge", "gguf", "start"),
    makes=("scores.npz",), extra="train", tools=(llamacpp.LIBRARY, llamacpp.SERVER, llamacpp.PORTABLE), version=3,
    ignores=("awq",),
)  # fmt: skip

START = Stage(
    name="start", table="verify", params=Verify, run=run_start, needs=("reference", "quantize/gguf"), makes=("scores.npz",),
    extra="train", tools=(llamacpp.LIBRARY,), when=Where(table="train", key="method", values=("grid-merged",)),
    ignores=("awq",),
)  # fmt: skip
"""What the file that `tune` starts from is worth: the other half of the comparison in the report."""

SERVED = Stage(
    name="verify", kind="served", table="verify", params=Verify, run=run_served, needs=("reference", "quantize/served", "merge"),
    takes=("base",), makes=("scores.npz",), extra="train", check=check_served,
)  # fmt: skip
"""What the folder is worth that another runtime serves."""
