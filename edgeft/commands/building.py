"""build, plan, show, clean: a recipe, a target and a store."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import typer
from rich.markup import escape
from rich.table import Table

from edgeft import console, report
from edgeft.build import Report as BuildReport
from edgeft.build import build as run_build
from edgeft.build import check, needs
from edgeft.errors import EdgeftError, RecipeError
from edgeft.estimates import glimpse, shape_for
from edgeft.plan import plan as make_plan
from edgeft.plan import why as differences
from edgeft.recipe import Tables, find_target, load
from edgeft.stage import Step
from edgeft.store import Store, write_atomically


def read(recipe: Path, target: str) -> list[Tables]:
    """The recipe's tables, and its target's if it names one."""
    tables = load(recipe)
    name = target or tables.target
    return [tables, load(find_target(name, recipe.parent), per_target=True)] if name else [tables]


def build(recipe: Path, target: str, upto: str, store_dir: Path, *, verbose: bool) -> None:
    """Run what is not yet done, write the report, and end with the model's answer."""
    if verbose:
        _log_to_terminal()
    tables = read(recipe, target)
    steps = make_plan(*tables, upto=upto)
    _look_at_base(steps)
    store = Store(store_dir)
    name = tables[0].name
    console.out.print(f"[bold]{escape(name)}[/bold]" + (f" for {tables[1].name}" if len(tables) > 1 else ""))
    with store.building(name):
        _remember(store, recipe, target, tables)
        try:
            with console.Screen().showing() as screen:
                result = run_build(steps, store, screen)
        except KeyboardInterrupt:
            console.err.print("stopped; the same command goes on from here")
            raise typer.Exit(130) from None
        page = report.write(result, store, name, tables[1].name if len(tables) > 1 else "")
        certificate = report.certify(result, store, name, str(recipe))
    console.say_closing(result)
    if certificate:
        from edgeft.parity.page.table import table

        console.out.print(table(certificate))
    if result.error:
        for name in ("report.md", "certificate.html") if certificate else ("report.md",):
            console.out.print(f"{page.with_name(name)}", markup=False, highlight=False)
        raise result.error
    _say_result(result, recipe, page)


