"""The certificate for a terminal: the verdict, a line for each file, and for those that do not pass the reasons.

Nothing is printed here; `edgeft.console` prints. 80 columns are enough.
"""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from edgeft.parity.certificate import Certificate, File, Served, StepCost
from edgeft.parity.checks.check import failed
from edgeft.parity.gates import Verdict
from edgeft.parity.page import wording

STYLES = {"PASS": "bold green", "FAIL": "bold red", "UNDECIDED": "bold yellow"}
REASONS = 6
"""At most so many for a file; the page has all."""


def table(certificate: Certificate) -> RenderableType:
    """All that is needed to decide, verdict first. Text that a model or a file gave cannot style or drive the terminal."""
    c = certificate
    texts = ", ".join(f"{t['counted']:,} tokens of {t['name']} text" for t in c.texts)
    compared = f"compared with {c.reference}" + (f" on {texts}" if texts else "")
    return Group(
        Text.assemble(_verdict(c.verdict), "  ", (wording.clean(c.name), "bold"), ": ", wording.headline(c)),
        Text(wording.clean(compared), style="dim"),
        Text(),
        _files(c.files),
        Text("on domain text; in brackets the one-sided 95 % bound, which decides", style="dim"),
        *(
            Text(f"{wording.clean(f.title)}: {wording.runtime(f)}", style="dim")
            for f in c.files
            if wording.runtime(f)
        ),
        *(_board(f, s) for f in c.files for s in f.served),
        *(part for f in c.files if f.verdict != "PASS" for part in _reasons(f)),
    )


def _files(files: list[File]) -> Table:
    found = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    found.add_column("file", overflow="fold", min_width=6)
    for name in ("MB", "b/w", "KLD", "PPL ratio", "top", "kept"):
        found.add_column(name, justify="right", no_wrap=True)
    found.add_column("verdict", no_wrap=True)
    for f in files:
        d, kept = f.domain, f.retention.retention if f.retention else None
        found.add_row(
            Text(wording.clean(f.title)), f"{f.bytes / 1e6:,.0f}" if f.bytes >= 1e7 else f"{f.bytes / 1e6:.1f}",
            f"{f.bits_per_weight:.2f}", f"{wording.nats(d.kld)} ({wording.nats(d.kld_bound)})",
            f"{d.ppl_ratio:.3f} ({d.ppl_ratio_bound:.3f})", f"{d.same_top:.1%}",
            wording.NONE if kept is None else f"{kept:.0%}", _verdict(f.verdict),
        )  # fmt: skip
    return found


def _board(file: File, served: Served) -> Text:
    """A line for a board's log."""
    may = (
        f", {wording.nats(served.limit)} is allowed" if served.limit is not None else ", no limit can be set"
    )
    return Text(
        f"{wording.clean(file.title)} on the board, {served.text} text: KLD {wording.nats(served.kld)}, here "
        f"{wording.nats(served.kld_here)}, moved {wording.signed(served.moved)}{may}"
    )


def _reasons(file: File) -> Iterator[RenderableType]:
    """Why a file does not pass, the step at fault, and what each step cost."""
    yield Text()
    decides = f" {wording.more(file)}" if file.verdict == "UNDECIDED" else ""
    yield Text.assemble(
        (wording.clean(file.title), "bold"), " ", _verdict(file.verdict), "  ", wording.meaning(file), decides
    )
    if file.culprit:
        yield Padding(Text(wording.fault(file), style="bold"), (0, 0, 0, 2))
    reasons = Table.grid(padding=(0, 1, 0, 0))
    for reason in file.because[:REASONS]:
        reasons.add_row(" ·", Text(wording.sentence(reason)))
    if len(file.because) > REASONS:
        reasons.add_row(" ·", f"{len(file.because) - REASONS} more: see the page")
    yield reasons
    unasked = sum(check.ok is None for check in file.checks)
    wrong = len(failed(file.checks))
    yield Padding(
        Text(
            f"exact checks: {len(file.checks) - wrong - unasked} ok, {wrong} failed, {unasked} could not be asked",
            style="dim",
        ),
        (0, 0, 0, 2),
    )
    if file.steps:
        yield Padding(_steps(file.steps), (1, 0, 0, 2))


def _steps(steps: list[StepCost]) -> Table:
    found = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    found.add_column("step", overflow="fold", min_width=10)
    for name in ("loss", "cost", "KLD", "KLD added"):
        found.add_column(name, justify="right", no_wrap=True)
    for s in steps:
        found.add_row(
            Text(wording.clean(s.title)), wording.nats(s.loss), wording.signed(s.cost), wording.nats(s.kld),
            wording.signed(s.kld_added),
        )  # fmt: skip
    return found


def _verdict(verdict: Verdict) -> Text:
    return Text(f"{wording.MARKS[verdict]} {verdict}", style=STYLES[verdict])
