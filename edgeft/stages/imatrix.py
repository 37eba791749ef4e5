"""How strongly each weight column is used on the training text: what the quantizer weighs its rounding errors by."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field

from edgeft import llamacpp
from edgeft.corpus.rows import Row
from edgeft.errors import ParityError
from edgeft.stage import Facts, Job, Params, Stage, Where


class Imatrix(Params):
    chunks: int = Field(10, ge=1, le=10_000)
    """Windows of 512 training tokens. A thousand tokens did as well as ten million (llama.cpp,
    tools/perplexity/README.md, Q2_K of Llama-3-8B: KLD 0.337 and 0.332)."""


def run(job: Job[Imatrix]) -> Facts:
    llamacpp.activate()
    llamacpp.ensure("library")
    from edgeft.corpus import load_rows
    from edgeft.llamacpp import imatrix
    from edgeft.parity.checks import calibration

    size, folder = 512, job.inputs["data"].path
    rows = load_rows(folder / "train.jsonl")
    ids = [i for row in rows for i in row.ids]
    size = min(size, len(ids))
    chunks = [ids[i : i + size] for i in range(0, len(ids) - size + 1, size)][: job.params.chunks]
    seen = _said(rows[: _rows_in(rows, len(chunks) * size)])
    check = calibration.overlap(seen, _said(load_rows(folder / "heldout.jsonl")))
    if check.ok is False:
        raise ParityError(
            check.said, hint="hold out other rows: what the quantizer is tuned on cannot also judge it"
        )
    imatrix.collect(
        job.inputs["gguf"].path / "model.gguf", chunks, job.out / "imatrix.gguf", dataset="train.jsonl"
    )
    return {
        "summary": f"{len(chunks)} windows of {size} training tokens",
        "chunks": len(chunks),
        "tokens": len(chunks) * size,
        "checks": [check.facts()],
    }


def _said(rows: Sequence[Row]) -> list[str]:
    """What is said in each conversation."""
    return ["\n".join(m["content"] for m in row.messages) for row in rows]


def _rows_in(rows: Sequence[Row], tokens: int) -> int:
    """How many rows the first `tokens` tokens reach into."""
    total = 0
    for number, row in enumerate(rows):
        if total >= tokens:
            return number
        total += len(row.ids)
    return len(rows)


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
