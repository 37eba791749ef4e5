"""The certificate's three plots: what each step cost, quality against size, and drift along the window.

A plot is drawn for a page of 360 px or for a wide one, because text that shrinks with its picture cannot be read on a
phone; `prefix` begins every id in its markup. Nothing is said by colour alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from edgeft.parity.certificate import Bin, Certificate, File, StepCost
from edgeft.parity.page import drawing, wording
from edgeft.parity.page.drawing import SIZE
from edgeft.parity.page.svg import as_markup, color

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDE, NARROW = 736, 328
"""Widths to draw for, in CSS pixels: an A4 page or a window, and a phone's page of 360 without its margins."""

MARKERS = {"PASS": "o", "FAIL": "X", "UNDECIDED": "D"}


def waterfall(steps: Sequence[StepCost], *, width: int, prefix: str) -> str:
    """Nats per token: what training gained, and magnified what each later step cost, with 95 % bounds.

    An empty string when nothing comes after the trained model.
    """
    at = next((i for i, s in enumerate(steps) if s.step == "trained"), 0)
    after = [_Bar.of(s) for s in steps[at + 1 :]]
    if not after:
        return ""
    for before, bar in pairwise(after):
        bar.start = before.start + before.length
    row = 50 if width < 500 else 38
    whole = _whole(steps[at - 1], steps[at], after) if at and steps[at].cost is not None else []
    upper = len(whole) * row + 84 if whole else 0
    height = upper + len(after) * row + 76
    with drawing.figure(width, height) as drawn:
        if whole:
            drawing.heading(drawn, height, "Loss, nats per token")
            _rows(drawn, whole, height - 30, row, "lower is better")
        title = "Magnified: what each step after training cost" if whole else "What each step cost"
        drawing.heading(drawn, height - upper, title)
        _rows(drawn, after, height - upper - 30, row, "nats per token above the trained model")
        return as_markup(drawn, prefix=prefix, said=_costs_in_words(steps))


def quality(certificate: Certificate, *, width: int, prefix: str) -> str:
    """KL divergence against size for every file; the limit, and the target's memory when it is near, as lines."""
    files, (size, memory) = certificate.files, sizes(certificate)
    with drawing.figure(width, 300 if width < 500 else 340) as drawn:
        axes = drawing.framed(drawn, "KL divergence, nats per token")
        axes.set_yscale("log")
        near = [memory] if memory is not None and in_range(size, memory) else []
        low, high = min(size + near), max(size + near)
        room = (high - low or high) * 0.15
        axes.set_xlim(max(0.0, low - room), high + room)
        for f, x in zip(files, size, strict=True):
            if g := f.general:
                drawing.point(axes, x, (g.kld_low, g.kld, g.kld_bound), "s", color("general"), aside=9)
            kld = (f.domain.kld_low, f.domain.kld, f.domain.kld_bound)
            drawing.point(axes, x, kld, MARKERS[f.verdict], color(f.verdict.lower()))
        limits = {f.limits.max_kld for f in files}
        if len(limits) == 1:
            drawing.limit_line(axes, *limits)
        for x in near:
            axes.axvline(x, color=color("ink"), lw=1, ls=(0, (4, 3)), zorder=1)
            axes.annotate(
                f"{_target(certificate)}: {wording.mb(x)}", (x, 1), (-5, -10), color=color("ink"), fontsize=SIZE - 1,
                xycoords=("data", "axes fraction"), textcoords="offset points", ha="right",
            )  # fmt: skip
        shown = [c for f in files for c in (f.domain, f.general) if c]
        low = min(max(c.kld_low, c.kld / 10, drawing.LEAST) for c in shown)
        high = max([*(c.kld_bound for c in shown), *limits])
        axes.set_ylim(low / 1.8, high * 2.2)
        drawing.log_ticks(axes)
        axes.locator_params(axis="x", nbins=4 if width < 500 else 8)
        drawing.below(axes, "size of the file, MB" if memory is None else "predicted memory, MB")
        names = [(x, f.domain.kld, wording.clean(f.title)) for f, x in zip(files, size, strict=True)]
        drawing.name_points(drawn, axes, names, lines=limits if len(limits) == 1 else ())
        return as_markup(drawn, prefix=prefix, said=_quality_in_words(files, size))


def by_position(bins: Sequence[Bin], limit: float, *, width: int, prefix: str) -> str:
    """KL divergence by position in the window, for each text, with 95 % bounds. `bins` must not be empty."""
    with drawing.figure(width, 280 if width < 500 else 320) as drawn:
        axes = drawing.framed(drawn, "KL divergence, nats per token", above=56)
        for name, marker, line in (("domain", "o", "-"), ("general", "s", (0, (4, 2)))):
            found = [b for b in bins if b.text == name]
            if not found:
                continue
            x, paint = [(b.first + b.last) / 2 for b in found], color(name)
            axes.fill_between(
                x, [b.low for b in found], [b.high for b in found], color=paint, alpha=0.15, lw=0, zorder=2,
            )  # fmt: skip
            axes.plot(
                x, [b.kld for b in found], color=paint, lw=1.8, ls=line, marker=marker, ms=6, zorder=4,
                mec=color("paper"), label=f"{name} text",
            )  # fmt: skip
        highest = max(b.high for b in bins) * 1.2 or 1e-6
        if limit < 1.5 * highest:
            highest = max(highest, 1.2 * limit)
            drawing.limit_line(axes, limit)
        axes.set_ylim(min(0.0, *(b.low for b in bins)), highest)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.locator_params(axis="y", nbins=5)
        axes.locator_params(axis="x", nbins=5 if width < 500 else 9, integer=True)
        drawing.below(axes, "position in the window, tokens")
        axes.legend(
            loc="upper left", bbox_to_anchor=(-0.01, 1.12), ncols=2, frameon=False, fontsize=SIZE - 1, labelcolor=color("ink"),
            handlelength=1.8, columnspacing=1.4, handletextpad=0.6, borderaxespad=0, borderpad=0,
        )  # fmt: skip
        return as_markup(drawn, prefix=prefix, said=_positions_in_words(bins))


