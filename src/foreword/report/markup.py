"""Elements of a page as strings: what is not markup already is escaped, so no text of a row can become a tag."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Mapping, Sequence

# HTML 13.2.3.5: control characters other than white space are errors; so are lone surrogates in UTF-8.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")
_EMPTY = {"meta", "br", "line", "rect", "circle", "path", "col"}

Child = object
"""Markup, text, a number, or None for nothing."""


class Markup(str):
    """A string that is markup already."""


def escaped(value: object) -> Markup:
    """A value as text inside an element or an attribute."""
    return value if isinstance(value, Markup) else Markup(html.escape(_UNPRINTABLE.sub("\ufffd", str(value))))


def el(name: str, /, *children: Child, **attributes: object) -> Markup:
    """An element; ``class_`` is the attribute class, ``stroke_width`` is stroke-width, None is left out."""
    stated = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escaped(value)}"'
        for key, value in attributes.items()
        if value is not None
    )
    if name in _EMPTY and not children:
        return Markup(f"<{name}{stated}/>")
    return Markup(f"<{name}{stated}>{joined(children)}</{name}>")


def joined(children: Iterable[Child]) -> Markup:
    """Several pieces one after the other, each escaped unless it is markup."""
    return Markup("".join(escaped(c) for c in children if c is not None))


def section(title: str, *children: Child, note: str = "") -> Markup:
    """A part of the page with its heading, and under it what the numbers mean."""
    return el("section", el("h2", title), el("p", note, class_="note") if note else None, *children)


def table(
    head: Sequence[str],
    rows: Iterable[Sequence[Child]],
    kind: str = "",
    numbers: Sequence[int] = (),
    wide: Sequence[int] = (),
) -> Markup:
    """A table that scrolls by itself where it is too wide.

    Args:
        head: column titles; also what a cell is called where rows are stacked (narrow screens).
        rows: cells; the first of each row is its heading.
        kind: more classes of the table.
        numbers: columns that are set flush right.
        wide: columns of long texts, which get a line of their own where rows are stacked.
    """
    kinds = {**dict.fromkeys(numbers, "number"), **dict.fromkeys(wide, "wide")}
    titles = [el("th", h, scope="col", class_=kinds.get(i)) for i, h in enumerate(head)]
    body = [el("tr", *_cells(row, head, kinds)) for row in rows]
    whole = el("table", el("thead", el("tr", *titles)), el("tbody", *body), class_=kind or None)
    return el("div", whole, class_="scroll")


def _cells(row: Sequence[Child], head: Sequence[str], kinds: Mapping[int, str]) -> list[Markup]:
    first, *rest = row
    cells = [el("th", first, scope="row", data_title=head[0])]
    for i, cell in enumerate(rest, start=1):
        cells.append(el("td", cell, data_title=head[i], class_=kinds.get(i)))
    return cells


def shortened(text: str, most: int) -> str:
    """A text of at most ``most`` characters, white space made single."""
    plain = " ".join(text.split())
    return plain if len(plain) <= most else plain[: most - 1].rstrip() + "…"
