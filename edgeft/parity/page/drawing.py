"""What the plots are drawn with: a figure in pixels, plain axes, text, whiskers, names beside points.

The same figure gives the same bytes on every machine: matplotlib's own style and font, a fixed salt, no date.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from edgeft.parity.page.svg import color

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SIZE = 12.5
"""Of text, in CSS pixels."""
LEAST = 1e-9
"""What the logarithmic axis shows for no divergence at all."""


@contextmanager
def figure(width: float, height: float) -> Iterator[Figure]:
    """An empty figure of so many CSS pixels. Draw and turn it `as_markup` while inside: the style ends with it."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(), warnings.catch_warnings():
        # The page's font is not the one that matplotlib measures with, so a sign that the latter lacks is no loss.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        matplotlib.rcdefaults()
        matplotlib.rcParams.update({
            "svg.fonttype": "none", "svg.hashsalt": "edgeft", "font.family": "DejaVu Sans", "figure.dpi": 72,
            "axes.unicode_minus": True, "text.parse_math": False, "path.simplify": True,
        })  # fmt: skip
        drawn = Figure(figsize=(width / 72, height / 72))
        drawn.patch.set_visible(False)
        yield drawn


def framed(drawn: Figure, title: str, *, above: float = 32) -> Axes:
    """Axes for a scatter or a line plot, with the y axis' title in the `above` pixels over it, where it can be read."""
    width, height = size(drawn)
    axes = drawn.add_axes((50 / width, 46 / height, 1 - 60 / width, 1 - (46 + above) / height))
    axes.grid(axis="y", color=color("line"), lw=1)
    axes.set_axisbelow(True)
    heading(drawn, height, title)
    bare(axes)
    return axes


def bare(axes: Axes) -> None:
    """Take away what shows no number: frame, ticks, background."""
    axes.patch.set_visible(False)
    for side in ("left", "right", "top"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(color("line"))
    axes.tick_params(which="both", length=0, pad=6, labelsize=SIZE - 1, labelcolor=color("muted"))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,g}".replace("-", "−"))


def below(axes: Axes, text: str) -> None:
    """The x axis' title."""
    axes.set_xlabel(text, color=color("muted"), fontsize=SIZE - 1, labelpad=6)


def heading(drawn: Figure, top: float, text: str) -> None:
    """A title over a plot whose upper edge is `top` pixels high."""
    words(drawn, 0, top - 12, text, weight="bold")


def words(drawn: Figure, x: float, y: float, text: str, **how: Any) -> None:
    """Text at a place of the figure, in pixels from its lower left corner."""
    width, height = size(drawn)
    drawn.text(x / width, y / height, text, **{"size": SIZE, "color": color("ink"), "va": "center", **how})


def whisker(
    axes: Axes, x: tuple[float, float], y: tuple[float, float], cap: str, paint: str, **how: Any
) -> None:
    """A line between two bounds; `cap` is the marker at its ends."""
    axes.plot(x, y, color=paint, lw=1.4, marker=cap, ms=8, mew=1.4, zorder=3, **how)


def point(
    axes: Axes, x: float, y: tuple[float, float, float], marker: str, paint: str, *, aside: float = 0.0
) -> None:
    """A number between its bounds (low, value, high) on a logarithmic axis.

    With `aside` it is hollow and stands so many pixels to the right, so that two can stand together.
    """
    from matplotlib.transforms import ScaledTranslation

    at = axes.transData + ScaledTranslation(aside / 72, 0, axes.figure.dpi_scale_trans)
    value = max(y[1], LEAST)
    whisker(axes, (x, x), (max(y[0], value / 10), max(y[2], value)), "_", paint, transform=at)
    fill, edge, diameter = (color("paper"), paint, 6) if aside else (paint, color("paper"), 10)
    axes.plot([x], [value], marker, zorder=4, transform=at, mfc=fill, mec=edge, mew=1.4, ms=diameter)


def limit_line(axes: Axes, limit: float) -> None:
    """A horizontal line that says what it is."""
    axes.axhline(limit, color=color("ink"), lw=1, ls=(0, (4, 3)), zorder=1)
    axes.annotate(
        f"limit {limit:g}", (1, limit), (0, 5), xycoords=("axes fraction", "data"), textcoords="offset points", ha="right",
        fontsize=SIZE - 1, color=color("ink"),
    )  # fmt: skip


def log_ticks(axes: Axes) -> None:
    """Numbers as people write them, and enough of them when the values lie within a decade or two."""
    from matplotlib.ticker import LogLocator, NullFormatter

    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 2000 else (1,)))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())


def name_points(
    drawn: Figure, axes: Axes, points: Sequence[tuple[float, float, str]], *, lines: Iterable[float] = ()
) -> None:
    """Write each point's name beside it, at the first of four places where it covers no name, point or level line."""
    places = [tuple(axes.transData.transform((x, max(y, LEAST)))) for x, y, _ in points]
    edge = axes.get_window_extent()
    levels = [float(axes.transData.transform((0, y))[1]) for y in lines]
    taken = [(x - 8, y - 8, x + 18, y + 8) for x, y in places]
    taken += [(edge.x0, y - 1, edge.x1, y + 1) for y in levels]
    for (x, y), (_, _, text) in zip(places, points, strict=True):
        text = short(text, 24)
        wide = 7.4 * len(text)
        boxes = {
            (dx, dy, ha): (left, y + dy - 8, left + wide, y + dy + 8)
            for dx, dy, ha, left in (
                (-13, 0, "right", x - 13 - wide), (20, 0, "left", x + 20), (0, 20, "center", x - wide / 2),
                (0, -20, "center", x - wide / 2),
            )
        }  # fmt: skip
        free = (
            place for place, box in boxes.items()
            if box[0] >= edge.x0 and box[2] <= edge.x1 + 10 and not any(_overlap(box, other) for other in taken)
        )  # fmt: skip
        place = dx, dy, ha = next(free, next(iter(boxes)))
        taken.append(boxes[place])
        words(drawn, x + dx, y + dy, text, ha=ha, weight="bold", zorder=6)


def short(text: str, most: int) -> str:
    """At most so many characters of a text."""
    return text if len(text) <= most else text[: most - 1] + "…"


def size(drawn: Figure) -> tuple[float, float]:
    """Width and height of a figure in pixels."""
    width, height = drawn.get_size_inches()
    return 72 * float(width), 72 * float(height)


def _overlap(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
