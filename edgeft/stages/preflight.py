"""Can this base be converted at all, and faithfully? Asked before the training, not after it.

The base, or for a large one its first layers, goes through the pinned converter; token ids, template and float32
logits of the file are compared with the checkpoint's.
"""

from __future__ import annotations

import logging
from pathlib import Path

from edgeft import estimates, llamacpp
from edgeft.errors import StageError
from edgeft.stage import Facts, Job, Params, Stage

log = logging.getLogger(__name__)


class Preflight(Params):
    layers: int = 4
    """How many layers of a base above 0.6 B parameters are tried."""


def run(job: Job[Preflight]) -> Facts:
    llamacpp.activate()
    llamacpp.ensure("library")
    from edgeft.checkpoint.truncate import WHOLE_BELOW, truncated
    from edgeft.llamacpp import convert
    from edgeft.parity.checks import exact

    base = job.inputs["base"]
    folder, gguf = base.path / "model", job.out / "base.gguf"
    whole = (base.facts["parameters"] or WHOLE_BELOW) <= WHOLE_BELOW
    if not whole:
        folder = truncated(folder, job.out / "first-layers", job.params.layers)
    convert.to_gguf(folder, gguf, outtype="f32")
    found = exact.compare(folder, gguf)
    _remove(gguf, job.out / "first-layers")
    if found.problems:
        raise StageError(
            "the base does not survive its conversion to GGUF: " + "; ".join(found.problems),
            hint="this architecture or tokenizer is not converted faithfully by the pinned llama.cpp; "
            "choose another base, or move the pin (vendor/README.md)",
        )
    return {
        "summary": f"converts faithfully: KLD {found.kld:.1e} over {found.tokens} tokens, "
        f"{found.texts} texts tokenize alike",
        "whole": whole, "kld": found.kld, "max_kld": found.max_kld, "texts": found.texts, "tokens": found.tokens,
    }  # fmt: skip


def _remove(gguf: Path, folder: Path) -> None:
    gguf.unlink()
    for path in folder.glob("*"):
        path.unlink()
    if folder.exists():
        folder.rmdir()


STAGE = Stage(
    name="preflight",
    params=Preflight,
    run=run,
    needs=("base",),
    extra="train",
    tools=(llamacpp.LIBRARY,),
    estimate=estimates.preflight,
)
