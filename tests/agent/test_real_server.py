"""The real llama-server with a real model under the agent: answers are told from broken weights, and what it serves is checked."""

from __future__ import annotations

import re

import pytest

from tests.agent.device import RUN, Device, Keys, update
from tests.conftest import ensure

CANARY = [
    {
        "prompt": "What is the capital of France? Answer in one sentence.",
        "max_tokens": 24,
        "contains": ["Paris"],
    }
]


@pytest.mark.slow
def test_a_real_model_is_updated_and_broken_ones_are_sent_back(smollm2, tmp_path):
    old = smollm2.read_bytes()
    keys, run = Keys(), RUN.replace(b'"$@"', b'--ctx-size 256 --threads 1 --threads-batch 1 --no-warmup "$@"')
    device = Device(root=tmp_path / "device", keys=keys, key="secret", patience=20)
    device.make({"model.gguf": old, "run.sh": run})
    server = device.root / "usr/lib/edgeft/llama-server"
    server.unlink()
    server.symlink_to(ensure("server") / "llama-server")
    device.start()
    try:
        assert "answers" in device.run("health", "tiny").stdout
        new = old[:-1] + bytes([old[-1] ^ 1])  # another file, hardly another model
        broken = {
            1: (
                "the server did not start|was not ready",
                old[: len(old) // 2],
            ),  # signed, and yet no whole GGUF
            2: (
                "which (is|holds)",
                old[: len(old) // 3] + bytes(len(old) - len(old) // 3),
            ),  # weights of zero
            3: ("", new),
        }
        for sequence, (why, content) in broken.items():
            file = update(
                tmp_path / "u", keys, sequence, {"model.gguf": content, "run.sh": run}, canaries=CANARY
            )
            done = device.run("install", file)
            assert done.returncode == (8 if why else 0) and re.search(why, done.stderr), done.stderr
            serving = device.model / f"versions/{0 if why else sequence}/model.gguf"
            assert serving.read_bytes() == (old if why else new) and "Paris" in device.asks()
    finally:
        device.stop()
