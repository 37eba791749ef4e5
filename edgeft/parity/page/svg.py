"""A matplotlib figure as SVG for a page: the page's colours and font, ids of its own, nothing that is not needed.

One unit is one CSS pixel. Colours are names of the page's CSS variables, so that a plot follows light and dark.
"""

from __future__ import annotations

import io
import re
from typing import TYPE_CHECKING
from xml.etree import ElementTree

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLORS = (
    "ink", "muted", "line", "paper", "gain", "cost", "domain", "general", "pass", "fail", "undecided",
)  # fmt: skip
"""CSS variables that the page defines for both of its colour schemes."""

_NAMES = {f"#0000{number:02x}": name for number, name in enumerate(COLORS, start=1)}
_HREF = "{http://www.w3.org/1999/xlink}href"


def color(name: str) -> str:
    """What to give matplotlib for a CSS variable: a colour that nobody sees."""
    return f"#0000{COLORS.index(name) + 1:02x}"


def as_markup(drawn: Figure, *, prefix: str, said: str) -> str:
    """The figure as an `<svg>` element. `prefix` begins every id; `said` is what it shows, for who cannot see it."""
    to = io.BytesIO()
    drawn.savefig(to, format="svg", metadata={"Date": None})
    root = ElementTree.fromstring(to.getvalue())
    _strip(root)
    _rename(root, prefix)
    box = root.get("viewBox", "")
    root.attrib.clear()
    root.attrib.update({"viewBox": box, "role": "img", "aria-label": said, "class": "plot"})
    return ElementTree.tostring(root, encoding="unicode")


def _strip(root: ElementTree.Element) -> None:
    """Drop namespaces, metadata, matplotlib's style sheet, which would hold for the whole page, and needless digits."""
    for parent in root.iter():
        for child in list(parent):
            if child.tag.endswith(("}metadata", "}style")):
                parent.remove(child)
    for element in root.iter():
        element.tag = element.tag.partition("}")[2] or element.tag
        if _HREF in element.attrib:
            element.set("href", element.attrib.pop(_HREF))
        for name in ("d", "x", "y", "width", "height", "transform"):
            if name in element.attrib:
                element.set(name, _shorter(element.attrib[name]))
        if "style" in element.attrib:
            element.set("style", _style(element.attrib["style"]))
        if element.tag != "text" and not (element.text or "").strip():
            element.text = None
        element.tail = None


def _rename(root: ElementTree.Element, prefix: str) -> None:
    """Keep the ids that something refers to, under new names."""
    used: dict[str, str] = {}
    for element in root.iter():
        for name, value in element.attrib.items():
            for old in re.findall(r"^#(.+)$" if name == "href" else r"url\(#([^)]+)\)", value):
                used.setdefault(old, f"{prefix}-{len(used) + 1}")
    for element in root.iter():
        if "id" in element.attrib:
            old = element.attrib.pop("id")
            if old in used:
                element.set("id", used[old])
        for name, value in element.attrib.items():
            if name == "href":
                element.set(name, "#" + used[value[1:]])
            elif "url(#" in value:
                element.set(name, re.sub(r"url\(#([^)]+)\)", lambda found: f"url(#{used[found[1]]})", value))


def _style(style: str) -> str:
    """CSS variables for colours, and the page's font in the size that was asked for."""
    style = re.sub(r"#[0-9a-f]{6}", lambda m: f"var(--{_NAMES[m[0]]})" if m[0] in _NAMES else m[0], style)
    style = re.sub(r"font: (?:(bold|[1-9]00) )?([\d.]+)px [^;]*", _font, style)
    return re.sub(r"\s*([:;])\s*", r"\1", style).strip(";")


def _font(found: re.Match[str]) -> str:
    return f"font-size: {found[2]}px" + ("; font-weight: 600" if found[1] else "")


def _shorter(numbers: str) -> str:
    return re.sub(r"-?\d+\.\d{2,}", lambda m: f"{float(m[0]):.2f}".rstrip("0").rstrip("."), numbers).strip()
