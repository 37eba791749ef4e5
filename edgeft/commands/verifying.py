"""verify: the device step of a built recipe's certificate, here, under emulation, or on a board."""

from __future__ import annotations

import json
import shlex
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeft import boards, console, report
from edgeft.boards import machine as machines
from edgeft.boards.step import LEAST_SCORED
from edgeft.build import Report, Result
from edgeft.commands.building import read
from edgeft.errors import DataError, EdgeftError, ParityError, RecipeError, SetupError, UndecidedError
from edgeft.llamacpp.base_file import cut, read_base
from edgeft.llamacpp.threads import default_threads
from edgeft.parity import board as judging
from edgeft.parity.collected import VERIFIED
from edgeft.plan import plan as make_plan
from edgeft.plan import standing
from edgeft.store import Store, write_atomically

if TYPE_CHECKING:
    from edgeft.boards import Measured, Place, Program
    from edgeft.boards.machine import Machine
    from edgeft.parity.certificate import Certificate, File
    from edgeft.stage import Artifact, Step

EMULATED_WINDOWS = 2
"""Windows of each text under emulation, when not told otherwise: 512 tokens take minutes there."""
NOT_ON_BOARDS = (
    "this folder was scored by its own runtime in the build; boards are asked about GGUF files, in llama.cpp"
)
LEAST_WINDOWS = 2
"""Bounds come from windows that differ."""
TEXTS = ("domain", "general")


@dataclass(frozen=True, kw_only=True)
class Asked:
    """The command's options."""

    on: str
    variant: str = ""
    target: str = ""
    windows: int = 0
    """0: all of them; a few under emulation."""
    threads: int = 0
    folder: str = ""
    keep: bool = False
    ssh_options: tuple[str, ...] = ()


def verify(recipe: Path, store_dir: Path, asked: Asked) -> None:
    """Run the step for each shipped file, write report and certificate, and end with the verdict's exit code.

    Raises EdgeftError when the recipe is not built, SetupError when there is no such place or it cannot run the file.
    """
    tables = read(recipe, asked.target)
    steps = make_plan(*tables)
    store = Store(store_dir)
    name = tables[0].name
    files = shipped(recipe, steps, store, asked.variant)
    device = _device(steps)
    measured: dict[str, Measured] = {}
    with store.building(name), console.watching("verify"), _place(asked) as place:
        there = machines.read(place.shell(machines.LOOK))
        program = _program(place, there, device)
        threads = asked.threads or _threads(place, there, device)
        for variant, made in files.items():
            measured[variant] = _measure(place, there, program, made, threads, asked)
    certificate = _record(measured, steps, store, name, str(recipe))
    _say(measured, certificate, store.root / "reports" / name)
    for variant in _served(steps):
        console.out.print(f"{variant}: {NOT_ON_BOARDS}", markup=False, highlight=False, soft_wrap=True)
    _end([f for variant, f in _by_variant(steps, store, certificate).items() if variant in measured])


def shipped(
    recipe: Path, steps: Sequence[Step], store: Store, variant: str
) -> dict[str, dict[str, Artifact]]:
    """For each shipped file the finished steps behind it. Raises EdgeftError when one is not there."""
    names = list(standing("quantize/gguf", steps))
    if variant in _served(steps):
        raise RecipeError(f"{variant}: {NOT_ON_BOARDS}", hint=f"choose from {', '.join(names) or 'none'}")
    if variant and variant not in names:
        raise RecipeError(
            f"{recipe} makes no file {variant!r}", hint=f"choose from {', '.join(names) or 'none'}"
        )
    found = {}
    for step in steps:
        if step.stage.id != "verify" or variant not in ("", step.variant):
            continue
        sources = {**step.inputs, "verify": step}
        made = {name: artifact for name, one in sources.items() if (artifact := store.get(one))}
        if missing := [name for name in ("reference", "quantize/gguf", "verify") if name not in made]:
            raise EdgeftError(
                f"{step.variant} of {recipe} is not built in {store.root}: no result of {missing[0]!r}",
                hint=f"edgeft build {shlex.quote(str(recipe))}",
            )
        found[step.variant] = made
    if not found:
        folders = [f"{one}: {NOT_ON_BOARDS}" for one in _served(steps)]
        raise RecipeError(
            f"{recipe} makes no GGUF file that could be verified on a board",
            hint=folders[0] if folders else "[[quantize]] makes one",
        )
    return found


