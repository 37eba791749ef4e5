"""The one loop: take each step from the store, or run it and put it there."""

from __future__ import annotations

import importlib.util
import logging
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from edgeft.errors import EdgeftError, SetupError, StageError, ToolError
from edgeft.isolate import here, isolated
from edgeft.progress import Progress
from edgeft.stage import Artifact, Job, Needs, Step
from edgeft.store import Store
from edgeft.tool import Tool

log = logging.getLogger(__name__)

EXTRAS = {
    "train": (
        "torch", "transformers", "peft", "bitsandbytes", "accelerate", "datasets", "datasketch", "gguf",
        "jinja2", "diskcache", "zstandard", "tensorboard",
    ),
    "onnx": ("onnxruntime_genai", "onnxruntime", "onnx", "onnx_ir", "torch", "transformers", "gguf"),
}  # fmt: skip
"""What must be importable for each optional dependency group. Looked for without importing it."""


@dataclass(frozen=True)
class Result:
    """What became of one step: an artifact, an error, or neither when an input failed."""

    step: Step
    artifact: Artifact | None
    error: EdgeftError | None
    cached: bool
    seconds: float


@dataclass(frozen=True)
class Report:
    """What one build did, step by step, in order."""

    results: tuple[Result, ...]

    @property
    def error(self) -> EdgeftError | None:
        return next((r.error for r in self.results if r.error), None)


class Watch(Protocol):
    """Whoever looks on: the console, or a test."""

    def started(self, step: Step) -> None: ...
    def progressed(self, step: Step, progress: Progress) -> None: ...
    def ended(self, result: Result) -> None: ...


@dataclass
class Silent:
    """Nobody looks on."""

    results: list[Result] = field(default_factory=list)

    def started(self, step: Step) -> None: ...
    def progressed(self, step: Step, progress: Progress) -> None: ...
    def ended(self, result: Result) -> None:
        self.results.append(result)


def build(steps: Sequence[Step], store: Store, watch: Watch | None = None) -> Report:
    """Do every step that can be done. A failed variant never stops its siblings.

    Raises before anything runs what `preflight` finds; a step's own failure is in the report.
    """
    watch = watch or Silent()
    have = survey(steps, store)
    preflight(steps, store, have)
    results: list[Result] = []
    done: dict[str, Artifact] = {}
    for step in steps:
        started = time.monotonic()
        error: EdgeftError | None = None
        artifact = have.get(step.key)
        cached = artifact is not None
        if artifact is None and all(source.key in done for source in step.inputs.values()):
            watch.started(step)
            try:
                artifact = _make(step, store, done, watch)
                done[step.key] = artifact
                rest = steps[steps.index(step) + 1 :]
                check(rest, done)
                room([s for s in rest if s.key not in have], done, store.root)
            except EdgeftError as e:
                error = e
        if artifact is not None:
            done[step.key] = artifact
        results.append(Result(step, artifact, error, cached, time.monotonic() - started))
        watch.ended(results[-1])
        if error and artifact is not None:
            break  # what was made shows that a later step cannot be done: better now than after the training
    return Report(tuple(results))


def survey(steps: Sequence[Step], store: Store) -> dict[str, Artifact]:
    """What the store has, by key. What a missing step will read, and what nothing reads on, is hashed."""
    have = {step.key: artifact for step in steps if (artifact := store.get(step))}
    read_on = {source.key for step in steps for source in step.inputs.values()}
    hashed: set[str] = set()
    while True:
        used = {i.key for step in steps if step.key not in have for i in step.inputs.values()}
        todo = [
            s
            for s in steps
            if s.key in have and s.key not in hashed and (s.key in used or s.key not in read_on)
        ]
        if not todo:
            return have
        for step in todo:
            hashed.add(step.key)
            if store.get(step, thorough=True) is None:
                del have[step.key]


