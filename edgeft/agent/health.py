"""Whether the model answers: a question through llama-server's HTTP API, and what counts as an answer.

An answer is judged by limits, not by its text: other processors and versions of llama.cpp say other words, and a canary
that demands one of several words is the strictest that an owner should ask for.
"""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from edgeft.agent.description import Canary
from edgeft.agent.errors import NoAnswer
from edgeft.agent.places import Address, Settings

QUESTION = Canary(prompt="What is the capital of France? Answer in one sentence.", max_tokens=24)
_LIMIT = 4 << 20
"""Bytes of an answer that are read."""


def ask(
    at: Address,
    settings: Settings,
    *,
    folder: Path,
    canaries: Sequence[Canary] = (),
    failed: Callable[[], bool] = lambda: False,
) -> str:
    """Wait until the server has loaded the model that lies in `folder`, ask, and return its last answer.

    `failed` says that waiting has become useless. Raises NoAnswer with what went wrong.
    """
    _wait(at, settings, folder, failed)
    text = ""
    for canary in canaries or (QUESTION,):
        text = answer(at, canary, settings.answer_seconds)
        if why := fault(text, canary):
            raise NoAnswer(f"it answered {_short(text)} to {_short(canary.prompt)}, which {why}")
    return text


def answer(at: Address, canary: Canary, seconds: float) -> str:
    """One question. Raises NoAnswer."""
    body = {
        "messages": [{"role": "user", "content": canary.prompt}], "max_tokens": canary.max_tokens, "temperature": 0,
        "seed": 0, "cache_prompt": False,
    }  # fmt: skip
    status, found = _call(at, "POST", "/v1/chat/completions", body, seconds=seconds)
    if status != 200:
        raise NoAnswer(f"the server answered a question with HTTP {status}")
    try:
        message = found["choices"][0]["message"]
        # A model that thinks first has not come to its answer after so few tokens.
        return str(message.get("content") or message.get("reasoning_content") or "")
    except (KeyError, IndexError, TypeError, AttributeError):
        raise NoAnswer("the server's answer has another form than llama-server's") from None


def fault(text: str, canary: Canary) -> str:
    """Why a text is no answer; "" if it is one. Broken weights say nothing, one sign without end, or one word."""
    said = "".join(text.split())
    words = text.split()
    if not said:
        return "is empty"
    if not any(c.isalnum() for c in said):
        return "holds no letter and no digit"
    if said.count("\ufffd") * 4 > len(said):
        return "is not text"
    if len(said) >= 12 and len(set(said)) <= 2:
        return "is one sign repeated"
    if len(words) >= 10 and len(set(words)) <= 2:
        return "is one word repeated"
    if canary.contains and not any(word.lower() in text.lower() for word in canary.contains):
        return f"holds none of {', '.join(canary.contains)}"
    return ""


def working(at: Address, *, seconds: float) -> bool:
    """Whether the server is at work on somebody's question, and gets on with it: then it is busy and not dead.

    Looks for that many seconds: a slow board reads hundreds of tokens of a prompt before it counts them.
    """
    before, end = _progress(at), time.monotonic() + seconds
    while before is not None and time.monotonic() < end:
        time.sleep(min(2, seconds / 10))
        if _progress(at) != before:
            return True
    return False


def _progress(at: Address) -> list[Any] | None:
    try:
        status, found = _call(at, "GET", "/slots", seconds=30)
        busy = [slot for slot in found if slot["is_processing"]] if status == 200 else []
        return [
            (s["id"], s.get("id_task"), s.get("n_prompt_tokens_processed"), s.get("next_token")) for s in busy
        ] or None
    except (NoAnswer, KeyError, TypeError):
        return None


def _wait(at: Address, settings: Settings, folder: Path, failed: Callable[[], bool]) -> None:
    end = time.monotonic() + settings.start_seconds
    why, pause = "it does not listen", 0.03
    while True:
        try:
            status, _ = _call(at, "GET", "/health", seconds=5)
            why = f"it says of itself HTTP {status}"
            if status == 200:
                status, found = _call(at, "GET", "/props", seconds=30)
                path = str(found.get("model_path", "")) if status == 200 and isinstance(found, dict) else ""
                if path and Path(path).resolve().parent == folder.resolve():
                    return
                why = f"it serves {path or f'what it does not tell (HTTP {status})'}"
        except NoAnswer as error:
            why = str(error)
        if failed():
            raise NoAnswer("the service failed while it started")
        if time.monotonic() > end:
            raise NoAnswer(
                f"the server was not ready with {folder.name} within {settings.start_seconds:g} s: {why}"
            )
        time.sleep(pause)
        pause = min(2 * pause, 0.5)


def _call(at: Address, method: str, path: str, body: Any = None, *, seconds: float) -> tuple[int, Any]:
    """Status and decoded JSON (None if it is none). Raises NoAnswer when there is no answer at all."""
    connection = http.client.HTTPConnection(at.host, at.port, timeout=seconds)
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {at.key}"} if at.key else {})
    try:
        connection.request(method, path, None if body is None else json.dumps(body), headers)
        response = connection.getresponse()
        content = response.read(_LIMIT)
    except TimeoutError:
        raise NoAnswer(f"the server did not answer within {seconds:g} s") from None
    except (OSError, http.client.HTTPException) as error:
        raise NoAnswer(f"the server cannot be reached at {at.host}:{at.port}: {error}") from None
    finally:
        connection.close()
    try:
        return response.status, json.loads(content)
    except (ValueError, RecursionError):
        return response.status, None


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")
