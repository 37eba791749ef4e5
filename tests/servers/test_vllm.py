"""vLLM's logits arrive as it computed them, and whatever goes wrong there is one sentence here."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from edgeft.errors import SetupError, StageError, ToolError
from edgeft.servers import available, find, open_vllm
from tests.servers import standin


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    return standin.environment(tmp_path_factory.mktemp("other") / "vllm")


@pytest.fixture
def there(environment, monkeypatch):
    monkeypatch.setenv("EDGEFT_VLLM", str(environment))
    return environment


@pytest.mark.parametrize("runner", ["first", "second"])
def test_the_logits_of_every_position_come_in_order_from_either_model_runner(there, tmp_path, runner):
    (tmp_path / runner).touch()
    with open_vllm(tmp_path, context=8) as session:
        assert session.said == "vLLM 9.9, CPU, float16" and session.n_vocab == standin.VOCABULARY
        rows = session.logits([3, 1, 2])
        assert rows.dtype == np.float32 and rows[:, 0].tolist() == [30, 10, 20] and rows.shape == (3, 7)
        assert session.logits([4]).tolist() == [[40, 41, 42, 43, 44, 45, 46]]
        assert session.generate([1], 9) == ([1, 2, 3], True)
        assert session.generate([1], 2) == ([1, 2], False)
        assert session.detokenize(session.tokenize("naïve €")) == "naïve €"
        log = session.log
    assert not log.exists()


def test_a_folder_that_does_not_load_is_one_sentence_with_the_log(there, tmp_path):
    (tmp_path / "broken").touch()
    with pytest.raises(StageError) as caught:
        open_vllm(tmp_path, context=8, log=tmp_path / "logs" / "vllm.log")
    assert str(caught.value) == f"vLLM cannot load {tmp_path}: this folder is broken"
    assert str(tmp_path / "logs" / "vllm.log") in caught.value.hint
    assert "Traceback" in (tmp_path / "logs" / "vllm.log").read_text()


def test_a_vllm_that_is_killed_while_it_loads_or_answers_is_said(there, tmp_path):
    with open_vllm(tmp_path, context=8, log=tmp_path / "log") as session:
        with pytest.raises(StageError, match="too long"):
            session.logits(range(100, 120))
        assert session.logits([1]).shape == (1, 7)  # a refused question ends nothing
        with pytest.raises(StageError, match="ended with status 3 instead of answering"):
            session.logits([666])
    (tmp_path / "deadly").touch()
    with pytest.raises(StageError, match=r"was killed by SIGKILL \(out of memory"):
        open_vllm(tmp_path, context=8, log=tmp_path / "log")


@pytest.mark.slow
def test_vllm_dies_with_the_process_that_asked_it(there, tmp_path):
    script = f"""
import time
from pathlib import Path
from edgeft.servers import open_vllm
session = open_vllm(Path({str(tmp_path)!r}), context=8, log=Path({str(tmp_path / "log")!r}))
print(session._process.process.pid, flush=True)
time.sleep(60)
"""
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    child = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    for _ in range(100):
        with contextlib.suppress(OSError):
            os.kill(child, 0)
            time.sleep(0.05)
            continue
        return
    os.kill(child, signal.SIGKILL)
    raise AssertionError("it lives on")


def test_it_is_found_as_a_folder_a_python_and_a_program(environment, monkeypatch, tmp_path):
    for named in (environment, environment / "bin" / "python", environment / "bin" / "vllm"):
        monkeypatch.setenv("EDGEFT_VLLM", str(named))
        assert find("vllm").said == "vLLM 9.9"
    monkeypatch.delenv("EDGEFT_VLLM")
    monkeypatch.setenv("PATH", f"{environment / 'bin'}:{os.environ['PATH']}")
    assert find("vllm").python == environment / "bin" / "python"


def test_without_it_there_is_a_sentence_that_says_how_to_get_it(monkeypatch, tmp_path):
    monkeypatch.setenv("EDGEFT_SGLANG", str(tmp_path))
    assert available("sglang") == ""
    with pytest.raises(SetupError, match=f"EDGEFT_SGLANG names {tmp_path}") as caught:
        find("sglang")
    assert "pip install sglang" in caught.value.hint
    with pytest.raises(SetupError, match="does not compute in 'int8'"):
        open_vllm(tmp_path, context=8, dtype="int8")


def test_an_interpreter_that_cannot_run_the_program_is_said(there, tmp_path, monkeypatch):
    from edgeft.servers.find import Found

    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho no such library >&2\nexit 1\n")
    broken.chmod(0o755)
    from edgeft.servers.vllm import Session

    with pytest.raises(ToolError, match="no such library"):
        Session(tmp_path, context=8, server=Found(name="vllm", python=broken, version="1"))


REAL = pytest.mark.skipif(
    not available("vllm"), reason="vLLM is not installed: set EDGEFT_VLLM to its environment"
)


@pytest.fixture(scope="module")
def tiny(tiny_checkpoint, tmp_path_factory):
    """A random model whose heads are as wide as vLLM's CPU attention wants them, with SmolLM2's tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("vllm") / "model"
    config = AutoConfig.from_pretrained(
        tiny_checkpoint, num_attention_heads=2, num_key_value_heads=1, head_dim=32
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.float16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_checkpoint).save_pretrained(folder)
    return folder


def difference(model, ids, logits):
    """The largest KL divergence of any token, from a model in torch to logits."""
    import torch

    with torch.no_grad():
        wanted = torch.log_softmax(model(torch.tensor([ids])).logits[0], -1)
    return float((wanted.exp() * (wanted - torch.log_softmax(torch.from_numpy(logits), -1))).sum(-1).max())


@pytest.mark.slow
@REAL
def test_the_real_vllm_says_what_transformers_says(tiny):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny)
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    messages = [{"role": "user", "content": "What is ½ of 1234?"}]
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = tokenizer.encode(prompt, add_special_tokens=False)
    greedy = model.generate(torch.tensor([ids]), max_new_tokens=8, do_sample=False)[0, len(ids) :].tolist()
    with open_vllm(tiny, context=len(ids) + 8, dtype="float32") as session:
        assert difference(model, ids, session.logits(ids)) < 1e-6
        assert session.logits(ids[:1]).shape == (1, session.n_vocab)
        assert session.tokenize(prompt) == ids and session.render(messages) == prompt
        assert session.detokenize(ids) == prompt
        answer, _ = session.generate(ids, 8)
    assert answer == greedy[: len(answer)]


@pytest.mark.slow
@REAL
@pytest.mark.parametrize("layout", ["compressed-tensors", "gemm"])
def test_the_real_vllm_reads_our_packed_weights_as_we_wrote_them(tiny, tmp_path, layout):
    import torch
    from transformers import AutoModelForCausalLM

    from edgeft import awq
    from edgeft.awq.weights import dequantized

    ids = list(range(100, 164))
    awq.quantize(tiny, tmp_path / "awq", [ids] * 2, awq.Settings(layout=layout, method="nearest"))
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    plain = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    unpacked = {name: tensor.float() for name, tensor in dequantized(tmp_path / "awq").items()}
    model.load_state_dict({**plain, **unpacked})
    model.tie_weights()
    with open_vllm(tmp_path / "awq", context=64) as session:
        assert session.about["quantization"] == ("awq" if layout == "gemm" else layout)
        logits = session.logits(ids)
    apart = difference(model, ids, logits)
    model.load_state_dict(plain)
    assert apart < difference(model, ids, logits) / 100  # the packed weights, and not those before
