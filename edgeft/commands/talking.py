"""chat and serve: a built model, found through its recipe or named as a file."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.markup import escape

from edgeft import console
from edgeft.bundle.launch import slug
from edgeft.commands.building import read
from edgeft.errors import EdgeftError, RecipeError, SetupError
from edgeft.plan import plan as make_plan
from edgeft.plan import standing
from edgeft.stage import Step
from edgeft.stages.serve import Serve
from edgeft.store import Store


@dataclass(frozen=True)
class Found:
    """A model file or folder, what it is called, and the settings it is served with."""

    path: Path
    name: str
    settings: Serve
    format: str = "gguf"
    """`gguf`, or of a folder `awq` or `onnx`."""


def chat(model: Path, question: str, variant: str, store_dir: Path, threads: int, max_tokens: int) -> None:
    """Answer one question, or hold a conversation until an empty line or Ctrl-D."""
    found = find(model, variant, Store(store_dir))
    with console.watching("loading the model"):
        opened: Any = _open_file(found, threads) if found.format == "gguf" else _open_folder(found)
    with opened as talk:
        if question:
            _answer(talk, question, max_tokens)
            return
        console.out.print("[dim]an empty line ends the conversation[/dim]")
        while line := _read():
            _answer(talk, line, max_tokens)


def serve(
    model: Path, variant: str, store_dir: Path, threads: int, host: str, port: int, api_key: str, *, web: bool
) -> None:
    """Replace this process by the server that the built model is for: the pinned llama-server, vLLM or SGLang."""
    if host not in ("127.0.0.1", "localhost", "::1") and not api_key:
        raise SetupError(
            f"a server on {host} would answer anybody in the network",
            hint="give --api-key, or listen on 127.0.0.1",
        )
    found = find(model, variant, Store(store_dir))
    if found.format != "gguf":
        command, environment = folder_command(found, host, port, api_key)
        console.out.print(f"http://{host}:{port}  OpenAI API under /v1; Ctrl-C stops it", highlight=False)
        os.execve(command[0], command, environment)
    command = serve_command(found, threads, host, port, api_key, web=web)
    page = "web chat and " if "--path" in command else ""
    console.out.print(f"http://{host}:{port}  {page}OpenAI API under /v1; Ctrl-C stops it", highlight=False)
    if not page:
        console.out.print("[dim]--web adds llama-server's web chat (built once, needs npm)[/dim]")
    os.execv(command[0], command)


def serve_command(found: Found, threads: int, host: str, port: int, api_key: str, *, web: bool) -> list[str]:
    """The pinned llama-server's command line; the server, and with `web` its page, are built now if need be."""
    from edgeft.bundle import Settings, server_arguments
    from edgeft.llamacpp import ensure
    from edgeft.llamacpp.adapter import lora_arguments
    from edgeft.llamacpp.threads import default_threads
    from edgeft.llamacpp.web import built_web, ensure_web

    with console.watching("llama-server"):
        server = ensure("server") / "llama-server"
        page = ensure_web() if web else built_web()
    given = {
        name: getattr(found.settings, name)
        for name in Serve.model_fields
        if name in Settings.__dataclass_fields__
    }
    settings = Settings(
        **{**given, "host": host, "port": port},
        name=found.name,
        threads=threads or default_threads(),
        gpu=False,
    )
    return [
        os.fspath(server), "--model", os.fspath(found.path), *lora_arguments(found.path), *server_arguments(settings),
        *(("--path", os.fspath(page)) if page else ()), *(("--api-key", api_key) if api_key else ()),
    ]  # fmt: skip


