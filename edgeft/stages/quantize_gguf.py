"""Quantize to a GGUF file with llama.cpp, and say what is really in it."""

from __future__ import annotations

from pydantic import Field, field_validator

from edgeft import estimates, llamacpp
from edgeft.stage import Facts, Job, Params, Stage


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

    def label(self) -> str:
        return self.type.lower()


def run(job: Job[QuantizeGguf]) -> Facts:
    llamacpp.activate()
    llamacpp.ensure("library")
    from edgeft.llamacpp import quantize

    p, out = job.params, job.out / "model.gguf"
    matrix = job.inputs["imatrix"].path / "imatrix.gguf" if p.imatrix else None
    quantize.quantize(
        job.inputs["gguf"].path / "model.gguf", out, p.type, imatrix=matrix, overrides=dict(p.overrides)
    )
    found = quantize.types_in(out)
    counts = ", ".join(f"{name} ×{n}" for name, n in found.counts.items())
    return {
        "summary": f"{found.file_bytes / 1e6:,.1f} MB, {found.bits_per_weight:.2f} bits per weight: {counts}",
        "type": p.type, "bytes": found.file_bytes, "bits_per_weight": found.bits_per_weight,
        "types": dict(found.counts), "imatrix": p.imatrix,
    }  # fmt: skip


STAGE = Stage(
    name="quantize", kind="gguf", params=QuantizeGguf, run=run, needs=("gguf", "imatrix"), makes=("model.gguf",),
    extra="train", listed=True, tools=(llamacpp.LIBRARY,), estimate=estimates.quantized,
)  # fmt: skip
