"""Blocks of a page: sections, figures, tables, tiles. Text is escaped wherever it is not `Markup` already.

    page("runs/quickstart", lead, [Section("cost", "Cost", table(["stage", "time"], rows))])

One file without links to anything: style and script are written into it. It reads without the script, which adds the
search fields and the words that follow a finger.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from importlib.resources import files
from typing import NamedTuple

from markupsafe import Markup

from montessori_ray.report.colours import css_variables
from montessori_ray.report.words import tied, xml_text

Cell = str | Markup
"""A cell of a table."""


class Section(NamedTuple):
    """A part of a page."""

    id: str
    title: str
    body: Markup


class Tile(NamedTuple):
    """A key figure."""

    label: str
    value: str
    note: str = ""


def page(title: str, lead: Markup, sections: Sequence[Section]) -> str:
    """The whole HTML document.

    Args:
        title: name of the page, shown as its heading too.
        lead: what comes first, before the contents.
        sections: the rest, in order.
    """
    style = css_variables() + _text("page.css")
    contents = join(Markup('<a href="#{}">{}</a>').format(section.id, section.title) for section in sections)
    body = join(
        Markup('<section id="{}"><h2>{}</h2>{}</section>').format(section.id, section.title, section.body)
        for section in sections
    )
    whole = Markup(
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{title}</title>\n'
        "<style>{style}</style>\n</head>\n<body>\n<main>\n<header><h1>{title}</h1>{lead}</header>\n"
        '<nav aria-label="Contents">{contents}</nav>\n{body}\n</main>\n<script>{script}</script>\n</body>\n</html>\n'
    ).format(
        title=title, style=Markup(style), lead=lead, contents=contents, body=body, script=Markup(_text("page.js"))
    )  # fmt: skip
    return xml_text(whole)


def paragraph(*parts: Cell, kind: str = "") -> Markup:
    """A paragraph; `kind` is a class of page.css (`note`, `lead`, `result`)."""
    parts = tuple(part if isinstance(part, Markup) else tied(part) for part in parts)
    return Markup('<p class="{}">{}</p>').format(kind, join(parts)) if kind else Markup("<p>{}</p>").format(join(parts))


def figure(title: str, svg: Markup, caption: str = "", legend: Sequence[tuple[str, str]] = ()) -> Markup:
    """A plot with its title above and its caption below.

    Args:
        title: what is shown.
        svg: of `plots`.
        caption: how to read it.
        legend: (colour role, words) of what the plot tells apart.
    """
    keys = join(Markup('<li><i style="background:var(--{})"></i>{}</li>').format(role, words) for role, words in legend)
    legend_list = Markup('<ul class="legend">{}</ul>').format(keys) if legend else ""
    under = Markup("<figcaption>{}</figcaption>").format(tied(caption)) if caption else ""
    return Markup("<figure><h3>{}</h3>{}{}{}</figure>").format(title, legend_list, svg, under)


def stack(*blocks: Markup) -> Markup:
    """Blocks one below the other, as one cell of `figures`."""
    return Markup("<div>{}</div>").format(join(blocks))


def subtitle(text: str) -> Markup:
    """A heading within a section."""
    return Markup('<h3 class="sub">{}</h3>').format(text)


def figures(*drawn: Markup) -> Markup:
    """Figures, and tables that go with them, side by side: as many as fit the width."""
    return Markup('<div class="figures">{}</div>').format(join(drawn))


def table(
    columns: Sequence[str],
    rows: Iterable[Sequence[Cell]],
    *,
    numbers: Sequence[int] = (),
    caption: str = "",
    search: bool = False,
) -> Markup:
    """A table, which scrolls by itself where it is wider than the page.

    Args:
        columns: headings.
        rows: cells, as many as headings each.
        numbers: columns set as numbers, to the right.
        caption: heading of the table.
        search: for tables of texts: a field that keeps the rows with some words, and rows as cards on a phone.
    """
    heads = join(
        Markup('<th scope="col"{}>{}</th>').format(_number(index, numbers), name) for index, name in enumerate(columns)
    )
    body = join(Markup("<tr>{}</tr>").format(_cells(row, columns, numbers)) for row in rows)
    kind = "texts" if search else "numbers"
    return Markup(
        '<div class="table {}" tabindex="0"{}><table>{}<thead><tr>{}</tr></thead><tbody>{}</tbody></table></div>'
    ).format(
        kind, Markup(" data-search") if search else "",
        Markup("<caption>{}</caption>").format(caption) if caption else "", heads, body,
    )  # fmt: skip


def tiles(shown: Sequence[Tile]) -> Markup:
    """Key figures in a row."""
    cells = join(
        Markup("<div><dt>{}</dt><dd>{}</dd><small>{}</small></div>").format(tile.label, tile.value, tile.note)
        for tile in shown
    )
    return Markup('<dl class="tiles">{}</dl>').format(cells)


def bar_cell(share: float, text: str) -> Markup:
    """A number over a bar as long as its share (0 to 1) of the cell."""
    return Markup('<span class="bar" style="--share:{:.1f}%">{}</span>').format(100 * share, text)


def details(summary: str, body: Markup) -> Markup:
    """Something that is shown when asked for."""
    return Markup("<details><summary>{}</summary>{}</details>").format(summary, body)


def preformatted(text: str) -> Markup:
    """Text as it is, in a fixed width."""
    return Markup('<pre tabindex="0">{}</pre>').format(text)


def join(parts: Iterable[Cell]) -> Markup:
    """Parts one after the other; plain text among them is escaped."""
    return Markup("").join(parts)


def _cells(row: Sequence[Cell], columns: Sequence[str], numbers: Sequence[int]) -> Markup:
    return join(
        Markup('<td data-label="{}"{}>{}</td>').format(name, _number(index, numbers), cell)
        for index, (name, cell) in enumerate(zip(columns, row, strict=True))
    )


def _number(index: int, numbers: Sequence[int]) -> Markup:
    return Markup(' class="number"') if index in numbers else Markup("")


def _text(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")
