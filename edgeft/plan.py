"""The whole run, laid out before any of it happens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from edgeft.errors import RecipeError
from edgeft.recipe import Tables
from edgeft.stage import Params, Stage, Step
from edgeft.stages import STAGES


def plan(*files: Tables, upto: str = "", stages: Sequence[Stage[Any]] = STAGES) -> list[Step]:
    """Steps in the order they run. Each one's inputs stand before it.

    `upto` keeps one stage or variant and what it stands on. Raises RecipeError for a variant given twice
    and for an `upto` that names nothing.
    """
    steps: list[Step] = []
    rows = [row for f in files for row in f.rows]
    given = {s.id: p for s, p in rows if not s.listed}
    for stage in stages:
        if stage.when and not stage.when(given):
            continue
        for params in (p for s, p in rows if s is stage or s.id == stage.table):
            steps += _variants(stage, params, steps)
    _refuse_twins(steps)
    _refuse_idle([stage for stage, _ in rows], steps)
    if upto:
        steps = _only(steps, upto)
    return steps


def standing(name: str, steps: Sequence[Step]) -> dict[str, Step]:
    """The steps that stand for a stage at the end of these: its own or what replaces it, by variant."""
    return {variant: step for variant, step in _supply(name, steps).items() if step}


def why(step: Step, manifests: Sequence[Mapping[str, Any]]) -> list[str]:
    """What differs between a step and the newest committed result of its stage and variant.

    One line a difference, such as `params.rank: 16 -> 32`; an upstream change reads `inputs.data changed`.
    An empty list means nothing comparable was ever made.
    """
    same = [m for m in manifests if m["stage"] == step.stage.id]
    same = [m for m in same if m.get("variant", "") == step.variant] or same
    if not same:
        return []
    return _differences(same[0], step.identity)


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    lines = []
    for part in ("variant", "version", "params", "tools", "inputs"):
        before, after = _flat(part, old.get(part)), _flat(part, new.get(part))
        for name in dict.fromkeys([*before, *after]):
            was, now = before.get(name, "unset"), after.get(name, "unset")
            if was != now:
                changed = f"{name} changed" if part == "inputs" else f"{name}: {was} -> {now}"
                lines.append(changed)
    return lines


def _flat(name: str, value: Any) -> dict[str, str]:
    if isinstance(value, Mapping):
        return {k: v for key, inner in value.items() for k, v in _flat(f"{name}.{key}", inner).items()}
    if isinstance(value, list):
        return {k: v for i, inner in enumerate(value) for k, v in _flat(f"{name}[{i}]", inner).items()}
    return {name: str(value)}


def _variants(stage: Stage[Any], params: Params, steps: list[Step]) -> list[Step]:
    """One step for each variant that all of the stage's needs can supply."""
    supply = {name: _supply(name, steps) for name in (*stage.needs, *stage.takes)}
    variants = dict.fromkeys(v for by in supply.values() for v in by if v) or {"": None}
    made = []
    for variant in variants:
        found = {name: by.get(variant, by.get("")) for name, by in supply.items()}
        inputs = {name: step for name, step in found.items() if step}
        if all(name in inputs for name in stage.needs):
            made.append(Step(stage, params, variant or params.label(), inputs))
    return made


def _supply(name: str, steps: Sequence[Step]) -> dict[str, Step | None]:
    """What stands for a stage at the end of `steps`, by variant. None: the variant has nothing that does any more."""
    found: dict[str, Step | None] = {}
    for step in steps:
        if name in (step.stage.name, step.stage.id, *step.stage.replaces):
            found[step.variant] = step
        elif name in step.stage.hides:
            found[step.variant] = None
    return found


def _refuse_twins(steps: list[Step]) -> None:
    seen: set[tuple[str, str]] = set()
    for step in steps:
        # Two stages whose results stand for the same one would hide each other below.
        aliases = step.stage.replaces if step.stage.listed else ()
        for name in ((stage, step.variant) for stage in (step.stage.id, *aliases)):
            if name in seen:
                raise RecipeError(f"[{step.stage.name}] is given twice with the same name {step.variant!r}")
            seen.add(name)


def _refuse_idle(asked: Sequence[Stage[Any]], steps: Sequence[Step]) -> None:
    """A recipe that makes variants, and a target whose exports pack none of them."""
    exports = [stage for stage in asked if stage.per_target and stage.needs]
    made = [step for step in steps if step.stage.listed]
    if exports and made and not any(step.stage in exports for step in steps):
        kinds = " and ".join(dict.fromkeys(f'kind = "{stage.kind}"' for stage in exports))
        raise RecipeError(
            f"the target exports with {kinds}, which packs nothing that this recipe makes ({', '.join(s.title for s in made)})",
            hint='kind = "server" packs AWQ and ONNX folders; the other kinds pack GGUF files',
        )


def _only(steps: list[Step], upto: str) -> list[Step]:
    wanted = [s for s in steps if upto in (s.stage.name, s.stage.id, s.variant)]
    if not wanted:
        raise RecipeError(f"this recipe has no stage {upto!r}", hint="see `edgeft plan`")
    keep = {above.key for step in wanted for above in step.above()}
    return [s for s in steps if s.key in keep]
