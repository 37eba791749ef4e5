"""Train on through the rounding of a quantized file: what comes out is the same file with other codes in its blocks.

The file that `quantize` made of the merged weights is where it starts; the rows are those that `train` has left.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict, replace

from pydantic import Field

from edgeft import estimates, llamacpp
from edgeft.errors import RecipeError
from edgeft.grid import formats
from edgeft.llamacpp.tensor_types import main_type
from edgeft.stage import Artifact, Facts, Job, Params, Stage, Step, Where

log = logging.getLogger(__name__)


class Tune(Params):
    rank: int = Field(default=128, ge=1, le=1024)
    """Width of the adapter that is trained through the rounding. It ships in the codes, so it costs nothing there."""
    alpha: float | None = Field(default=None, gt=0)
    """It counts alpha / rank times (with train.rslora, alpha / sqrt(rank)); twice the rank unless given."""
    learning_rate: float | None = Field(default=None, gt=0, lt=1)
    """At its highest; as [train] has it unless given."""
    learn_scales: bool = False
    """Train the blocks' own scales and minima too. It gained nothing where we measured (docs/ship-what-you-train.md)."""


def run(job: Job[Tune]) -> Facts:
    llamacpp.activate()
    llamacpp.ensure("library")
    from edgeft.parity.checks import rendering, tuned_weights
    from edgeft.training import model, rows, tune
    from edgeft.training.settings import Settings

    p, inputs, out = job.params, job.inputs, job.out / "model.gguf"
    checkpoint, start, train = inputs["merge"].path / "model", inputs["quantize/gguf"], inputs["train"]
    every, heldout = (
        rows.read_rows(inputs["data"].path / f"{split}.jsonl") for split in ("train", "heldout")
    )
    rest, device = train.facts["rest"], model.pick_device()
    whole = Settings(**{**rest["settings"], "device": device})
    seen = rows.order(every, total=rest["rows"], batch=whole.batch_size, seed=whole.seed)
    left = [every[n] for n in seen[rest["seen"] :]]
    outcome = tune.tune(
        checkpoint=checkpoint, plain=inputs["gguf"].path / "model.gguf", file=start.path / "model.gguf",
        rows=left, heldout=heldout,
        settings=replace(whole, epochs=1.0, max_steps=0, learning_rate=p.learning_rate or whole.learning_rate),
        options=tune.TuneOptions(
            rank=p.rank, alpha=p.alpha or 2 * p.rank, rslora=rest["rslora"], learn_scales=p.learn_scales
        ),
        device=device, compute_dtype=train.facts["compute_dtype"],
        end_of_turn=int(inputs["data"].facts["end_of_turn_id"]), out=job.out,
    )  # fmt: skip
    checks = [
        *tuned_weights.tuned(start.path / "model.gguf", out),
        *rendering.against_checkpoint(checkpoint, out),
    ]
    as_before = ("type", "bytes", "bits_per_weight", "types", "imatrix", "fallbacks")
    return {
        "summary": f"held-out loss {outcome.heldout_loss_base:.3f} (as quantized) → {outcome.heldout_loss:.3f}, "
        f"{outcome.steps} steps through the rounding",
        **{name: start.facts[name] for name in as_before},
        "training": asdict(outcome),
        "checks": [c.facts() for c in checks],
    }


def check(step: Step, done: Mapping[str, Artifact]) -> None:
    """Refuse a type whose blocks cannot be trained through, where the model has rows that would get it."""
    quantize = step.find("quantize/gguf")
    if quantize is None:
        return
    label: str = quantize.params.type  # type: ignore[attr-defined]
    kind = main_type(label)
    if formats.of(kind).rounding is not None:
        return
    shape = estimates.shape_for(step, done)
    if shape is not None and not any(p.type == kind for p in estimates.placed(shape, label)):
        return  # every row of this model is too short for it, and falls back to a type that can
    able = [name for name in llamacpp.TYPES if formats.of(main_type(name)).rounding is not None]
    raise RecipeError(
        f'quantize.type = "{label}" cannot be trained through with train.method = "grid-merged": '
        + _why_not(kind),
        hint=f"choose from {', '.join(able)}",
    )


def _why_not(kind: str) -> str:
    if kind in ("F32", "F16", "BF16"):
        return "its weights have no grid to be rounded to"
    return (
        f"{kind} picks its weights from a codebook, several at once, and has no levels to round one weight to"
    )


STAGE = Stage(
    name="tune", params=Tune, run=run, needs=("data", "train", "merge", "gguf", "quantize/gguf"),
    makes=("model.gguf", "curve.jsonl"), extra="train", resumable=True,
    tools=(llamacpp.LIBRARY, llamacpp.SERVER), check=check, estimate=estimates.tune,
    when=Where(table="train", key="method", values=("grid-merged",)), replaces=("quantize/gguf",),
)  # fmt: skip
