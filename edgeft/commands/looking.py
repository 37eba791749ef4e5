"""doctor, targets, init: this machine, the devices, and a data file."""

from __future__ import annotations

from pathlib import Path

from rich.markup import escape
from rich.table import Table

from edgeft import console
from edgeft.errors import EdgeftError, SetupError
from edgeft.recipe import load
from edgeft.resources import folder
from edgeft.store import write_atomically

MARKS = {True: "[green]✓[/green]", False: "[red]✗[/red]", None: "[yellow]-[/yellow]"}


def doctor(store: Path) -> None:
    """Draw what was found; SetupError when something that every build needs is missing."""
    from edgeft.doctor import examine

    table = Table("", "what", "found", "what repairs it", box=None, header_style="dim")
    findings = list(examine(store))
    for f in findings:
        table.add_row(MARKS[f.ok], f.name, escape(f.found), escape(f.repair))
    console.out.print(table)
    if broken := [f.name for f in findings if f.ok is False]:
        raise SetupError(
            f"this machine cannot build yet: {', '.join(broken)}", hint="run the commands in the last column"
        )


def targets() -> None:
    """One line a target file that ships."""
    table = Table("target", "arch", "RAM MB", "GPU MB", "what it is", box=None, header_style="dim")
    for path in sorted(folder("targets").glob("*.toml")):
        tables = load(path, per_target=True)
        d = next(p.model_dump() for s, p in tables.rows if s.name == "device")
        vram = d.get("vram_mb") or 0
        table.add_row(
            path.stem, d["arch"], f"{d['ram_mb']:,}", f"{vram:,}" if vram else "", escape(tables.description)
        )
    console.out.print(table)


def init(data: Path, out: Path | None) -> None:
    """Write a recipe for a data file. Never overwrites one."""
    from edgeft.corpus.describe import recipe_for

    recipe = out or data.with_suffix(".toml")
    if recipe.exists():
        raise EdgeftError(f"{recipe} exists already", hint="name another one with --out")
    write_atomically(recipe, recipe_for(data, recipe))
    console.out.print(f"wrote {recipe}; look through it, then: edgeft build {recipe}", highlight=False)
