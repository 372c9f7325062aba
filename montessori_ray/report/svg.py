"""From a matplotlib figure to an inline SVG: small, the same bytes for the same data, themed by CSS, and accessible.

Text stays text, in the page's font; colours become CSS variables; marks carry what they show as `<title>`, which a
browser displays when one points at them.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from xml.etree import ElementTree

import matplotlib as mpl
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from montessori_ray.report.colours import STAND_INS
from montessori_ray.report.words import xml_text

WIDTH = 420
"""Width of every plot in its own units; a phone shows them at 0.85 pixels a unit, a desktop at 1.2."""

_SVG = "http://www.w3.org/2000/svg"
_LINK = "{http://www.w3.org/1999/xlink}href"
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "montessori",
    "font.size": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": STAND_INS["line"],
    "axes.labelcolor": STAND_INS["muted"],
    "axes.facecolor": "none",
    "axes.linewidth": 1,
    "axes.axisbelow": True,
    "axes.unicode_minus": True,
    "figure.facecolor": "none",
    "grid.color": STAND_INS["line"],
    "grid.linewidth": 0.6,
    "text.color": STAND_INS["ink"],
    "text.parse_math": False,
    "xtick.color": STAND_INS["line"],
    "ytick.color": STAND_INS["line"],
    "xtick.labelcolor": STAND_INS["muted"],
    "ytick.labelcolor": STAND_INS["muted"],
    "xtick.labelsize": 11.5,
    "ytick.labelsize": 11.5,
    "legend.frameon": False,
}


@contextmanager
def axes(height: float) -> Iterator[Axes]:
    """Axes to draw on, `WIDTH` x `height` units, in the style of the report."""
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(WIDTH / 72, height / 72), layout=ConstrainedLayoutEngine(w_pad=0.01, h_pad=0.04))
        yield figure.add_subplot()


def inline_svg(
    drawn: Axes, name: str, title: str, description: str, tips: Mapping[str, Sequence[str]] | None = None
) -> Markup:
    """The figure of these axes as an `<svg>` element.

    Args:
        drawn: the axes of `axes`.
        name: unique on the page; prefix of all ids in the drawing.
        title: what the plot shows, for screen readers.
        description: the same in a sentence or two, with its main numbers.
        tips: id (`gid`) of a group of marks -> what each of its marks shows, in the order they were drawn.
    """
    sink = io.BytesIO()
    with mpl.rc_context(_STYLE):
        drawn.get_figure().savefig(sink, format="svg", metadata={"Date": None})  # type: ignore[union-attr]
    ElementTree.register_namespace("", _SVG)
    root = ElementTree.fromstring(sink.getvalue())
    root.remove(_child(root, "metadata"))
    root.remove(_child(root, "defs"))  # a style rule for everything, which would reach the whole page
    for group, texts in (tips or {}).items():
        for mark, text in zip(marks(root, group), texts, strict=True):
            ElementTree.SubElement(mark, f"{{{_SVG}}}title").text = xml_text(text)
    _describe(root, name, title, description)
    for element in root.iter():
        element.attrib.update({key: _own_id(_themed(value), key, name) for key, value in element.items()})
        if _LINK in element.attrib:
            element.set("href", element.attrib.pop(_LINK))
    return Markup(ElementTree.tostring(root, encoding="unicode"))


def marks(root: ElementTree.Element, group: str) -> list[ElementTree.Element]:
    """The marks of a group: what was drawn with the id `group`, or with `group-0`, `group-1`, ... one each."""
    found: list[ElementTree.Element] = []
    for element in root.iter(f"{{{_SVG}}}g"):
        if re.fullmatch(rf"(?:.*\.)?{re.escape(group)}(?:-\d+)?", element.get("id", "")):
            hidden = {id(shape) for defs in element.iter(f"{{{_SVG}}}defs") for shape in defs.iter()}
            shapes = [*element.iter(f"{{{_SVG}}}use"), *element.iter(f"{{{_SVG}}}path")]
            found.extend(shape for shape in shapes if id(shape) not in hidden)
    return found


def _child(root: ElementTree.Element, tag: str) -> ElementTree.Element:
    found = root.find(f"{{{_SVG}}}{tag}")
    assert found is not None, f"matplotlib writes <{tag}>"
    return found


def _describe(root: ElementTree.Element, name: str, title: str, description: str) -> None:
    for attribute in ("width", "height"):
        root.attrib.pop(attribute)
    root.set("role", "img")
    root.set("style", "stroke-linejoin: round; stroke-linecap: butt")
    root.set("data-plot", name)
    root.set("aria-labelledby", f"{name}.title {name}.desc")
    for position, (tag, text) in enumerate((("title", title), ("desc", description))):
        element = ElementTree.Element(f"{{{_SVG}}}{tag}", id=tag)
        element.text = xml_text(text)
        root.insert(position, element)


def _own_id(value: str, key: str, name: str) -> str:
    """An attribute whose ids, or references to ids, have the plot's name before them: a page holds many plots."""
    if key == "id":
        return f"{name}.{value}"
    if key == _LINK:
        return f"#{name}.{value.removeprefix('#')}"
    return value.replace("url(#", f"url(#{name}.")


def _themed(value: str) -> str:
    """An attribute with the page's colours and its font."""
    for role, stand_in in STAND_INS.items():
        value = value.replace(stand_in, f"var(--{role})")
    return re.sub(r"font-family: [^;]*;? ?", "", value)