def sizes(certificate: Certificate) -> tuple[list[float], float | None]:
    """Predicted memory of each file and what the target leaves, in MB; without a target sizes of the files and None."""
    memory = certificate.target.get("memory_mb")
    predicted = [f.memory_mb for f in certificate.files if f.memory_mb is not None]
    if memory and len(predicted) == len(certificate.files):
        return predicted, float(memory)
    return [f.bytes / 1e6 for f in certificate.files], None


def in_range(size: Sequence[float], memory: float) -> bool:
    """Whether the target's memory can be drawn without pressing the files together."""
    return memory < 2.5 * max(size)


@dataclass(kw_only=True)
class _Bar:
    """A row of a waterfall: from `start`, `length` to the right; a mark when there is no length."""

    title: str
    start: float
    length: float = 0.0
    bounds: tuple[float, float] | None = None
    """Of the length."""
    value: str

    @classmethod
    def of(cls, step: StepCost, start: float = 0.0) -> _Bar:
        known = step.cost_low is not None and step.cost_high is not None
        return cls(
            title=wording.clean(step.title), start=start, length=step.cost or 0.0, value=wording.signed(step.cost),
            bounds=(step.cost_low or 0.0, step.cost_high or 0.0) if known else None,
        )  # fmt: skip


def _whole(base: StepCost, trained: StepCost, after: Sequence[_Bar]) -> list[_Bar]:
    """The waterfall at its true scale: before training, training, and all that came after it as one bar."""
    lost = sum(bar.length for bar in after)
    start = base.loss + (trained.cost or 0.0)
    return [
        _Bar(title=wording.clean(base.title), start=base.loss, value=wording.nats(base.loss)),
        _Bar.of(trained, start=base.loss),
        _Bar(title="all steps after training", start=start, length=lost, value=wording.signed(lost)),
    ]


def _rows(drawn: Figure, bars: Sequence[_Bar], top: float, row: int, unit: str) -> None:
    """Rows of `row` pixels from `top` downwards: title, bar with its bounds, number; and an axis below."""
    width, height = drawing.size(drawn)
    narrow = width < 500
    left, right = (4, 4) if narrow else (216, 212)
    box = (left, top - row * len(bars), width - left - right, row * len(bars))
    axes = drawn.add_axes((box[0] / width, box[1] / height, box[2] / width, box[3] / height))
    for i, bar in enumerate(bars):
        y, end = len(bars) - 1 - i + (0.3 if narrow else 0.5), bar.start + bar.length
        paint = color("gain" if bar.length < 0 else "cost")
        axes.barh(y, bar.length, left=bar.start, height=14 / row, color=paint, zorder=2)
        axes.plot([bars[0].start] * 2, [y - 0.26, y + 0.26], color=color("ink"), lw=1, zorder=1)
        if bar.length == 0:
            axes.plot([end], [y], "o", color=color("ink"), ms=6, zorder=3, clip_on=False)
        if i + 1 < len(bars):
            axes.plot([end, end], [y, y - 1], color=color("muted"), lw=1, ls=(0, (1, 2)), zorder=1)
        level = top - row * i - (13 if narrow else row / 2)
        drawing.words(drawn, 0, level, drawing.short(bar.title, 34 if narrow else 30))
        drawing.words(drawn, width if narrow else width - 140, level, bar.value, ha="right", weight="bold")
        if bar.bounds:
            low, high = bar.bounds
            drawing.whisker(axes, (bar.start + low, bar.start + high), (y, y), "|", color("ink"))
            if not narrow:
                said = f"{wording.signed(low)} to {wording.signed(high)}"
                drawing.words(drawn, width, level, said, ha="right", color=color("muted"), size=SIZE - 1)
    axes.set_ylim(0, len(bars))
    axes.set_yticks([])
    axes.margins(x=0.04)
    axes.locator_params(axis="x", nbins=5)
    drawing.below(axes, unit)
    drawing.bare(axes)


def _target(certificate: Certificate) -> str:
    return drawing.short(wording.clean(str(certificate.target.get("name", "target"))), 24)


def _costs_in_words(steps: Sequence[StepCost]) -> str:
    said = [
        f"{s.title} " + (f"loss {wording.nats(s.loss)}" if s.cost is None else wording.signed(s.cost)) for s in steps
    ]  # fmt: skip
    return wording.clean("What each step cost, in nats per token: " + "; ".join(said) + ".")


def _quality_in_words(files: Sequence[File], size: Sequence[float]) -> str:
    said = [
        f"{f.title}: {wording.mb(x)}, KL divergence {wording.nats(f.domain.kld)}, {f.verdict}"
        for f, x in zip(files, size, strict=True)
    ]
    return wording.clean("Quality against size. " + "; ".join(said) + ".")


def _positions_in_words(bins: Sequence[Bin]) -> str:
    said = [f"{b.text} text, tokens {b.first} to {b.last}: {wording.nats(b.kld)}" for b in bins]
    return wording.clean("KL divergence by position in the window. " + "; ".join(said) + ".")