def plan(recipe: Path, target: str, upto: str, store_dir: Path, *, why: bool) -> None:
    """Draw the plan. Runs nothing and writes nothing into the store."""
    steps = make_plan(*read(recipe, target), upto=upto)
    _look_at_base(steps)
    store = Store(store_dir)
    have = {s.key: a for s in steps if (a := store.get(s))}
    table = Table(box=None, header_style="dim")
    for name in ("step", "key", ""):
        table.add_column(name, no_wrap=True)
    for name in ("disk MB", "RAM MB", "VRAM MB"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("tools")
    total = 0
    for step in steps:
        if step.key in have:
            table.add_row(escape(step.title), step.key[:8], "[green]done[/green]", "", "", "", "")
            continue
        n = needs(step, have)
        total += n.disk_mb
        amounts = [f"{x:,}" if x else "" for x in (n.disk_mb, n.ram_mb, n.vram_mb)]
        table.add_row(
            escape(step.title), step.key[:8], "to run", *amounts, ", ".join(t.name for t in step.stage.tools)
        )
    console.out.print(table)
    if todo := len(steps) - len(have):
        console.out.print(
            f"{todo} of {len(steps)} steps to run; about {total:,} MB will be written to {store.root}"
        )
    if steps and shape_for(steps[-1], have) is None:
        console.out.print(
            "[yellow]the base is not on this machine yet, so most sizes are not known; they are predicted, and the "
            "build refused if need be, as soon as it is[/yellow]"
        )
    if why:
        _say_why(steps, store, have)
    check(steps, have)


def show(recipe: Path, step: str, target: str, store_dir: Path, svg: Path | None) -> None:
    """Print the last report of a recipe, or all that one step recorded."""
    from rich.markdown import Markdown

    store = Store(store_dir)
    if not step:
        page = store.root / "reports" / recipe.stem / "report.md"
        if not page.is_file():
            raise EdgeftError(f"{recipe} was not built yet in {store.root}", hint=f"edgeft build {recipe}")
        shown = Markdown(page.read_text(encoding="utf-8"))
        if svg:
            write_atomically(svg, console.as_svg(shown, f"edgeft show {recipe}"))
        else:
            console.out.print(shown)
        return
    steps = make_plan(*read(recipe, target))
    wanted = [s for s in steps if step in (s.stage.name, s.stage.id, s.variant, s.title)]
    if not wanted:
        names = ", ".join(dict.fromkeys(s.stage.name for s in steps))
        raise RecipeError(f"this recipe has no step {step!r}", hint=f"choose from {names}")
    for one in wanted:
        artifact = store.get(one)
        state = str(artifact.path) if artifact else "not made yet"
        console.out.print(f"[bold]{escape(one.title)}[/bold]  {escape(state)}", highlight=False)
        console.out.print_json(
            json.dumps({"params": one.identity["params"], "facts": artifact.facts if artifact else {}})
        )


def clean(recipes: list[Path], store_dir: Path, *, everything: bool, dry_run: bool) -> None:
    """Delete what no recipe plans; without recipes, those that were built in this store are kept."""
    store = Store(store_dir)
    known = [] if everything else [(r, "") for r in recipes] or list(_remembered(store))
    keep = {step.key for r, target in known if r.exists() for step in make_plan(*read(r, target))}
    if not keep and not everything:
        raise EdgeftError(
            f"no recipe was built in {store.root}, so there is nothing to compare with",
            hint="name the recipes to keep, or delete every result with --all",
        )
    gone = store.sweep(keep, dry=dry_run)
    for path, size in gone:
        console.out.print(f"{size / 1e6:10,.1f} MB  {path.name}", markup=False, highlight=False)
    verb = "would be freed" if dry_run else "freed"
    console.out.print(f"{sum(size for _, size in gone) / 1e6:,.1f} MB {verb} in {store.root}")


def _look_at_base(steps: list[Step]) -> None:
    """Know how large a hub model is before anything is downloaded, if the hub can be reached."""
    from edgeft.checkpoint.collect import fetch_config

    for step in (s for s in steps if s.stage.name == "base"):
        if (folder := glimpse(step)) and shape_for(step, {}) is None:
            p = step.params
            fetch_config(p.repo, p.revision, folder)  # type: ignore[attr-defined]


def _say_result(result: BuildReport, recipe: Path, page: Path) -> None:
    for r in report.built(result, "verify", "verify/served"):
        for a in r.artifact.facts["answers"][:1] if r.artifact else ():
            console.out.print(f"\n[bold]Q[/bold] {escape(a['question'])}", highlight=False)
            console.out.print(
                f"[bold]A[/bold] {escape(a['replies']['shipped'])}   [dim]({r.step.variant})[/dim]",
                highlight=False,
            )
        break
    console.out.print(f"\nreport   {page}", markup=False, highlight=False)
    if (drawn := page.with_name("certificate.html")).is_file():
        console.out.print(f"page     {drawn}", markup=False, highlight=False)
    for r in result.results:
        if r.artifact and r.step.stage.name == "export":
            for name in (n for n in r.step.stage.makes if not n.endswith(".json")):
                place = f"{r.step.stage.kind:8} {r.artifact.path / name}"
                console.out.print(place, markup=False, highlight=False)
    console.out.print(f"next     edgeft chat {recipe}", markup=False, highlight=False)


def _say_why(steps: list[Step], store: Store, have: dict[str, Any]) -> None:
    manifests = store.manifests()
    for step in steps:
        if step.key in have:
            continue
        lines = differences(step, manifests) or ["nothing like it was made here before"]
        console.out.print(f"[bold]{escape(step.title)}[/bold]: " + escape("; ".join(lines)), highlight=False)


def _remember(store: Store, recipe: Path, target: str, tables: list[Tables]) -> None:
    """Which recipe and target were built here, so that `clean`, `chat` and `serve` find them again."""
    where = {"recipe": str(recipe.resolve()), "target": target or tables[0].target}
    write_atomically(store.root / "reports" / tables[0].name / "built.json", json.dumps(where) + "\n")


def _remembered(store: Store) -> Iterable[tuple[Path, str]]:
    for path in sorted((store.root / "reports").glob("*/built.json")):
        where = json.loads(path.read_text(encoding="utf-8"))
        yield Path(where["recipe"]), where["target"]


def _log_to_terminal() -> None:
    from rich.logging import RichHandler

    logger = logging.getLogger("edgeft")
    logger.setLevel(logging.DEBUG)
    width = shutil.get_terminal_size().columns
    logger.addHandler(RichHandler(console=console.err, show_path=width > 140))
