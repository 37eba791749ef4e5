"""A finished build of a tiny model folder for servers."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest

from edgeft.stage import Artifact, Job
from tests.test_bundle import make_job

_COUNT = itertools.count()
CONFIG = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "vocab_size": 256, "max_position_embeddings": 512,
    "tie_word_embeddings": True, "_name_or_path": "Tiny Model", "quantization_config": {"quant_method": "awq"},
}  # fmt: skip


@pytest.fixture(scope="session")
def served(tmp_path_factory):
    """`served(params, kind="awq", folder=None, **serve)`: a job of the exporter on a folder; a made-up one unless given."""
    root = tmp_path_factory.mktemp("served")
    make = make_job(root)
    folder = root / "made up" / "model"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 7]}')
    (folder / "model.safetensors").write_bytes(bytes(100_000))
    (folder / "tokenizer.json").write_text("{}")

    def of(params, *, kind="awq", source=None, **serve):
        job = make(f"job {next(_COUNT)}")
        inputs = dict(job.inputs)
        (inputs["base"].path / "model" / "config.json").write_text(json.dumps(CONFIG))
        stage = SimpleNamespace(name="quantize", kind=kind, id=f"quantize/{kind}", table="")
        facts = {"type": {"awq": "AWQ g64", "onnx": "ONNX int4"}[kind], "format": kind, "bytes": 100_000}
        inputs["quantize/served"] = Artifact(stage, "aaaa", (source or folder).parent, facts)
        inputs["gate/served"] = inputs["gate"]
        inputs["serve"] = replace(inputs["serve"], facts={**inputs["serve"].facts, **serve})
        for gone in ("quantize/gguf", "gate"):
            del inputs[gone]
        return Job(params, inputs, job.out)

    return of