def preflight(steps: Sequence[Step], store: Store, have: Mapping[str, Artifact]) -> None:
    """Fail in the first second, not in the sixth hour: packages, tools, targets, disk and memory."""
    missing = [step for step in steps if step.key not in have]
    check(steps, have)
    for step in missing:
        for module in EXTRAS.get(step.stage.extra, ()):
            if importlib.util.find_spec(module) is None:
                raise SetupError(
                    f"{step.title} needs the package {module}",
                    hint=f"pip install 'edgeft[{step.stage.extra}]'",
                )
        for tool in step.stage.tools:
            tool.find()
    room(missing, have, store.root)


def check(steps: Sequence[Step], artifacts: Mapping[str, Artifact]) -> None:
    """Ask every step whether it can be done, given what there is by now."""
    for step in steps:
        if step.stage.check:
            step.stage.check(step, artifacts)


def needs(step: Step, artifacts: Mapping[str, Artifact]) -> Needs:
    """What a step is predicted to take."""
    return step.stage.estimate(step, artifacts) if step.stage.estimate else Needs()


def room(missing: Sequence[Step], have: Mapping[str, Artifact], root: Path) -> None:
    """Raise SetupError when the disk or the memory will not do for what is predicted of the missing steps."""
    import psutil

    wanted = [(step, needs(step, have)) for step in missing]
    disk_mb = sum(n.disk_mb for _, n in wanted)
    place = next(p for p in (root, *root.absolute().parents) if p.exists())
    free_mb = shutil.disk_usage(place).free // 10**6
    if disk_mb > free_mb:
        largest = sorted(wanted, key=lambda w: -w[1].disk_mb)[:3]
        parts = ", ".join(f"{step.title} {n.disk_mb:,} MB" for step, n in largest)
        raise SetupError(
            f"this build will write about {disk_mb:,} MB into {root}, and {free_mb:,} MB are free there ({parts})",
            hint="free some space with `edgeft clean`, or build into another disk with --store DIR",
        )
    ram_mb = psutil.virtual_memory().total // 10**6
    vram_mb = _vram_mb() if any(n.vram_mb for _, n in wanted) else None
    for step, n in wanted:
        if vram_mb is not None and n.vram_mb > vram_mb:
            raise SetupError(
                f"{step.title} will need about {n.vram_mb:,} MB of GPU memory; this GPU has {vram_mb:,} MB",
                hint='use a smaller base, method = "qlora", a smaller batch_size with more accumulation, or shorter rows',
            )
        if n.ram_mb > ram_mb:
            raise SetupError(
                f"{step.title} will need about {n.ram_mb:,} MB of memory; this machine has {ram_mb:,} MB",
                hint="use a smaller base or batch, or a machine with more memory",
            )


def _vram_mb() -> int | None:
    """Memory of the largest NVIDIA GPU, or None where nvidia-smi does not say."""
    try:
        said = Tool(name="nvidia-smi")("--query-gpu=memory.total", "--format=csv,noheader,nounits")
        return max(int(line) for line in said.splitlines()) * 2**20 // 10**6
    except (SetupError, ToolError, ValueError):
        return None


def _make(step: Step, store: Store, done: Mapping[str, Artifact], watch: Watch) -> Artifact:
    inputs = {name: _sound(source, store) for name, source in step.inputs.items()}
    run = isolated if step.stage.extra else here
    log_file = store.root / "logs" / f"{store.path(step).name}.log"
    started = time.monotonic()
    with store.workspace(step) as out:
        if artifact := store.get(step):  # another build made it while this one waited for the lock
            return artifact
        job = Job(step.params, inputs, out)
        try:
            facts = run(step.stage, job, log_file, lambda p: watch.progressed(step, p))
        except EdgeftError:
            raise
        except Exception as e:
            raise StageError(f"{step.title} failed: {type(e).__name__}: {e}", hint=f"see {log_file}") from e
        return store.commit(step, out, facts, time.monotonic() - started)


def _sound(step: Step, store: Store) -> Artifact:
    """An input, hashed before it is used."""
    artifact = store.get(step, thorough=True)
    if artifact is None:
        raise StageError(
            f"{step.title} was damaged in the store while the build ran", hint="run the same command again"
        )
    return artifact
