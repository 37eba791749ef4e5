from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import time
import urllib.error
import urllib.request

import pytest

from edgeft.commands.talking import Found, serve_command
from edgeft.llamacpp.decode import Decoder
from edgeft.stages.serve import Serve


@contextlib.contextmanager
def running(argv, log):
    """The server, from healthy until the block ends."""
    url = f"http://{argv[argv.index('--host') + 1]}:{argv[argv.index('--port') + 1]}"
    with log.open("wb") as stream:
        process = subprocess.Popen(argv, stdout=stream, stderr=subprocess.STDOUT)
        try:
            for _ in range(300):
                assert process.poll() is None, log.read_text()
                with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/health", timeout=2):
                    break
                time.sleep(0.2)
            else:
                raise AssertionError(log.read_text())
            yield url
        finally:
            process.terminate()
            process.wait(20)


def post(url, body, key):
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


@pytest.mark.slow
def test_the_pinned_server_answers_over_the_openai_api(library, smollm2, tmp_path):
    """A quantized model's text depends on its kernels: what is compared is the server with our decoder."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    found = Found(smollm2, "medical", Serve(context=512))
    argv = serve_command(found, 1, "127.0.0.1", port, "geheim", web=False)
    chat = {
        "messages": [{"role": "user", "content": "What is the capital of France?"}],
        "temperature": 0,
        "max_tokens": 16,
    }
    with running(argv, tmp_path / "server.log") as url:
        answer = post(f"{url}/v1/chat/completions", chat, "geheim")
        prompt = post(f"{url}/apply-template", chat, "geheim")["prompt"]
        with pytest.raises(urllib.error.HTTPError, match="401"):
            post(f"{url}/v1/chat/completions", chat, "falsch")
    assert answer["model"] == "medical"
    assert prompt.endswith(
        "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    )
    with Decoder(smollm2, n_ctx=512, threads=1) as decoder:
        ids = decoder.tokenize(prompt, add_special=True, parse_special=True)
        ours = decoder.detokenize(decoder.generate(ids, 16), special=False)
    assert answer["usage"]["prompt_tokens"] == len(ids)
    assert answer["choices"][0]["message"]["content"].split()[:2] == ours.split()[:2]
