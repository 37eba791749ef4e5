"""How strongly each weight column is used on the training text: what the quantizer weighs its rounding errors by."""

from __future__ import annotations

from pydantic import Field

from edgeft import llamacpp
from edgeft.stage import Facts, Job, Params, Stage


class Imatrix(Params):
    chunks: int = Field(10, ge=1, le=10_000)
    """Windows of 512 training tokens. A thousand tokens did as well as ten million (llama.cpp,
    tools/perplexity/README.md, Q2_K of Llama-3-8B: KLD 0.337 and 0.332)."""


def run(job: Job[Imatrix]) -> Facts:
    llamacpp.activate()
    llamacpp.ensure("library")
    from edgeft.corpus import load_rows
    from edgeft.llamacpp import imatrix

    size = 512
    ids = [i for row in load_rows(job.inputs["data"].path / "train.jsonl") for i in row.ids]
    size = min(size, len(ids))
    chunks = [ids[i : i + size] for i in range(0, len(ids) - size + 1, size)][: job.params.chunks]
    imatrix.collect(
        job.inputs["gguf"].path / "model.gguf", chunks, job.out / "imatrix.gguf", dataset="train.jsonl"
    )
    return {
        "summary": f"{len(chunks)} windows of {size} training tokens",
        "chunks": len(chunks),
        "tokens": len(chunks) * size,
    }


STAGE = Stage(
    name="imatrix", params=Imatrix, run=run, needs=("data", "gguf"), makes=("imatrix.gguf",), extra="train",
    tools=(llamacpp.LIBRARY,),
)  # fmt: skip
