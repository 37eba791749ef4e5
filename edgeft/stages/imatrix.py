"""How strongly each weight column is used on the training text: what the quantizer weighs its rounding errors by."""

from __future__ import annotations

from pydantic import Field

from edgeft import llamacpp
from edgeft.stage import Facts, Job, Params, Stage, Where


class Imatrix(Params):
    chunks: int = Field(10, ge=1, le=10_000)
    """Windows of 512 training tokens. A thousand tokens did as well as ten million (llama.cpp,
    tools/perplexity/README.md, Q2_K of Llama-3-8B: KLD 0.337 and 0.332)."""


def run(job: Job[Imatrix]) -> Facts:
    llamacpp.activate()
    llamacpp.ensure("library")
    from edgeft.llamacpp import imatrix
    from edgeft.parity import calibration_text

    chunks, check = calibration_text.training(job.inputs["data"].path, job.params.chunks)
    size = len(chunks[0])
    imatrix.collect(
        job.inputs["gguf"].path / "model.gguf", chunks, job.out / "imatrix.gguf", dataset="train.jsonl"
    )
    return {
        "summary": f"{len(chunks)} windows of {size} training tokens",
        "chunks": len(chunks),
        "tokens": len(chunks) * size,
        "checks": [check.facts()],
    }


STAGE = Stage(
    name="imatrix", params=Imatrix, run=run, needs=("data", "gguf"), makes=("imatrix.gguf",), extra="train",
    tools=(llamacpp.LIBRARY,), version=2,
    when=Where(table="train", key="method", values=("qlora", "lora", "grid-merged")),
)  # fmt: skip

OF_BASE = Stage(
    name="imatrix", kind="base", table="imatrix", params=Imatrix, run=run, needs=("data", "gguf"), makes=("imatrix.gguf",),
    extra="train", tools=(llamacpp.LIBRARY,), when=Where(table="train", key="method", values=("grid-adapter",)),
)  # fmt: skip
"""The same of the base, before training."""
