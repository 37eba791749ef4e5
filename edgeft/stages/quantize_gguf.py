"""Quantize to a GGUF file with llama.cpp, and say what is really in it."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import asdict

from pydantic import Field, field_validator, model_validator

from edgeft import estimates, llamacpp
from edgeft.llamacpp.quantize import NEED_IMATRIX, Fallback
from edgeft.stage import Facts, Job, Params, Stage, Where

log = logging.getLogger(__name__)


class QuantizeGguf(Params):
    type: str
    """A llama.cpp type: Q8_0, Q6_K, Q5_K_M, Q4_K_M, Q4_0, IQ4_XS …"""
    imatrix: bool = True
    """Weigh rounding errors by how the training text uses each column."""
    overrides: dict[str, str] = Field(default_factory=dict)
    """Tensor name patterns (regular expressions) and the type they get: `{ "ffn_down" = "Q6_K" }`."""

    @field_validator("type")
    @classmethod
    def _known(cls, value: str) -> str:
        if value.upper() not in llamacpp.TYPES:
            raise ValueError(f"{value!r} is no llama.cpp type; choose from {', '.join(llamacpp.TYPES)}")
        return value.upper()

    @model_validator(mode="after")
    def _guided(self) -> QuantizeGguf:
        if not self.imatrix and self.type in NEED_IMATRIX:
            raise ValueError(f"{self.type} is unusable without an importance matrix: leave imatrix = true")
        return self

    def label(self) -> str:
        return self.type.lower()


def run(job: Job[QuantizeGguf]) -> Facts:
    llamacpp.activate()
    llamacpp.ensure("library")
    from edgeft.llamacpp import quantize

    p, out = job.params, job.out / "model.gguf"
    matrix = job.inputs["imatrix"].path / "imatrix.gguf" if p.imatrix else None
    fell_back = quantize.quantize(
        job.inputs["gguf"].path / "model.gguf", out, p.type, imatrix=matrix, overrides=dict(p.overrides)
    )
    for (row, wanted, got), names in _grouped(fell_back).items():
        log.warning(
            "%s: %d tensors are %s instead of %s, because their rows of %d numbers do not divide into its blocks",
            p.type, len(names), got, wanted, row,
        )  # fmt: skip
    found = quantize.types_in(out)
    counts = ", ".join(f"{name} ×{n}" for name, n in found.counts.items())
    return {
        "summary": f"{found.file_bytes / 1e6:,.1f} MB, {found.bits_per_weight:.2f} bits per weight: {counts}",
        "type": p.type, "bytes": found.file_bytes, "bits_per_weight": found.bits_per_weight,
        "types": dict(found.counts), "imatrix": p.imatrix, "fallbacks": [asdict(f) for f in fell_back],
    }  # fmt: skip


def _grouped(fell_back: Iterable[Fallback]) -> dict[tuple[int, str, str], list[str]]:
    """Tensor names by (row length, type asked for, type got)."""
    groups: dict[tuple[int, str, str], list[str]] = {}
    for f in fell_back:
        groups.setdefault((f.row, f.wanted, f.got), []).append(f.tensor)
    return groups


STAGE = Stage(
    name="quantize", kind="gguf", params=QuantizeGguf, run=run, needs=("gguf", "imatrix"), makes=("model.gguf",),
    extra="train", listed=True, tools=(llamacpp.LIBRARY,), estimate=estimates.quantized,
    when=Where(table="train", key="method", values=("qlora", "lora", "grid-merged")),
)  # fmt: skip

OF_BASE = Stage(
    name="quantize", kind="grid", table="quantize/gguf", params=QuantizeGguf, run=run, needs=("gguf", "imatrix"),
    makes=("model.gguf",), extra="train", tools=(llamacpp.LIBRARY,), estimate=estimates.quantized,
    when=Where(table="train", key="method", values=("grid-adapter",)),
)  # fmt: skip
"""The same of the base, before training: the file that is trained on, and that ships."""
