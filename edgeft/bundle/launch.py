"""How the model in a bundle is started: llama-server's arguments, a run.sh, and a Modelfile for Ollama."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass

CHECKPOINTS = 2
"""Copies of a windowed layer's cache that the server keeps a conversation. Its own default is 32, whatever `--cache-ram`
says: gigabytes with some models. Two are enough to ask the last question again."""
_WITHOUT_TEMPLATE = (
    "#",
    "# This file sets no TEMPLATE. Ollama does not run the Jinja template inside model.gguf: it picks the most",
    "# similar of its own, which may not be the one this model was trained with. Compare",
    "#   ollama show NAME --template",
    '# with tokenizer.chat_template of the GGUF, or send prompts that you rendered yourself with "raw": true.',
    "# llama-server (run.sh) uses the model's own template.",
)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a server on the board is told; settings.json holds the same."""

    name: str
    """What the model is called in the API."""
    context: int
    parallel: int
    kv_type: str
    threads: int
    gpu: bool
    mmap: bool
    prompt_cache_mb: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repeat_penalty: float
    system: str
    host: str
    port: int

    def as_json(self) -> bytes:
        return (json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n").encode()


def server_arguments(s: Settings, *, address: bool = True) -> list[str]:
    """llama-server's options for these settings, without the model's path (names of the pinned llama.cpp).
    `address`: with host and port; whoever gives them in another way leaves them out.

    The context is always written out, since the default is the trained length, and the prompt cache too,
    since its default is 8 GiB.
    """
    return [
        "--alias", s.name,
        "--ctx-size", str(s.context * s.parallel), "--parallel", str(s.parallel),
        *(("--cache-type-k", s.kv_type, "--cache-type-v", s.kv_type) if s.kv_type != "f16" else ()),
        "--threads", str(s.threads), "--threads-batch", str(s.threads),
        *(("--gpu-layers", "999") if s.gpu else ()),
        "--load-mode", "mmap" if s.mmap else "none", "--cache-ram", str(s.prompt_cache_mb),
        "--ctx-checkpoints", str(CHECKPOINTS),
        "--temp", _number(s.temperature), "--top-k", str(s.top_k), "--top-p", _number(s.top_p),
        "--min-p", _number(s.min_p), "--repeat-penalty", _number(s.repeat_penalty),
        "--jinja",
        *(("--ui-config", json.dumps({"systemMessage": s.system}, ensure_ascii=False)) if s.system else ()),
        *(("--host", s.host, "--port", str(s.port)) if address else ()),
    ]  # fmt: skip


def run_script(s: Settings, *, llama_cpp: str, adapter: bool = False) -> bytes:
    """A POSIX shell script that starts llama-server on the model beside it; its own arguments come last and win.

    `adapter`: adapter.gguf lies beside the model and is part of it.
    """
    files = '--model "$here/model.gguf"' + (' --lora "$here/adapter.gguf"' if adapter else "")
    lines = [
        "#!/bin/sh",
        f"# Starts llama-server on the model in this folder. Made with llama.cpp {llama_cpp}.",
        "# More options may follow: ./run.sh --port 9000",
        "set -eu",
        'here=$(CDPATH= cd -- "$(dirname -- "$0")" && pwd)',
        'if [ -n "${LLAMA_SERVER:-}" ]; then server=$LLAMA_SERVER',
        'elif [ -x "$here/llama-server" ]; then server=$here/llama-server',
        "elif command -v llama-server >/dev/null 2>&1; then server=llama-server",
        "else",
        '    echo "llama-server was found neither beside this script nor on PATH: see README.txt" >&2',
        "    exit 127",
        "fi",
        f'exec "$server" {files} {shlex.join(server_arguments(s))} "$@"',
    ]
    return ("\n".join(lines) + "\n").encode()


def modelfile(s: Settings, stop: Sequence[str], *, adapter: bool = False, template: str = "") -> bytes:
    """A Modelfile for `ollama create`; `adapter`: with the adapter beside the model.

    Without `template` it has no TEMPLATE: Ollama's templates are Go, the model's is Jinja, and a translation that nobody has
    compared prompt by prompt is worse than none (ollama #8982, #10222). edgeft.export.translate makes one that was.
    """
    lines = [
        "# ollama create NAME -f Modelfile",
        *((f"TEMPLATE {_quoted(template)}",) if template else _WITHOUT_TEMPLATE),
        "FROM ./model.gguf",
        *(("ADAPTER ./adapter.gguf",) if adapter else ()),
        f"PARAMETER num_ctx {s.context}",
        f"PARAMETER temperature {_number(s.temperature)}",
        f"PARAMETER top_k {s.top_k}",
        f"PARAMETER top_p {_number(s.top_p)}",
        f"PARAMETER min_p {_number(s.min_p)}",
        f"PARAMETER repeat_penalty {_number(s.repeat_penalty)}",
        *(f"PARAMETER stop {_quoted(text)}" for text in dict.fromkeys(stop)),
        *((f"SYSTEM {_quoted(s.system)}",) if s.system else ()),
    ]
    return ("\n".join(lines) + "\n").encode()


def slug(text: str) -> str:
    """A name that needs no quoting anywhere: lower case, digits, points and dashes."""
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-.") or "model"


def _quoted(text: str) -> str:
    """Ollama reads a value between three quotation marks as it stands, line ends included; it has no escapes."""
    return f'"""{text}"""' if '"' in text or "\n" in text else f'"{text}"'


def _number(value: float) -> str:
    return f"{value:g}"
