"""Which llama-perplexity runs on a machine: always the pinned source's, compiled for the processor."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from edgeft import runtimes
from edgeft.boards.machine import Machine, missing
from edgeft.errors import SetupError
from edgeft.llamacpp import build

A76 = "armv8.2-a+dotprod+fp16"


@dataclass(frozen=True, kw_only=True)
class Program:
    """One file. Unless it is this machine's own, it needs no libraries."""

    path: Path
    name: str
    """What it was compiled for, for people."""
    isa: str
    """The features that it uses, as targets have them; "" for this machine's own."""


def program_for(machine: Machine, isa: str = "", *, own: bool = False) -> Program:
    """The program for a processor. `own`: this machine's, compiled for whatever it has.

    `isa` is the target's; without it, the best that the processor has. Compiles it when it is not there yet. Raises
    SetupError when there is none for it, or when it cannot be compiled here.
    """
    if own:
        path = build.ensure(build.PERPLEXITY.part) / "llama-perplexity"
        return Program(path=path, name="this machine", isa="")
    if not machine.arch:
        raise SetupError(
            f"there is no llama-perplexity for {machine.machine}", hint="arm64 (aarch64) or x86-64 only"
        )
    runtime = runtimes.for_device(machine.arch, isa or best_isa(machine))
    return Program(path=runtime.ensure() / "llama-perplexity", name=runtime.name, isa=runtime.isa)


def best_isa(machine: Machine) -> str:
    """What is surely there: the level that a target would name."""
    levels = (
        ("x86-64-v4", "x86-64-v3", "x86-64-v2") if machine.arch == "amd64" else (A76, "armv8.2-a+dotprod")
    )
    least = "x86-64-v2" if machine.arch == "amd64" else "armv8-a+crc"
    return next((level for level in levels if machine.features and not missing(level, machine)), least)
