"""What a stage is, what it may see, and the key that follows from it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Generic, Protocol, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, PlainSerializer, ValidationInfo

Facts = dict[str, Any]
"""Small JSON-ready findings a stage returns: a loss, a size, a verdict."""


def digest(path: Path) -> str:
    """The sha256 of a file, or of every file below a directory with its relative name."""
    if path.is_file():
        with path.open("rb") as f:
            return hashlib.file_digest(f, "sha256").hexdigest()
    names = sorted(p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file())
    whole = hashlib.sha256()
    for name in names:
        whole.update(f"{name}\0{digest(path / name)}\n".encode())
    return whole.hexdigest()


def _beside_the_recipe(path: Path, info: ValidationInfo) -> Path:
    path = (info.context or {}).get("base", Path()) / path.expanduser()
    if not path.exists():
        raise ValueError(f"{path} does not exist")
    return path


InputPath = Annotated[
    Path, AfterValidator(_beside_the_recipe), PlainSerializer(digest, when_used="json", return_type=str)
]
"""A path in a recipe, relative to the recipe's folder, that stands for its contents: its digest is hashed."""


class Params(BaseModel):
    """One table of a recipe. Everything in it is hashed; what must not be, is not in it."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    def label(self) -> str:
        """Names this variant when a recipe lists the table more than once."""
        return ""

    def wants_table(self) -> str:
        """A table that a recipe must list for these parameters to make sense; "" for none."""
        return ""


P = TypeVar("P", bound=Params)


@dataclass(frozen=True)
class Artifact:
    """A committed result: a directory nobody writes to again."""

    stage: Stage[Any]
    key: str
    path: Path
    facts: Facts


@dataclass(frozen=True)
class Job(Generic[P]):
    """All that a running stage can see. The key covers every field but `out`."""

    params: P
    inputs: Mapping[str, Artifact]
    out: Path


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What a step will take, predicted before it runs. 0 means: nothing to speak of, or not known."""

    disk_mb: int = 0
    """What its result occupies in the store."""
    ram_mb: int = 0
    vram_mb: int = 0


class Requirement(Protocol):
    """A program or library a stage needs: an edgeft.tool.Tool, or a part of llama.cpp."""

    @property
    def name(self) -> str: ...
    @property
    def pin(self) -> str:
        """Its exact version, which enters the key; empty for whatever the machine has."""
        ...

    def find(self) -> str:
        """Where it is or will be; raises SetupError when this machine can neither find nor make it."""
        ...


@dataclass(frozen=True, kw_only=True)
class Where:
    """Which recipes have a stage: those whose `[table]` gives `key` one of `values`."""

    table: str
    key: str
    values: tuple[str, ...]

    def __call__(self, given: Mapping[str, Params]) -> bool:
        """Whether a recipe with these tables, by stage, has it."""
        return getattr(given.get(self.table), self.key, None) in self.values

    def __str__(self) -> str:
        *others, last = (f'"{value}"' for value in self.values)
        return f"{self.table}.{self.key} = " + (f"{', '.join(others)} or {last}" if others else last)


@dataclass(frozen=True, kw_only=True)
class Stage(Generic[P]):
    """One row of the pipeline: plain data and one plain function."""

    name: str
    params: type[P]
    run: Callable[[Job[P]], Facts]
    kind: str = ""
    """Tells alternatives of one name apart: quantize/gguf, quantize/awq."""
    needs: tuple[str, ...] = ()
    """Upstream stages by name, or by name/kind. They must stand earlier in STAGES."""
    takes: tuple[str, ...] = ()
    """Upstream stages whose results are inputs too where the plan has them."""
    replaces: tuple[str, ...] = ()
    """Stages for which this one's result stands from here on: whoever below needs one of them gets this, variant by
    variant, under that name."""
    hides: tuple[str, ...] = ()
    """Stages whose results those below no longer take: they are not on the way to this variant's file any more."""
    makes: tuple[str, ...] = ()
    """Files that must exist under `out` when `run` returns."""
    tools: tuple[Requirement, ...] = ()
    """Checked before the build starts; their pins enter the key."""
    extra: str = ""
    """The optional dependency group `run` imports from; such a stage runs in a process of its own."""
    per_target: bool = False
    """Configured by the target file, not by the recipe."""
    resumable: bool = False
    """`out` survives a crash and `run` picks up from it."""
    listed: bool = False
    """Runs once for each `[[name]]` table that the recipe writes, and not at all without one."""
    table: str = ""
    """Has no table of its own: takes its parameters from the tables of that other stage (name, or name/kind)."""
    ignores: tuple[str, ...] = ()
    """Parameters of a table shared with another stage that mean nothing to this one: not in its key."""
    when: Where | None = None
    """Recipes that have this stage at all; None: all of them."""
    check: Callable[[Step, Mapping[str, Artifact]], None] | None = None
    """Refuses the step before anything runs, from its parameters, its inputs' parameters and whatever
    artifacts (by step key) are already there. Raises an EdgeftError."""
    estimate: Callable[[Step, Mapping[str, Artifact]], Needs] | None = None
    """Predicts what the step takes, from the same two."""
    version: int = 1
    """Raise it when the same inputs give a different result."""

    @property
    def id(self) -> str:
        return f"{self.name}/{self.kind}" if self.kind else self.name


@dataclass(frozen=True)
class Step:
    """A stage with its parameters and inputs filled in; not yet run."""

    stage: Stage[Any]
    params: Params
    variant: str = ""
    inputs: Mapping[str, Step] = field(default_factory=dict)

    @property
    def title(self) -> str:
        return f"{self.stage.id} [{self.variant}]" if self.variant else self.stage.id

    @cached_property
    def key(self) -> str:
        """Known before anything runs: it hashes the description, never the results."""
        return hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()[:16]

    @cached_property
    def identity(self) -> Facts:
        """Taken once, so the key and the manifest agree even if a source file changes mid-build."""
        return {
            "stage": self.stage.id,
            "variant": self.variant,
            "version": self.stage.version,
            "params": self.params.model_dump(mode="json", exclude=set(self.stage.ignores)),
            "tools": {t.name: t.pin for t in self.stage.tools if t.pin},
            "inputs": {name: step.key for name, step in self.inputs.items()},
        }

    def above(self) -> Iterator[Step]:
        """This step and everything it stands on, nearest first, each once."""
        seen: dict[str, None] = {}
        queue: list[Step] = [self]
        while queue:
            step = queue.pop(0)
            if step.key not in seen:
                seen[step.key] = None
                yield step
                queue += step.inputs.values()

    def find(self, name: str) -> Step | None:
        """The nearest step above (or this one) of the stage called `name`, by name or by name/kind, or of one that
        takes its parameters from that stage's tables."""
        return next((s for s in self.above() if name in (s.stage.name, s.stage.id, s.stage.table)), None)
