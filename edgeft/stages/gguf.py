"""The merged checkpoint as one 16-bit GGUF file, proven to say the same."""

from __future__ import annotations

from typing import Literal

from edgeft import estimates, llamacpp
from edgeft.errors import ParityError
from edgeft.stage import Facts, Job, Params, Stage


class Gguf(Params):
    name: str = ""
    """The model's name inside the file; the recipe's base decides when it is empty."""


def run(job: Job[Gguf]) -> Facts:
    llamacpp.activate()
    llamacpp.ensure("library")
    import numpy as np

    from edgeft.corpus import load_rows
    from edgeft.llamacpp import convert, score
    from edgeft.llamacpp.decode import Decoder
    from edgeft.parity import evidence
    from edgeft.parity.checks import exact, weights

    base, merged, said = job.inputs["base"], job.inputs["merge"], job.inputs["reference"]
    folder, out = merged.path / "model", job.out / "model.gguf"
    outtype: Literal["bf16", "f16"] = "bf16" if merged.facts["dtype"] == "bfloat16" else "f16"
    metadata = {"general.license": base.facts["licence"]} if base.facts["licence"] else {}
    if base.facts.get("add_space_prefix") is not None:
        metadata["tokenizer.ggml.add_space_prefix"] = base.facts["add_space_prefix"]
    name = job.params.name or f"{base.facts.get('name') or base.facts['architecture']} fine-tuned"
    convert.to_gguf(folder, out, outtype=outtype, model_name=name, metadata=metadata)
    rows = load_rows(job.inputs["data"].path / "heldout.jsonl")[:200]
    found = exact.compare(folder, out, [m["content"] for row in rows for m in row.messages])
    checks = [*found.checks, *weights.gguf(folder, out)]
    if wrong := [c.said for c in checks if c.ok is False]:
        raise ParityError(
            "the GGUF file is not the merged model: " + "; ".join(wrong),
            hint="nothing was shipped; please report the architecture and the sentence above",
        )
    with Decoder(out, n_ctx=said.facts["n_ctx"]) as decoder:
        scores = score.compare(said.path / "domain.kld", decoder, doing="follow the GGUF file")
    np.savez(job.out / "scores.npz", **evidence.as_arrays({"domain": scores}))
    return {
        "summary": f"{outtype.upper()}, {out.stat().st_size / 1e6:,.1f} MB; KLD to the merged weights {found.kld:.1e}",
        "type": outtype.upper(), "bytes": out.stat().st_size, "kld": found.kld, "max_kld": found.max_kld,
        "same_top": found.same_top, "texts": found.texts, "conversations": found.conversations,
        "checks": [c.facts() for c in checks],
    }  # fmt: skip


STAGE = Stage(
    name="gguf", params=Gguf, run=run, needs=("base", "data", "merge", "reference"), makes=("model.gguf", "scores.npz"),
    extra="train", tools=(llamacpp.LIBRARY,), estimate=estimates.gguf, version=2,
)  # fmt: skip
