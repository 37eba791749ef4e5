"""Recipe and target files: TOML in, checked tables out, every mistake named at once."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from edgeft.errors import RecipeError
from edgeft.resources import folder
from edgeft.stage import Params, Stage
from edgeft.stages import STAGES

TOP_LEVEL = {"target": str, "description": str}
"""What a recipe may say outside its tables: the target it is made for, and a sentence on what it is."""


@dataclass(frozen=True)
class Tables:
    """A file's tables, each already bound to the stage it configures."""

    name: str
    path: Path
    rows: tuple[tuple[Stage[Any], Params], ...]
    target: str = ""
    description: str = ""


def load(path: Path, *, per_target: bool = False, stages: Sequence[Stage[Any]] = STAGES) -> Tables:
    """Read a recipe, or with `per_target` a target file. Raises RecipeError listing every mistake in it."""
    document = _read(path)
    planned = [s for s in stages if s.per_target == per_target]
    stages = [s for s in planned if not s.table]
    top, problems = _top_level(document, per_target)
    rows: list[tuple[Stage[Any], Params]] = []
    known = dict.fromkeys(s.name for s in stages)
    for name in document:
        if name not in known:
            problems.append(f"[{name}]: no such table{_guess(name, known)}")
    for name in known:
        for where, table in _tables(name, document.get(name), stages):
            if not isinstance(table, dict):
                problems.append(f"{where}: must be a table, not {table!r}")
                continue
            try:
                stage = _pick(stages, name, table, where)
                rows.append((stage, _check(stage, table, where, path.parent)))
            except RecipeError as e:
                problems.append(str(e))
    problems = problems or _out_of_place(document, rows, planned)
    if problems:
        raise RecipeError(f"{path} cannot be used:\n" + "\n".join(f"  {p}" for p in problems))
    return Tables(path.stem, path, tuple(rows), **top)


def find_target(name: str, beside: Path) -> Path:
    """The file of a target given by path or by name; `beside` is the folder a relative path starts from.

    Raises RecipeError naming the nearest target, or all of them.
    """
    shipped = {p.stem: p for p in sorted(folder("targets").glob("*.toml"))}
    if name in shipped:
        return shipped[name]
    for path in (Path(name), beside / name):
        if path.suffix == ".toml" and path.is_file():
            return path
    near = _guess(name, shipped)
    raise RecipeError(
        f"there is no target {name!r}{near}",
        hint=f"choose from {', '.join(shipped)}, or give the path of a .toml file",
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        hint = (
            f"edgeft's own recipes are {', '.join(sorted(p.name for p in folder('recipes').glob('*.toml')))}"
        )
        raise RecipeError(f"{path} does not exist", hint=hint) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, IsADirectoryError) as e:
        raise RecipeError(f"{path} is not a TOML file: {e}") from None


def _top_level(document: dict[str, Any], per_target: bool) -> tuple[dict[str, str], list[str]]:
    """Take the plain values out of the document; what stays are tables."""
    top, problems = {}, []
    for name in [n for n, v in document.items() if not isinstance(v, dict | list)]:
        value = document.pop(name)
        allowed = ["description"] if per_target else list(TOP_LEVEL)
        if name not in allowed:
            problems.append(f"{name}: no such key at the top of the file{_guess(name, allowed)}")
        elif not isinstance(value, str):
            problems.append(f"{name}: must be a string, not {value!r}")
        else:
            top[name] = value
    return top, problems


def _tables(name: str, value: Any, stages: Sequence[Stage[Any]]) -> list[tuple[str, Any]]:
    """A missing table means its defaults, unless the stage runs only once for each table that is listed."""
    if value is None:
        optional = all(s.listed for s in stages if s.name == name)
        return [] if optional else [(name, {})]
    if isinstance(value, list):
        return [(f"{name}[{i}]", dict(v) if isinstance(v, dict) else v) for i, v in enumerate(value)]
    return [(name, dict(value))]


def _out_of_place(
    document: dict[str, Any], rows: Sequence[tuple[Stage[Any], Params]], stages: Sequence[Stage[Any]]
) -> list[str]:
    """Tables of stages that this recipe does not have, and listed tables that it must have and has not."""
    given = {stage.id: params for stage, params in rows if not stage.listed}
    problems = []
    for name in document:
        conditions = [s.when for s in stages if s.name == name]
        if all(when is not None and not when(given) for when in conditions):
            words = " or ".join(dict.fromkeys(str(when) for when in conditions))
            problems.append(f"[{name}]: this recipe has no such step; it would with {words}")
    for stage, _ in rows:
        conditions = [s.when for s in stages if s is stage or s.table == stage.id]
        if stage.listed and all(when is not None and not when(given) for when in conditions):
            words = " or ".join(dict.fromkeys(str(when) for when in conditions))
            problems.append(
                f"{stage.name} with kind = {stage.kind!r}: this recipe has no such step; it would with {words}"
            )
    for stage, params in rows:
        if (wanted := params.wants_table()) and wanted not in document:
            problems.append(f"{stage.name}: as it is set up it needs a [[{wanted}]] table, and there is none")
    return problems


def _pick(stages: Sequence[Stage[Any]], name: str, table: dict[str, Any], where: str) -> Stage[Any]:
    kinds = {s.kind: s for s in stages if s.name == name}
    kind = table.pop("kind", "") if "" not in kinds else ""
    if kind not in kinds:
        raise RecipeError(f"{where}.kind: {kind or 'missing'}; choose from {', '.join(sorted(kinds))}")
    return kinds[kind]


def _check(stage: Stage[Any], table: dict[str, Any], where: str, base: Path) -> Params:
    try:
        params: Params = stage.params.model_validate(table, context={"base": base})
        return params
    except ValidationError as e:
        lines = [f"{_place(where, x['loc'])}: {_say(x)}{_unknown_key(stage, x)}" for x in e.errors()]
        raise RecipeError("\n  ".join(lines)) from None


def _place(where: str, loc: Iterable[str | int]) -> str:
    return where + "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in loc)


def _say(error: Any) -> str:
    """pydantic's sentence with the offending value; ours for the two that read like a program's."""
    if error["type"] == "extra_forbidden":
        return "there is no such key"
    if error["type"] == "missing":
        return "is required"
    message = str(error["msg"]).removeprefix("Value error, ")
    value = error.get("input")
    shown = (
        f" (it is {value!r})" if isinstance(value, str | int | float) and repr(value) not in message else ""
    )
    return message + shown


def _unknown_key(stage: Stage[Any], error: Any) -> str:
    if error["type"] != "extra_forbidden":
        return ""
    fields = _fields_at(stage.params, error["loc"][:-1])
    return _guess(str(error["loc"][-1]), fields) or f"; choose from {', '.join(sorted(fields))}"


def _fields_at(model: Any, loc: Iterable[str | int]) -> dict[str, Any]:
    """The fields of the model that stands at `loc` inside a table: nested tables have their own."""
    for part in loc:
        if isinstance(part, str) and part in model.model_fields:
            inner = _models_in(model.model_fields[part].annotation)
            if inner:
                model = inner[0]
    return dict(model.model_fields)


def _models_in(annotation: Any) -> list[Any]:
    if isinstance(annotation, type) and issubclass(annotation, Params):
        return [annotation]
    return [m for a in getattr(annotation, "__args__", ()) for m in _models_in(a)]


def _guess(word: str, choices: Iterable[str]) -> str:
    near = difflib.get_close_matches(word, list(choices), 1)
    return f"; did you mean {near[0]!r}?" if near else ""
