"""What the trained model itself says about held-out and general text: the reference that every shipped file is held to.

The reference is the model as it stood at the end of training, its quantized base with the adapter attached, not a file
that was made from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pydantic import Field

from edgeft import estimates, llamacpp
from edgeft.stage import Artifact, Facts, InputPath, Job, Params, Stage, Where

if TYPE_CHECKING:
    from edgeft.training import Packed


class Reference(Params):
    windows: int = Field(32, ge=2, le=10_000)
    """How many windows of held-out tokens are scored."""
    general_windows: int = Field(16, ge=0, le=10_000)
    """How many windows of general text; 0: none, and nothing is said about drift outside the domain."""
    general: InputPath | None = None
    """A text file to take instead of edgeft's own general text."""
    n_ctx: int = Field(512, ge=32, le=8192, multiple_of=2)
    """Tokens in a window; the second half of each is scored, as llama.cpp does."""
    questions: int = Field(6, ge=0, le=200)
    """How many held-out questions are answered by base, trained and shipped model."""
    answer_tokens: int = Field(96, ge=1, le=2048)
    """Where an answer that does not stop by itself is cut."""


def run(job: Job[Reference]) -> Facts:
    llamacpp.activate()
    llamacpp.ensure("library")
    from transformers import AutoTokenizer

    from edgeft import training
    from edgeft.corpus import load_rows
    from edgeft.parity import record
    from edgeft.parity.reference import losses
    from edgeft.parity.speakers import Torch

    p, base, train = job.params, job.inputs["base"].path / "model", job.inputs["train"]
    rows = load_rows(job.inputs["data"].path / "heldout.jsonl")
    tokenizer = AutoTokenizer.from_pretrained(base)
    texts = record.texts(
        rows, tokenizer, n_ctx=p.n_ctx, windows=p.windows, general=p.general, general_windows=p.general_windows
    )  # fmt: skip
    asked = record.questions(rows[: p.questions])
    method, dtype, packed = train.facts["method"], train.facts["compute_dtype"], _packed(job.inputs)

    def look_at_base(model: Any) -> Any:
        speaker = Torch(model, tokenizer)
        record.answer(speaker, "base", asked, p.answer_tokens)
        return losses(speaker, texts["domain"], doing="score the base")

    if packed:  # What was gained is told against the base as it was, not against what quantizing left of it.
        before = look_at_base(training.load_base(base, method="lora", compute_dtype=dtype))
        _free()
    model = training.load_trained(
        base, train.path / "adapter", method=method, compute_dtype=dtype, packed=packed
    )
    if not packed:
        with model.disable_adapter():
            before = look_at_base(model)
    speaker = Torch(model, tokenizer)
    record.answer(speaker, "trained", asked, p.answer_tokens)
    said = record.write(speaker, texts, job.out, base=before, asked=asked)
    found, counted = record.facts(said, answer_tokens=p.answer_tokens), int(texts["domain"].counted.sum())
    return {
        "title": _title(job.inputs["base"].facts, train.facts, job.inputs.get("quantize/grid")),
        "summary": f"perplexity of held-out answers {found['ppl_base']:.3f} (base) → {found['ppl_trained']:.3f} (trained), "
        f"{counted:,} tokens" + (f"; of general text {found['ppl_general']:.2f}" if p.general_windows else ""),
        **found,
    }  # fmt: skip


def run_tuned(job: Job[Reference]) -> Facts:
    """The same texts and questions, said by the model that training through the rounding left."""
    llamacpp.activate()
    llamacpp.ensure("library")
    from transformers import AutoTokenizer

    from edgeft.grid import model as grid
    from edgeft.parity import record
    from edgeft.parity.speakers import Torch
    from edgeft.training.model import pick_device

    plain, train, file = job.inputs["reference"], job.inputs["train"].facts, job.inputs["quantize/gguf"]
    checkpoint, dtype = job.inputs["merge"].path / "model", train["compute_dtype"]
    # Out of the file: every number of it is one that the last step of training computed with.
    model = grid.load(
        checkpoint, file.path / "model.gguf", job.inputs["gguf"].path / "model.gguf", device=pick_device(), compute_dtype=dtype
    )  # fmt: skip
    before, asked = record.read(plain.path)
    speaker, most = Torch(model, AutoTokenizer.from_pretrained(checkpoint)), job.params.answer_tokens
    record.answer(speaker, "trained", asked, most)
    assert before.base is not None
    said = record.write(speaker, before.texts, job.out, base=before.base, asked=asked)
    found = record.facts(said, answer_tokens=most)
    tuned = f"trained on through the rounding of {file.facts['type']}"
    return {
        "title": f"{_name(job.inputs['base'].facts)} {tuned}, computed in {dtype}",
        "summary": f"perplexity of held-out answers {plain.facts['ppl_trained']:.3f} (before the rounding) → "
        f"{found['ppl_trained']:.3f} ({tuned})",
        **found,
    }


def _packed(inputs: Mapping[str, Artifact]) -> Packed | None:
    from edgeft.training import Packed

    if "quantize/grid" not in inputs:
        return None
    file, plain = (inputs[name].path / "model.gguf" for name in ("quantize/grid", "gguf/base"))
    return Packed(file=file, plain=plain)


def _free() -> None:
    import gc

    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _title(base: Facts, train: Facts, packed: Artifact | None) -> str:
    held = {"qlora": "in NF4", "lora": "in its own precision"}.get(train["method"], "")
    held = f"in {packed.facts['type']}" if packed else held
    return f"{_name(base)} {held} with the trained adapter attached, computed in {train['compute_dtype']}"


def _name(base: Facts) -> str:
    return str(base.get("name") or base.get("architecture") or "the base")


STAGE = Stage(
    name="reference", params=Reference, run=run, needs=("base", "data", "train"), takes=("quantize/grid", "gguf/base"),
    makes=("domain.kld", "reference.npz", "questions.json"), extra="train", tools=(llamacpp.LIBRARY,),
    estimate=estimates.reference, version=2,
)  # fmt: skip

TUNED = Stage(
    name="reference", kind="tuned", table="reference", params=Reference, run=run_tuned,
    needs=("base", "train", "reference", "merge", "gguf", "quantize/gguf"),
    makes=("domain.kld", "reference.npz", "questions.json"), extra="train", tools=(llamacpp.LIBRARY,),
    estimate=estimates.reference, when=Where(table="train", key="method", values=("grid-merged",)), hides=("merge", "gguf"),
)  # fmt: skip
"""What a tuned file is held to. The merged model is on the way to it no more."""