@contextmanager
def _place(asked: Asked) -> Iterator[Place]:
    from edgeft.boards.place import here
    from edgeft.boards.ssh import connected

    if asked.on in ("local", "qemu"):
        with here(emulate=asked.on == "qemu") as place:
            yield place
    elif asked.on.startswith("ssh://"):
        with connected(asked.on, options=asked.ssh_options, folder=asked.folder, keep=asked.keep) as reached:
            yield reached
    else:
        raise SetupError(f"--on {asked.on!r} is no place", hint="local, qemu, or ssh://user@board[:port]")


def _device(steps: Sequence[Step]) -> dict[str, Any]:
    """What the target says of its board; empty without a target."""
    found = next((s.params for s in steps if s.stage.name == "device"), None)
    return found.model_dump(mode="json") if found else {}


def _program(place: Place, there: Machine, device: Mapping[str, Any]) -> Program:
    """The program for that machine. A board must be what the target says; this machine and the emulator need not."""
    from edgeft.boards.program import A76, program_for

    if place.where == "local":
        return program_for(there, own=True)
    if place.where == "qemu":
        return program_for(replace(there, machine="aarch64"), A76)
    if device and device["arch"] != there.arch:
        raise SetupError(
            f"that machine is {there.machine}, and the target {device['name']} is {device['arch']}",
            hint="is it the right board? else name its target: --target",
        )
    return program_for(there, device.get("isa", ""))


def _threads(place: Place, there: Machine, device: Mapping[str, Any]) -> int:
    if place.where == "ssh":
        return min(device.get("threads") or there.cores or 1, there.cores or 1)
    return default_threads()


def _measure(
    place: Place, there: Machine, program: Program, made: Mapping[str, Artifact], threads: int, asked: Asked
) -> Measured:
    under_qemu = place.where == "qemu"
    emulated = under_qemu or there.emulated
    windows = asked.windows or (EMULATED_WINDOWS if emulated else 0)
    reference = made["reference"].path
    with tempfile.TemporaryDirectory(prefix=".verify-", dir=reference.parents[1] / "work") as scratch:
        bases = {}
        for text in TEXTS:
            if (whole := reference / f"{text}.kld").is_file():
                bases[text] = _cut(whole, windows, Path(scratch), emulated=emulated)
        return boards.measure(
            place, replace(there, machine="aarch64", processor=f"QEMU, emulated {_core(place)}", features=()) if under_qemu else there,
            program,
            boards.Shipped(
                model=made["quantize/gguf"].path / "model.gguf", bases=bases, text=None if emulated else general_text(),
            ),
            threads=threads,
        )  # fmt: skip


def _core(place: Place) -> str:
    return place.before[-1]


def general_text() -> Path:
    """Plain English that is part of the package: what is decoded for the speed."""
    return Path(judging.__file__).with_name("general.txt")


