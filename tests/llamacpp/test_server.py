from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from edgeft.errors import DataError, SetupError, ToolError
from edgeft.tool import background
from tests.conftest import PYTHONPATH

ARGUMENTS = [
    "--ctx-size", "256", "--parallel", "1", "--threads", "1", "--threads-batch", "1", "--jinja", "--host", "127.0.0.1",
    "--port", "0",
]  # fmt: skip
SLEEP = [sys.executable, "-c", "import time; print('up', flush=True); time.sleep(60)"]


def test_a_program_runs_while_the_block_lasts_and_its_words_are_kept():
    with background([sys.executable, "-c", "print('one'); print('two')"]) as program:
        program.process.wait(30)
    assert program.lines == ["one\n", "two\n"] and not program.running
    with pytest.raises(ZeroDivisionError), background(SLEEP) as program:
        assert program.running
        raise ZeroDivisionError
    assert not program.running
    with pytest.raises(SetupError, match="nowhere/program is not installed"), background(["nowhere/program"]):
        pass


def test_a_program_that_ends_early_says_its_last_words():
    with background([sys.executable, "-c", "print('no model'); raise SystemExit(3)"]) as program:
        program.process.wait(30)
        error = program.failure("exited with 3")
    assert isinstance(error, ToolError) and str(error).endswith("exited with 3:\nno model\n")


def test_a_program_dies_with_the_process_that_started_it():
    code = (
        "import sys, time\nfrom edgeft.tool import background\n"
        f"with background({SLEEP!r}) as program:\n    print(program.process.pid, flush=True)\n    time.sleep(60)\n"
    )
    env = {**os.environ, "PYTHONPATH": PYTHONPATH}
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=env) as parent:
        child = psutil.Process(int(parent.stdout.readline()))
        parent.send_signal(signal.SIGKILL)
    for _ in range(100):
        if not child.is_running() or child.status() == psutil.STATUS_ZOMBIE:
            break
        time.sleep(0.05)
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE


@pytest.mark.slow
class TestServer:
    def test_it_answers_and_is_gone_afterwards(self, smollm2, library, monkeypatch):
        from edgeft.llamacpp.decode import Decoder
        from edgeft.llamacpp.server import Refused, running

        monkeypatch.setenv("LLAMA_ARG_CHAT_TEMPLATE", "llama2")  # must not reach it
        monkeypatch.setenv("LLAMA_API_KEY", "secret")
        monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
        chat = [{"role": "user", "content": "Grüße, 你好 😀"}]
        with running(smollm2, ARGUMENTS) as server:
            prompt = server.apply_template(chat)
            ids = server.tokenize(prompt)
            assert server.count_tokens(chat) == len(ids)
            assert server.properties()["eos_token"] == "<|im_end|>"
            assert not server.apply_template(chat, generation_prompt=False).endswith("assistant\n")
            with pytest.raises(Refused, match="must contain 'content'"):
                server.apply_template([{"role": "user"}])
        assert prompt.endswith("<|im_start|>user\nGrüße, 你好 😀<|im_end|>\n<|im_start|>assistant\n")
        with Decoder(smollm2, vocab_only=True) as decoder:
            assert decoder.tokenize(prompt, add_special=True, parse_special=True) == ids
        assert not server.program.running and any("model loaded" in line for line in server.lines)

    def test_a_file_it_cannot_load_is_an_error_with_its_words(self, library, tmp_path):
        from edgeft.llamacpp.server import running

        (tmp_path / "no.gguf").write_bytes(b"GGUF")
        with (
            pytest.raises(ToolError, match=r"exited with 1:(.|\n)*failed to load model"),
            running(tmp_path / "no.gguf", ARGUMENTS),
        ):
            pass
        with pytest.raises(DataError, match="does not exist"), running(tmp_path / "none.gguf", ARGUMENTS):
            pass
