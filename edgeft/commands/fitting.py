"""fit: which quantization of a model fits which board, with which context, and how fast it would answer there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from edgeft import console
from edgeft.errors import DataError, RecipeError
from edgeft.fit.advice import Advice, Choice, advise
from edgeft.fit.base_shape import base_shape, cached_model
from edgeft.fit.board import Board
from edgeft.fit.memory import OFFERED, Serving
from edgeft.fit.shape import ModelShape, read_config, shape_of
from edgeft.recipe import find_target, load
from edgeft.resources import folder

DEFAULT_CONTEXT = 4096
PREDICTED = (
    "every number here is predicted, none was measured on a board: memory as llama.cpp allocates it, speed from published "
    "tokens a second (docs/targets.md). A speed under emulation says nothing about a board either."
)
ADAPTER = (
    "speeds count an adapter's bytes only; its thin products cost more: rank 16 kept 0.68 of the speed of SmolLM2-135M "
    "(docs/ship-what-you-train.md)"
)


@dataclass(frozen=True, kw_only=True)
class Question:
    """A model with what is known of how it will be served."""

    title: str
    shape: ModelShape
    serving: Serving
    labels: tuple[str, ...] = OFFERED
    adapter_rank: int = 0
    beside: Path = field(default_factory=Path)
    """Where a relative target file is looked for."""


def fit(
    model: str, targets: Sequence[str], *, context: int, kv_type: str, parallel: int, adapter_rank: int, as_json: bool
) -> None:  # fmt: skip
    """Print a table for each target, or all of it as JSON. 0, "" and -1 mean: as the recipe says, else the default.

    Raises DataError or RecipeError for a model, target or type that is not known.
    """
    asked = question(model)
    changes: dict[str, Any] = {"context": context, "kv_type": kv_type, "parallel": parallel}
    serving = replace(asked.serving, **{name: value for name, value in changes.items() if value})
    trained = asked.shape.context_length
    if not context and trained:
        serving = replace(serving, context=min(serving.context, trained))
    if trained and serving.context > trained:
        raise RecipeError(
            f"a context of {serving.context} is longer than the {trained} tokens that {asked.title} was trained for",
            hint=f"--context {trained} or less",
        )
    rank = asked.adapter_rank if adapter_rank < 0 else adapter_rank
    asked = replace(asked, serving=serving, adapter_rank=rank)
    found = [
        advise(asked.shape, board, serving, labels=asked.labels, adapter_rank=rank)
        for board in boards(targets, asked.beside)
    ]
    if as_json:
        console.out.print_json(data=as_data(asked, found), indent=1, ensure_ascii=False)
        return
    say(asked, found)


def question(model: str) -> Question:
    """Find the shape of a checkpoint folder, a config.json, a GGUF file, a recipe's base, or a cached hub model.

    Raises DataError with a hint when nothing of it is on this machine, and whatever reading the file raises.
    """
    path = Path(model).expanduser()
    if path.suffix == ".toml":
        return _recipe(path)
    shape = None
    if path.exists():
        shape = read_config(path) if path.suffix == ".json" else shape_of(path)
    elif (cached := cached_model(model)) is not None:
        shape = shape_of(cached)
    if shape is None:
        if path.is_dir():
            raise DataError(f"{model} holds neither a config.json nor a GGUF file")
        raise DataError(
            f"{model} is neither a file here nor a hub model whose config.json is in the cache",
            hint="give a checkpoint folder, a GGUF file or a recipe, or fetch the sizes first: hf download OWNER/NAME config.json",
        )
    name = path.resolve().parent.name if path.name == "config.json" else path.name
    return Question(title=name or model, shape=shape, serving=Serving(context=DEFAULT_CONTEXT))


def boards(names: Sequence[str], beside: Path) -> list[Board]:
    """The boards of these targets, by name or file; all that ship when none is named. RecipeError for an unknown one."""
    files = [find_target(n, beside) for n in names] or sorted(folder("targets").glob("*.toml"))
    found = []
    for file in files:
        rows = load(file, per_target=True).rows
        params: Any = next(p for s, p in rows if s.name == "device")
        found.append(params.board())
    return found


def say(asked: Question, found: Sequence[Advice]) -> None:
    """One table a board, and below it which quantization to take and why."""
    shape, s = asked.shape, asked.serving
    about = (
        "" if shape.exact else f"; sizes estimated: {shape.architecture or 'this architecture'} is not known"
    )
    with_adapter = f", adapter of rank {asked.adapter_rank}" if asked.adapter_rank else ""
    many = f" for each of {s.parallel} conversations" if s.parallel > 1 else ""
    console.out.print(
        f"[bold]{escape(asked.title)}[/bold]: {shape.parameters / 1e6:,.0f} M parameters{about}; context {s.context}{many}, "
        f"KV cache {s.kv_type}{with_adapter}", highlight=False, soft_wrap=True,
    )  # fmt: skip
    for advice in found:
        console.out.print()
        console.out.print(_table(advice))
        taken = f"take [bold]{advice.take.label}[/bold]: " if advice.take else ""
        console.out.print(f"{taken}{escape(advice.reason)}", highlight=False, soft_wrap=True)
    console.out.print()
    notes = [PREDICTED, *([ADAPTER] if asked.adapter_rank else [])]
    console.out.print(f"[dim]{escape('; '.join(notes))}[/dim]", highlight=False, soft_wrap=True)


def as_data(asked: Question, found: Sequence[Advice]) -> dict[str, Any]:
    """The same as one JSON document; memory in MB of 10^6 bytes, speeds in tokens a second, lowest and highest."""
    return {
        "model": asked.title, "parameters": asked.shape.parameters, "exact": asked.shape.exact,
        "serving": asdict(asked.serving), "adapter_rank": asked.adapter_rank, "predicted": True,
        "targets": [
            {
                "name": a.board.name, "memory": a.board.memory, "available_mb": a.board.available_mb,
                "reading": [round(a.reading.low, 1), round(a.reading.high, 1)] if a.reading else None,
                "take": a.take.label if a.take else None, "reason": a.reason,
                "quantizations": [_choice(c) for c in a.choices],
            }
            for a in found
        ],
    }  # fmt: skip


def _choice(c: Choice) -> dict[str, Any]:
    need = {name: round(value, 1) for name, value in asdict(c.need).items()}
    return {
        "label": c.label, "fits": c.fits, "memory_mb": {**need, "total": round(c.need.total, 1)},
        "longest_context": c.longest, "answering": [round(c.answering.low, 1), round(c.answering.high, 1)],
    }  # fmt: skip


def _table(advice: Advice) -> Table:
    board = advice.board
    reading = advice.reading
    prompt = f", reads a prompt at {_span(reading.low, reading.high)} tokens/s" if reading else ""
    names = ("weights", "repacked", "KV cache", "its copies", "buffers", "server", "adapter", "in all")
    rows = [(c, _sizes(c)) for c in advice.choices]
    used = [i for i in range(len(names)) if any(sizes[i] for _, sizes in rows)]
    table = Table(
        "", "MB", *(names[i] for i in used), "longest context", "tokens/s", box=None, header_style="dim",
        title_justify="left", title_style="",
        title=f"[bold]{escape(board.name)}[/bold]  {board.available_mb:,} MB of {board.memory} for a model{prompt}",
    )  # fmt: skip
    for column in table.columns[2:]:
        column.justify = "right"
    for c, sizes in rows:
        table.add_row(
            "[green]✓[/green]" if c.fits else "[red]✗[/red]", f"[bold]{c.label}[/bold]" if c is advice.take else c.label,
            *(sizes[i] for i in used), f"{c.longest:,}" if c.longest else "-",
            _span(c.answering.low, c.answering.high) if c.fits else "-",
        )  # fmt: skip
    return table


def _sizes(c: Choice) -> tuple[str, ...]:
    """The parts in MB; empty for what is not there."""
    n = c.need
    sizes = (n.weights, n.repacked, n.kv_cache, n.checkpoints, n.compute, n.runtime, n.adapter, n.total)
    return tuple(f"{size:,.0f}" if size >= 0.5 else "" for size in sizes)


def _span(low: float, high: float) -> str:
    digits = 0 if low >= 20 else 1
    one, other = f"{low:,.{digits}f}", f"{high:,.{digits}f}"
    return one if one == other else f"{one}-{other}"


def _recipe(path: Path) -> Question:
    """The base, the serving, the quantizations and, where one ships beside the file, the adapter of a recipe."""
    tables = load(path)
    params: dict[str, Any] = {s.id: p for s, p in tables.rows if not s.listed}
    shape = base_shape(params["base"])
    if shape is None:
        base = params["base"]
        raise DataError(
            f"nothing of the base of {path} ({base.repo or base.package or base.path}) is on this machine yet",
            hint=f"edgeft build {path} --upto base",
        )
    train = params["train"]
    own = [p.type for s, p in tables.rows if s.listed and s.name == "quantize" and hasattr(p, "type")]
    return Question(
        title=tables.name, shape=shape, serving=params["serve"].serving(), beside=path.parent,
        labels=tuple(dict.fromkeys((*OFFERED, *own))),
        adapter_rank=train.rank if train.method == "grid-adapter" else 0,
    )  # fmt: skip