def _cut(whole: Path, windows: int, folder: Path, *, emulated: bool) -> Path:
    """The base file, or its first windows. Few windows are made more when the stock tool would print nothing of them."""
    base = read_base(whole)
    least = max(LEAST_WINDOWS, -(-LEAST_SCORED // base.scored))
    if windows and emulated:
        windows = max(windows, least)
    if not windows or windows >= len(base.windows):
        return whole
    if windows < least:
        raise DataError(
            f"{windows} windows of {base.n_ctx} tokens are too few: llama-perplexity prints no statistics of them",
            hint=f"--windows {least} or more",
        )
    cut(whole, folder / whole.name, windows)
    return folder / whole.name


def _record(
    measured: Mapping[str, Measured], steps: Sequence[Step], store: Store, name: str, recipe: str
) -> Certificate:
    """Certificate and report with what was measured. Files that were not measured now keep what boards said before."""
    from edgeft.parity import certificate

    folder = store.root / "reports" / name
    try:
        before = certificate.load(json.loads((folder / "certificate.json").read_text(encoding="utf-8"))).files
    except (OSError, ValueError, KeyError, TypeError):
        before = []

    def served(variant: str, file: File, made: Mapping[str, Artifact]) -> File:
        if variant not in measured:
            known = [f for f in before if f.sha256 == file.sha256 and f.served and f.limits == file.limits]
            return known[0] if known else file
        m = measured[variant]
        logs = [judging.Log(name=f"{m.where}-{text}.log", text=log) for text, log in m.logs.items()]
        for log in logs:
            write_atomically(folder / "boards" / variant / log.name, log.text)
        file = replace(file, notes=[*file.notes, *_notes(m)])
        return judging.held_in_build(file, made, logs, windows=m.windows)

    results = tuple(Result(s, a := store.get(s), None, a is not None, 0.0) for s in steps)
    found = report.certify(Report(results), store, name, recipe, served=served)
    assert found, "there are measured files, or there would be nothing to record"
    by_variant = _by_variant(steps, store, found)
    when = datetime.now(UTC).isoformat(timespec="seconds")
    report.add_boards(store, name, [_line(v, m, by_variant[v], when) for v, m in measured.items()])
    return found


def _by_variant(steps: Sequence[Step], store: Store, found: Certificate) -> dict[str, File]:
    """The certificate's files by variant, in its order."""
    variants = [s.variant for s in steps if s.stage.id in VERIFIED and store.get(s)]
    return dict(zip(variants, found.files, strict=True))


def _served(steps: Sequence[Step]) -> list[str]:
    """The variants that another runtime serves."""
    return list(standing("quantize/served", steps))


def _line(variant: str, m: Measured, file: File, when: str) -> dict[str, Any]:
    return {
        **m.facts(), "variant": variant, "file_sha256": file.sha256, "verdict": file.verdict, "when": when,
        "moved": {s.text: s.moved for s in file.served}, "limit": {s.text: s.limit for s in file.served},
    }  # fmt: skip


def _notes(m: Measured) -> list[str]:
    """For the certificate: where it ran, and how."""
    who = m.machine.processor or m.machine.machine
    if m.emulated:
        way = "over ssh and under emulation" if m.where == "ssh" else "under emulation"
        return [
            f'the step "served" was run {way} ({who}), not on a board: its kernels are the board\'s, its speed is not'
        ]
    said = [f"{m.prompt:.1f} tokens/s prompt" if m.prompt else "", f"{m.decode:.1f} tokens/s decoded" if m.decode else "",
            f"{m.peak_decoding / 1e6:,.0f} MB at its peak while decoding" if m.peak_decoding else "",
            f"at most {m.hottest_c:.0f} °C" if m.hottest_c is not None else "", m.throttled]  # fmt: skip
    place = "on this machine" if m.where == "local" else "over ssh"
    return [
        f'the step "served" was run {place} ({who}), {m.threads} threads: {", ".join(filter(None, said))}'
    ]


def _say(measured: Mapping[str, Measured], found: Certificate, folder: Path) -> None:
    from edgeft.parity.page.table import table

    console.out.print(table(found))
    for variant, m in measured.items():
        for note in _notes(m):
            console.out.print(f"{variant}: {note}", markup=False, highlight=False, soft_wrap=True)
    for name in ("report.md", "certificate.html"):
        console.out.print(f"{folder / name}", markup=False, highlight=False, soft_wrap=True)


def _end(files: Sequence[File]) -> None:
    """Raise what the worst verdict's exit code is, with its first reason."""
    for file in files:
        if file.verdict == "FAIL":
            at = f" The step at fault is {file.culprit!r}." if file.culprit else ""
            raise ParityError(f"{file.title} FAILED: {file.because[0]}.{at}", hint="see the certificate")
    for file in files:
        if file.verdict == "UNDECIDED":
            raise UndecidedError(
                f"{file.title} is UNDECIDED: {file.because[0]}",
                hint="more windows decide: --windows, or [reference] windows of the recipe" if file.more_windows
                else "the number is as close to its limit as can be measured",
            )  # fmt: skip
