"""The pinned llama-server: the command that starts it."""

from __future__ import annotations

import os
from pathlib import Path

from edgeft.llamacpp.build import ensure
from edgeft.llamacpp.threads import default_threads


def serve_command(
    model: Path,
    *,
    host: str = "127.0.0.1",
    port: int = 8080,
    context: int,
    threads: int = 0,
    kv_type: str = "f16",
    api_key: str = "",
    alias: str = "",
    ui: Path | None = None,
) -> list[str]:
    """The argv of the pinned llama-server, which is built now if it is not there yet.

    `kv_type` is the type of the KV cache (f16, q8_0, …). Without `api_key` anybody who reaches the port may ask.
    `ui` is a folder of static files to serve as the web page.
    """
    argv = [
        os.fspath(ensure("server") / "llama-server"),
        "--model", os.fspath(model), "--host", host, "--port", str(port), "--ctx-size", str(context),
        "--threads", str(threads or default_threads()), "--parallel", "1", "--jinja",
        "--cache-type-k", kv_type, "--cache-type-v", kv_type,
    ]  # fmt: skip
    if api_key:
        argv += ["--api-key", api_key]
    if alias:
        argv += ["--alias", alias]
    if ui:
        argv += ["--path", os.fspath(ui)]
    return argv
