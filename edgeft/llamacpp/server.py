"""The pinned llama-server on one GGUF file, for as long as a block lasts: what it makes of a chat, and what it says."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

from edgeft.errors import DataError
from edgeft.llamacpp.adapter import lora_arguments
from edgeft.llamacpp.build import ensure
from edgeft.tool import Background, background

_LISTENING = re.compile(r"listening on http://([^:\s]+):(\d+)")


class Refused(Exception):
    """The server answered a request with an error; the text is the server's own."""


@dataclass(frozen=True, kw_only=True)
class Server:
    """A server that is up. Its requests raise Refused, with the server's words, when it answers with an error."""

    host: str
    port: int
    program: Background

    @property
    def lines(self) -> list[str]:
        """Its log so far; all of it once the block of `running` has been left."""
        return self.program.lines

    def apply_template(
        self,
        messages: Sequence[Mapping[str, str]],
        *,
        generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] = (),
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt its chat endpoint makes of `messages`; `variables` are what the template sees beside them.

        Without a leading BOS when the vocabulary adds one (common/chat.cpp, common_chat_template_direct_apply_impl).
        """
        body: dict[str, Any] = {"messages": list(messages), "add_generation_prompt": generation_prompt}
        if tools:
            body["tools"] = list(tools)
        if variables:
            body["chat_template_kwargs"] = dict(variables)
        return str(self._ask("POST", "/apply-template", body)["prompt"])

    def tokenize(self, prompt: str) -> list[int]:
        """The ids its chat endpoint decodes for a prompt: special tokens are read and added (server-context.cpp,
        handle_completions_impl)."""
        body = {"content": prompt, "add_special": True, "parse_special": True}
        return [int(i) for i in self._ask("POST", "/tokenize", body)["tokens"]]

    def count_tokens(self, messages: Sequence[Mapping[str, str]]) -> int:
        """How many tokens its chat endpoint itself counts for `messages`."""
        body = {"messages": list(messages)}
        return int(self._ask("POST", "/v1/chat/completions/input_tokens", body)["input_tokens"])

    def properties(self) -> dict[str, Any]:
        """What it says of itself: `chat_template`, `bos_token`, `eos_token` and more."""
        return self._ask("GET", "/props")

    def _ask(self, method: str, path: str, body: object = None) -> dict[str, Any]:
        connection = HTTPConnection(self.host, self.port, timeout=120)  # never through a proxy
        try:
            connection.request(
                method, path, json.dumps(body) if body else None, {"Content-Type": "application/json"}
            )
            answer = connection.getresponse()
            said = answer.read().decode(errors="replace")
        except OSError as error:
            raise self.program.failure(f"did not answer {path} ({error})") from None
        finally:
            connection.close()
        if answer.status != 200:
            raise Refused(_message(said))
        found: dict[str, Any] = json.loads(said)
        return found


@contextmanager
def running(gguf: Path, arguments: Sequence[str], *, timeout_s: float = 600) -> Iterator[Server]:
    """The server on `gguf` with `arguments` (edgeft.bundle.server_arguments; port 0 takes a free one), once it is up.

    An adapter that belongs to `gguf` (`adapter_beside`) is run with it. Variables of this machine that set llama.cpp's
    options (LLAMA_ARG_…) do not reach it. Raises DataError when the file does not exist or its adapter is for another
    base, ToolError with its last lines when it ends or is not up after `timeout_s`.
    """
    if not gguf.is_file():
        raise DataError(f"{gguf} does not exist")
    program = ensure("server") / "llama-server"
    env = {k: v for k, v in os.environ.items() if not k.startswith(("LLAMA_", "AIP_"))}
    command = [os.fspath(program), "--model", os.fspath(gguf), *lora_arguments(gguf), *arguments]
    with background(command, env=env) as started:
        host, port = _address(started, time.monotonic() + timeout_s)
        yield Server(host=host, port=port, program=started)


def _address(started: Background, deadline: float) -> tuple[str, int]:
    """Where it listens, which it says when the model is loaded (server.cpp)."""
    read = 0
    while time.monotonic() < deadline:
        alive = started.running
        for line in started.lines[read:]:
            read += 1
            if found := _LISTENING.search(line):
                return found[1], int(found[2])
        if not alive:
            raise started.failure(f"exited with {started.process.returncode}")
        time.sleep(0.02)
    raise started.failure("was not up in time")


def _message(said: str) -> str:
    try:
        return str(json.loads(said)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return said
