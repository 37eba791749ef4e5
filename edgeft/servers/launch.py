"""The options under which vLLM and SGLang serve a model folder: what [serve] says, in each server's words.

Names as in vLLM 0.32.0 (entrypoints/launchers/cli_args.py, engine/arg_utils.py) and SGLang 0.5.23 (arg_groups/fields/*.py).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

BLOCK = 128
"""Tokens a block of vLLM's cache has at most (its CPU default; 16 on a GPU)."""
BATCH = 2048
"""Tokens of prompts computed at once: bounds the buffers."""


@dataclass(frozen=True, kw_only=True)
class Launch:
    """How a model folder is served."""

    name: str
    """What the model is called in the API."""
    context: int
    """Tokens of one conversation."""
    parallel: int
    """Conversations served at once."""
    cache_bytes: int
    """Memory for keys and values; see `cache_tokens`."""
    gpu: bool
    host: str
    port: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repeat_penalty: float

    @property
    def sampling(self) -> dict[str, float]:
        """How an answer is drawn where a request does not say, under the names of generation_config.json."""
        return {
            "temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p, "min_p": self.min_p,
            "repetition_penalty": self.repeat_penalty,
        }  # fmt: skip


def cache_tokens(context: int, parallel: int) -> int:
    """Tokens that the cache must hold: every conversation in whole blocks, and a block that vLLM keeps for itself."""
    return (-(-context // BLOCK) * parallel + 1) * BLOCK


def vllm_arguments(launch: Launch, *, address: bool = True) -> list[str]:
    """Options of `vllm serve`, without the folder. The dtype and the quantization follow from the folder's config.json, the
    template from its chat_template.jinja, defaults of sampling from these options.

    The cache is given in bytes: without that, vLLM takes 92 % of a GPU, or most of a machine's memory. On a CPU nothing is
    compiled: that takes minutes and a C++ compiler before the first answer.
    """
    return [
        "--served-model-name", launch.name,
        "--max-model-len", str(launch.context), "--max-num-seqs", str(launch.parallel),
        "--max-num-batched-tokens", str(max(BATCH, launch.parallel)),
        "--kv-cache-memory-bytes", str(launch.cache_bytes),
        "--override-generation-config", json.dumps(launch.sampling),
        *(() if launch.gpu else ("--enforce-eager",)),
        *(("--host", launch.host, "--port", str(launch.port)) if address else ()),
    ]  # fmt: skip


def sglang_arguments(launch: Launch, *, address: bool = True) -> list[str]:
    """Options of `sglang.launch_server`, without the folder. SGLang reads the sampling from generation_config.json and
    has no option that replaces it; `with_sampling` writes it there.

    float16, since its AWQ kernels know nothing else.
    """
    return [
        "--served-model-name", launch.name,
        "--context-length", str(launch.context), "--max-running-requests", str(launch.parallel),
        "--max-total-tokens", str(cache_tokens(launch.context, launch.parallel)),
        "--dtype", "float16", "--sampling-defaults", "model",
        *(() if launch.gpu else ("--device", "cpu")),
        *(("--host", launch.host, "--port", str(launch.port)) if address else ()),
    ]  # fmt: skip


def with_sampling(generation_config: str, launch: Launch) -> bytes:
    """A generation_config.json with the recipe's sampling in it; the tokens that end an answer stay as they are."""
    given = json.loads(generation_config) if generation_config.strip() else {}
    document = {**given, **launch.sampling, "do_sample": launch.temperature > 0}
    return (json.dumps(document, indent=2, sort_keys=True) + "\n").encode()


def command(program: Sequence[str], name: str, folder: str, launch: Launch) -> list[str]:
    """The whole command line for a program found by `find`; name: `vllm` or `sglang`."""
    if name == "vllm":
        return [*program, "--model", folder, *vllm_arguments(launch)]
    return [*program, "--model-path", folder, *sglang_arguments(launch)]
