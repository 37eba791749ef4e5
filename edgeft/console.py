"""Everything edgeft draws in a terminal, with rich. On a pipe it draws plain lines."""

from __future__ import annotations

import io
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from edgeft.build import Report, Result
from edgeft.errors import EdgeftError
from edgeft.progress import Progress, listen
from edgeft.stage import Step

out = Console()
err = Console(stderr=True)

BLOCKS = "▁▂▃▄▅▆▇█"
_SILENCE_S = 30
"""How long a log may say nothing while work goes on."""


class Screen:
    """Draws a build while it runs: one line a finished step, and below it what the running one is doing.

    In a terminal the running step shows a bar and a live loss curve; in a log file a plain line is printed every
    half minute instead.
    """

    def __init__(self) -> None:
        self.step: Step | None = None
        self.last: Progress | None = None
        self.curves: dict[str, list[float]] = {}
        self.began = 0.0
        self.spoke = 0.0
        self.live = Live(console=out, get_renderable=self._draw, refresh_per_second=4, transient=True)

    @contextmanager
    def showing(self) -> Iterator[Screen]:
        """Keep the live area open for the length of a build."""
        handler = _Warnings()
        logging.getLogger("edgeft").addHandler(handler)
        try:
            if out.is_terminal:
                with self.live:
                    yield self
            else:
                yield self
        finally:
            logging.getLogger("edgeft").removeHandler(handler)

    def started(self, step: Step) -> None:
        """A step begins to run."""
        self.step, self.last, self.curves = step, None, {}
        self.began = self.spoke = time.monotonic()
        if not out.is_terminal:
            out.print(f"  {step.title} …", markup=False)

    def progressed(self, step: Step, progress: Progress) -> None:
        """A running step says how far it is."""
        self.last = progress
        for name, value in progress.numbers.items():
            self.curves.setdefault(name, []).append(value)
        if not out.is_terminal and time.monotonic() - self.spoke > _SILENCE_S:
            self.spoke = time.monotonic()
            out.print(f"    {_plain(progress)}", markup=False)

    def ended(self, result: Result) -> None:
        """A step is done, was in the store, failed, or could not be tried."""
        self.step = None
        out.print(_line(result), soft_wrap=True)

    def _draw(self) -> Group:
        if self.step is None:
            return Group()
        seconds = time.monotonic() - self.began
        rows: list[Text | Table] = [
            Text.assemble(("  ▸ ", "cyan"), self.step.title, (f"  {seconds:.0f} s", "dim"))
        ]
        if self.last:
            bar = Table.grid(padding=(0, 1))
            done, total = self.last.done, self.last.total
            bar.add_row("   ", ProgressBar(total=total or None, completed=done, width=30, pulse=not total),
                        Text(_plain(self.last), style="dim"))  # fmt: skip
            rows.append(bar)
        for name, values in self.curves.items():
            if "loss" in name and len(values) > 1:
                rows.append(
                    Text.assemble("    ", (f"{name:13}", "dim"), curve(values, 60), f" {values[-1]:.3f}")
                )
        return Group(*rows)


@contextmanager
def watching(title: str) -> Iterator[None]:
    """Show the progress of work that is no step of a build, such as compiling the server: on a terminal in one line that
    changes, elsewhere as a line every half minute."""
    spoke = time.monotonic()

    def say(progress: Progress) -> None:
        nonlocal spoke
        if out.is_terminal:
            status.update(f"{title}: {_plain(progress)}")
        elif time.monotonic() - spoke > _SILENCE_S:
            spoke = time.monotonic()
            out.print(f"  {title}: {_plain(progress)}", markup=False)

    with out.status(title) as status, listen(say):
        yield


def as_svg(content: RenderableType, title: str) -> str:
    """What a terminal of 120 columns would show, as an SVG picture."""
    screen = Console(record=True, width=120, file=io.StringIO())
    screen.print(content)
    return screen.export_svg(title=title)


def curve(values: Sequence[float], width: int) -> str:
    """A series as one line of block characters, lowest to highest value; at most `width` characters."""
    if not values:
        return ""
    size = max(1, -(-len(values) // width))
    means = [sum(values[i : i + size]) / len(values[i : i + size]) for i in range(0, len(values), size)]
    low, high = min(means), max(means)
    scale = (len(BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(BLOCKS[round((v - low) * scale)] for v in means)


def say_error(error: EdgeftError) -> None:
    """A sentence in red and what to do about it."""
    err.print(f"error: {error}", markup=False, style="red", highlight=False, soft_wrap=True)
    if error.hint:
        err.print(f"hint: {error.hint}", markup=False, highlight=False, soft_wrap=True)


def say_closing(report: Report) -> None:
    """How many steps ran, and how many came from the store."""
    ran = sum(r.artifact is not None and not r.cached for r in report.results)
    cached = sum(r.cached for r in report.results)
    seconds = sum(r.seconds for r in report.results)
    out.print(f"[dim]{ran} steps ran, {cached} came from the store, {seconds:.1f} s[/dim]")


class _Warnings(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)

    def emit(self, record: logging.LogRecord) -> None:
        out.print(f"    [yellow]![/yellow] {escape(record.getMessage())}", highlight=False, soft_wrap=True)


def _line(result: Result) -> Text:
    title = f"{result.step.title:24}"
    if result.error:
        return Text.assemble(("  ✗ ", "red"), title, (" failed", "red"))
    if result.artifact is None:
        return Text.assemble(("  - ", "yellow"), title, (" not tried: what it needs failed", "yellow"))
    note = str(result.artifact.facts.get("summary", ""))
    if result.cached:
        return Text.assemble(("  ✓ ", "green"), title, ("   stored ", "dim"), (note, "dim"))
    return Text.assemble(("  ✓ ", "green"), title, (f"{result.seconds:7.1f} s ", "dim"), note)


def _plain(progress: Progress) -> str:
    parts = [progress.what]
    if progress.total:
        parts.append(f"{progress.done:,.0f} of {progress.total:,.0f} {progress.unit}".rstrip())
    elif progress.done:
        parts.append(f"{progress.done:,.0f} {progress.unit}".rstrip())
    parts += [f"{name} {value:.4g}" for name, value in progress.numbers.items()]
    return "  ".join(parts)