def folder_command(found: Found, host: str, port: int, api_key: str) -> tuple[list[str], dict[str, str]]:
    """The command line and the environment of vLLM, or else SGLang, on a folder. Raises SetupError where neither is installed, and
    for ONNX, which ONNX Runtime GenAI runs as a library without a server."""
    from edgeft import servers
    from edgeft.fit import served
    from edgeft.fit.shape import read_config
    from edgeft.servers.launch import Launch, cache_tokens, command

    if found.format == "onnx":
        raise SetupError(
            "ONNX Runtime GenAI is a library without a server of its own",
            hint='`edgeft chat` talks to the model; [[export]] kind = "server" packs it with a program that answers',
        )
    here = servers.installed()
    if not here:
        raise SetupError(
            "neither vLLM nor SGLang is installed to serve an AWQ folder", hint=servers.find_hint("vllm")
        )
    server, s = here[0], found.settings
    tokens = cache_tokens(s.context, s.parallel)
    given = s.model_dump(include=set(Launch.__dataclass_fields__))
    launch = Launch(
        **{**given, "host": host, "port": port}, name=found.name, gpu=_has_gpu(),
        cache_bytes=served.kv_bytes_per_token(read_config(found.path / "config.json"), "awq") * tokens,
    )  # fmt: skip
    argv = command(server.program, server.name, os.fspath(found.path), launch)
    if server.name == "sglang":
        return [*argv, *(("--api-key", api_key) if api_key else ())], servers.clean_environment()
    return argv, servers.clean_environment(**({"VLLM_API_KEY": api_key} if api_key else {}))


def find(model: Path, variant: str, store: Store) -> Found:
    """The file or folder that `model` means: itself, or what the recipe built. Raises EdgeftError when it is not built."""
    if model.is_dir():
        from edgeft.parity.served import format_of

        return Found(model, slug(model.resolve().name), Serve(), format_of(model))
    if model.suffix == ".gguf":
        if not model.is_file():
            raise EdgeftError(f"{model} does not exist")
        return Found(model, model.stem, Serve())
    steps = make_plan(*read(model, ""))
    made = {**standing("quantize/gguf", steps), **standing("quantize/served", steps)}
    files = [step for name, step in made.items() if variant in ("", name)]
    if not files:
        names = ", ".join(made)
        raise RecipeError(f"{model} makes no file {variant!r}", hint=f"choose from {names or 'none'}")
    settings = next((s.params for s in steps if isinstance(s.params, Serve)), Serve())
    for step in files:
        if (artifact := store.get(step)) and _passed(step, steps, store):
            kind = str(artifact.facts.get("format", "gguf"))
            return Found(
                artifact.path / ("model.gguf" if kind == "gguf" else "model"), model.stem, settings, kind
            )
    raise EdgeftError(f"{model} has no finished model in {store.root}", hint=f"edgeft build {model}")


def _passed(step: Step, steps: list[Step], store: Store) -> bool:
    gates = [s for s in steps if s.stage.name == "gate" and s.variant == step.variant]
    return all(store.get(gate) for gate in gates)


def _open_file(found: Found, threads: int) -> Any:
    from edgeft.chat import Chat
    from edgeft.llamacpp.threads import default_threads

    s = found.settings
    return Chat(
        found.path,
        context=s.context,
        threads=threads or default_threads(),
        system=s.system,
        temperature=s.temperature,
    )


def _open_folder(found: Found) -> Any:
    """The folder in the runtime that its certificate is measured with. It gives the most probable answer, whatever the recipe's
    temperature is."""
    from edgeft.chat import FolderChat
    from edgeft.parity.served import open_served

    s = found.settings
    return FolderChat(
        open_served(found.format, found.path, n_ctx=s.context), context=s.context, system=s.system
    )


def _has_gpu() -> bool:
    return Path("/dev/nvidia0").exists()


def _read() -> str:
    try:
        return console.out.input("[bold]> [/bold]").strip()
    except EOFError:
        return ""


def _answer(talk: Any, question: str, max_tokens: int) -> None:
    for piece in talk.ask(question, max_tokens):
        console.out.print(escape(piece), end="", soft_wrap=True, highlight=False)
    console.out.print()
