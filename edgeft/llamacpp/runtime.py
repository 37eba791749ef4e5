"""Puts the pinned Python side of llama.cpp (`llama_cpp`, `gguf`) and its library into this process."""

from __future__ import annotations

import importlib
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from edgeft.errors import DataError, SetupError
from edgeft.llamacpp.build import ensure
from edgeft.llamacpp.pin import load
from edgeft.llamacpp.source import python_path

log = logging.getLogger(__name__)

_listeners: list[Callable[[str], None]] = []
"""Who hears what the library says, beside the log."""
_levels = {1: logging.DEBUG, 2: logging.DEBUG, 3: logging.INFO, 4: logging.WARNING}
"""ggml_log_level (ggml.h): debug, info, warning, error. Its warnings are about metadata most of the time."""
_keep: list[object] = []
"""C holds a pointer to the log callback until the process ends."""


def activate() -> None:
    """Make `import gguf` and `import llama_cpp` in this process mean the pinned ones, for every library in it.

    A stage that converts, loads a GGUF through transformers, or decodes calls this before anything else.
    Raises SetupError when another copy of either was imported already.
    """
    folder = python_path()
    for name in ("gguf", "llama_cpp"):
        if name in sys.modules:
            _assert_ours(sys.modules[name], folder)
    if sys.path[0] != os.fspath(folder):
        sys.path.insert(0, os.fspath(folder))
        importlib.invalidate_caches()


def gguf() -> Any:
    """The pinned gguf-py. PyPI's package of the same version number has other contents."""
    activate()
    return _assert_ours(importlib.import_module("gguf"), python_path())


@cache
def native() -> Any:
    """The pinned package `llama_cpp`: llama.h as ctypes functions, and `Llama`; library built if it is not yet.

    Its log goes to logging. Raises SetupError when the bindings or the library are not the pinned ones.
    """
    binaries = ensure("library")
    activate()
    loaded_from = os.environ.get("LLAMA_CPP_LIB_PATH")
    if "llama_cpp" in sys.modules and loaded_from != os.fspath(binaries):
        raise SetupError(f"llama_cpp was imported with the library in {loaded_from}, not {binaries}")
    os.environ["LLAMA_CPP_LIB_PATH"] = os.fspath(binaries)
    package = _assert_ours(importlib.import_module("llama_cpp"), python_path())
    if package.__version__ != load().version:
        raise SetupError(
            f"{package.__file__} is llama-cpp-python {package.__version__}, not {load().version}"
        )
    if (version := package.llama_version().decode()) != load().llama:
        raise SetupError(f"libllama in {binaries} is {version}, not {load().llama}")
    callback = package.llama_log_callback(_hear)
    _keep.append(callback)
    package.llama_log_set(callback, None)
    package.llama_backend_init()
    return package


@cache
def ggml() -> Any:
    """libggml-base of the pinned build as a ctypes library (functions without declared signatures)."""
    import ctypes

    native()
    return ctypes.CDLL(os.fspath(ensure("library") / "libggml-base.so"))


@contextmanager
def listening(watch: Callable[[str], None] = lambda text: None) -> Iterator[list[str]]:
    """Collects what llama.cpp says while the block runs, piece by piece, and passes each piece to `watch`."""
    said: list[str] = []

    def hear(text: str) -> None:
        said.append(text)
        watch(text)

    _listeners.append(hear)
    try:
        yield said
    finally:
        _listeners.remove(hear)


def add_adapter(model: Any, context: Any, adapter: Path, scale: float = 1.0) -> None:
    """Let a context of a loaded model add the adapter's products, `scale` times, in all that it computes from now on.

    The model owns the adapter and frees it with itself (llama.h). Raises DataError with llama.cpp's reason when it is no
    adapter for a model of these names and shapes; whether the weights are the right ones is adapter.check_base's question.
    """
    import ctypes

    c = native()
    with listening() as said:
        loaded = c.llama_adapter_lora_init(model, os.fsencode(adapter))
        adapters, scales = (c.llama_adapter_lora_p_ctypes * 1)(loaded), (ctypes.c_float * 1)(scale)
        if not loaded or c.llama_set_adapters_lora(context, adapters, 1, scales):
            raise DataError(f"llama.cpp cannot load the adapter {adapter}: {complaint(said)}")


def complaint(lines: list[str]) -> str:
    """The last thing llama.cpp said that looks like a reason."""
    text = [line for line in "".join(lines).splitlines() if line.strip(" =")]
    errors = [line for line in text if "error" in line.lower() or "fail" in line.lower()]
    return (errors or text or ["llama.cpp gave no reason"])[-1].strip()


def _hear(level: int, text: bytes, user: object) -> None:
    words = text.decode(errors="replace")
    for listener in _listeners:
        listener(words)
    if words.strip():
        log.log(_levels.get(level, logging.DEBUG), "%s", words.rstrip())


def _assert_ours(module: Any, folder: Path) -> Any:
    where = Path(module.__file__ or "")
    if where.parent.parent.resolve() not in (
        folder.resolve(),
        *(p.resolve().parent for p in folder.iterdir()),
    ):
        raise SetupError(
            f"{module.__name__} was imported from {where}, not from the pinned llama.cpp in {folder}",
            hint="call edgeft.llamacpp.runtime.activate() before anything imports it",
        )
    return module
