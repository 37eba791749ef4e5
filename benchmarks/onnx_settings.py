"""Size and quality of ONNX settings on a finished build: docs/onnx.md's table.

    python benchmarks/onnx_settings.py STORE/done MERGE REFERENCE IMATRIX DATA BASE [NAME ...]

MERGE and so on are folder names of one recipe's results below STORE/done. Each setting is built, scored with GenAI against
the recipe's reference on its own windows, and printed; `builder ...` are what GenAI's model builder makes by itself.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from pathlib import Path

from edgeft import llamacpp
from edgeft.llamacpp import score
from edgeft.onnx.session import Session
from edgeft.parity import evidence, record
from edgeft.stage import Artifact, Job
from edgeft.stages import quantize_onnx

OURS = {
    "default": {},
    "not mixed": {"mixed": False},
    "not mixed, k_quant": {"mixed": False, "algorithm": "k_quant"},
    "not mixed, block 64": {"mixed": False, "block_size": 64},
    "not mixed, block 16": {"mixed": False, "block_size": 16},
    "not mixed, accuracy 1": {"mixed": False, "accuracy_level": 1},
    "awq, block 32": {"algorithm": "awq", "chunks": 16},
    "awq, block 64": {"algorithm": "awq", "chunks": 16, "block_size": 64},
    "cuda": {"provider": "cuda"},
    "dml": {"provider": "dml"},
}
BUILDER = {
    "builder, its defaults": ["shared_embeddings=false"],
    "builder, k_quant": ["algo_config=k_quant"],
    "builder, k_quant_last": ["algo_config=k_quant_last"],
    "builder, k_quant_mixed": ["algo_config=k_quant_mixed"],
}


class Windows:
    """A session, asked for the scored half of a window."""

    def __init__(self, session: Session) -> None:
        self.session, self.n_vocab = session, session.n_vocab

    def logits(self, window):
        return self.session.logits(window)[score.first_scored(len(window)) : -1]


def measured(folder: Path, reference, said: Path) -> dict[str, float]:
    with Session(folder) as session:
        scores = evidence.measure(Windows(session), reference, said)
    found, kept = reference.compare(scores), reference.retention(scores["domain"])
    return {
        "MB": sum(p.stat().st_size for p in folder.iterdir()) / 1e6, "KLD": found["domain"].kld,
        "KLD bound": found["domain"].kld_bound, "general KLD": found["general"].kld,
        "PPL ratio": found["domain"].ppl_ratio, "same top": found["domain"].same_top, "kept": kept.retention,
    }  # fmt: skip


def by_builder(checkpoint: Path, out: Path, options: list[str]) -> None:
    from onnxruntime_genai.models import builder

    given = (None, str(checkpoint), str(out), "int4", "cpu", str(out / "cache"))
    prepared = builder.parse_extra_options(*given, ["hf_token=false", *options])
    builder.create_model(*given, **prepared)


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("done", "merge", "reference", "imatrix", "data", "base"):
        parser.add_argument(name)
    parser.add_argument("names", nargs="*", default=[*OURS, *BUILDER])
    args = parser.parse_args()
    llamacpp.activate()
    done = Path(args.done)
    inputs = {
        name: Artifact(None, "", done / getattr(args, name), {}) for name in ("merge", "imatrix", "data", "base")
    }  # fmt: skip
    reference, _ = record.read(done / args.reference)
    for name in args.names:
        with tempfile.TemporaryDirectory() as aside:
            out, started = Path(aside) / "model", time.monotonic()
            if name in OURS:
                quantize_onnx.run(Job(quantize_onnx.QuantizeOnnx(**OURS[name]), inputs, Path(aside)))
            else:
                by_builder(inputs["merge"].path / "model", out, BUILDER[name])
                shutil.rmtree(out / "cache", ignore_errors=True)
            took = time.monotonic() - started
            row = measured(out, reference, done / args.reference)
            print(json.dumps({"setting": name, **{k: round(v, 4) for k, v in row.items()}, "s": round(took)}))


if __name__ == "__main__":
    main()
