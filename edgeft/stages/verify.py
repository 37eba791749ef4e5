"""Measure how far a quantized file strays from the trained model. Measuring only: `gate` judges."""

from __future__ import annotations

import json

from edgeft import llamacpp
from edgeft.stage import Facts, Job, Params, Stage


class Verify(Params):
    pass


def run(job: Job[Verify]) -> Facts:
    llamacpp.activate()
    llamacpp.ensure("library")
    import numpy as np

    from edgeft import progress
    from edgeft.llamacpp import score
    from edgeft.llamacpp.decode import Decoder
    from edgeft.parity import statistics

    reference = job.inputs["reference"]
    asked = json.loads((reference.path / "questions.json").read_text(encoding="utf-8"))
    losses = np.load(reference.path / "losses.npz")
    with Decoder(
        job.inputs["quantize/gguf"].path / "model.gguf", n_ctx=max(reference.facts["n_ctx"], 1024)
    ) as decoder:
        found = score.compare(reference.path / "reference.kld", decoder)
        answers = []
        for i, question in enumerate(asked):
            progress.report("answer held-out questions", i, len(asked))
            ids = decoder.generate(question["prompt_ids"], reference.facts["max_answer_tokens"])
            answers.append({**{k: question[k] for k in ("question", "expected", "base", "trained")},
                            "shipped": decoder.detokenize(ids).strip()})  # fmt: skip
    trained = losses["trained"]
    comparison = statistics.compare(trained, found.nll.reshape(trained.shape), found.kld.reshape(trained.shape),
                                    found.same_top.reshape(trained.shape))  # fmt: skip
    kept = statistics.retention(losses["base"], trained, found.nll.reshape(trained.shape), losses["answers"])
    share = f", keeps {kept.retention:.0%} of the gain" if kept.retention is not None else ""
    return {
        "summary": f"KLD {comparison.kld:.4f} (≤ {comparison.kld_bound:.4f}), PPL ratio {comparison.ppl_ratio:.4f}, "
        f"same top {comparison.same_top:.1%}{share}",
        **comparison.facts(), "retention": kept.facts(), "answers": answers,
    }  # fmt: skip


STAGE = Stage(
    name="verify", params=Verify, run=run, needs=("reference", "quantize/gguf"), extra="train",
    tools=(llamacpp.LIBRARY,),
)  # fmt: skip
