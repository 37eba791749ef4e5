"""A checkpoint, merged or the base, as one 16-bit GGUF file, proven to say the same."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from edgeft import estimates, llamacpp
from edgeft.errors import ParityError
from edgeft.stage import Facts, Job, Params, Stage, Where

_OUTTYPES: Mapping[str, Literal["bf16", "f32"]] = {"bfloat16": "bf16", "float32": "f32"}


class Gguf(Params):
    name: str = ""
    """The model's name inside the file; the recipe's base decides when it is empty."""


def run(job: Job[Gguf]) -> Facts:
    merged, said = job.inputs["merge"], job.inputs["reference"]
    facts = _convert(job, merged.path / "model", merged.facts["dtype"], "{} fine-tuned")
    import numpy as np

    from edgeft.llamacpp import score
    from edgeft.llamacpp.decode import Decoder
    from edgeft.parity import evidence

    with Decoder(job.out / "model.gguf", n_ctx=said.facts["n_ctx"]) as decoder:
        scores = score.compare(said.path / "domain.kld", decoder, doing="follow the GGUF file")
    np.savez(job.out / "scores.npz", **evidence.as_arrays({"domain": scores}))
    return facts


def run_base(job: Job[Gguf]) -> Facts:
    folder = job.inputs["base"].path / "model"
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    inner = config.get("text_config") or {}
    said = [part.get(key) for part in (config, inner) for key in ("dtype", "torch_dtype")]
    return _convert(job, folder, next(filter(None, said), "float16"), "{}")


def _convert(job: Job[Gguf], folder: Path, dtype: str, called: str) -> Facts:
    """Write `model.gguf` and compare it with the checkpoint. Raises ParityError when it is not the same model."""
    llamacpp.activate()
    llamacpp.ensure("library")
    from edgeft.corpus import load_rows
    from edgeft.llamacpp import convert
    from edgeft.parity.checks import exact, weights

    base, out = job.inputs["base"], job.out / "model.gguf"
    outtype: Literal["bf16", "f16", "f32"] = _OUTTYPES.get(dtype, "f16")
    metadata = {"general.license": base.facts["licence"]} if base.facts["licence"] else {}
    if base.facts.get("add_space_prefix") is not None:
        metadata["tokenizer.ggml.add_space_prefix"] = base.facts["add_space_prefix"]
    name = job.params.name or called.format(base.facts.get("name") or base.facts["architecture"])
    convert.to_gguf(folder, out, outtype=outtype, model_name=name, metadata=metadata)
    rows = load_rows(job.inputs["data"].path / "heldout.jsonl")[:200]
    found = exact.compare(folder, out, [m["content"] for row in rows for m in row.messages])
    checks = [*found.checks, *weights.gguf(folder, out)]
    if wrong := [c.said for c in checks if c.ok is False]:
        raise ParityError(
            "the GGUF file is not the model it was made of: " + "; ".join(wrong),
            hint="nothing was shipped; please report the architecture and the sentence above",
        )
    return {
        "summary": f"{outtype.upper()}, {out.stat().st_size / 1e6:,.1f} MB; KLD to the weights {found.kld:.1e}",
        "type": outtype.upper(), "bytes": out.stat().st_size, "kld": found.kld, "max_kld": found.max_kld,
        "same_top": found.same_top, "texts": found.texts, "conversations": found.conversations,
        "checks": [c.facts() for c in checks],
    }  # fmt: skip


STAGE = Stage(
    name="gguf", params=Gguf, run=run, needs=("base", "data", "merge", "reference"), makes=("model.gguf", "scores.npz"),
    extra="train", tools=(llamacpp.LIBRARY,), estimate=estimates.gguf, version=2,
    when=Where(table="train", key="method", values=("qlora", "lora", "grid-merged")),
)  # fmt: skip

OF_BASE = Stage(
    name="gguf", kind="base", table="gguf", params=Gguf, run=run_base, needs=("base", "data", "preflight"),
    makes=("model.gguf",), extra="train", tools=(llamacpp.LIBRARY,), estimate=estimates.gguf,
    when=Where(table="train", key="method", values=("grid-adapter",)),
)  # fmt: skip
"""The base's own 16-bit file, from which the one that is trained on is quantized."""
