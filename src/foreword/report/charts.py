"""The report's charts: lines, intervals, a reliability diagram, dots and bars."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from foreword.report.facts import Bin, Point
from foreword.report.markup import Markup, el, shortened
from foreword.report.svg import (
    BOTTOM,
    HEIGHT,
    LEFT,
    RIGHT,
    TOP,
    WIDTH,
    Scale,
    across,
    bottom_axis,
    chart,
    frame,
    line,
    upward,
)

POINTS = 240
"""Most points of a line: more than that the eye cannot tell apart at this size."""
ROW = 40
"""Height of a row of a row chart."""
COLOURS = 6
TICK_WIDTH = 44
"""Room a tick's number takes."""


@dataclass(frozen=True)
class Line:
    """A line of a chart; ``kind`` is its class: strong, thin or faint."""

    points: Sequence[Point]
    kind: str = "strong"


@dataclass(frozen=True)
class Marks:
    """A row of a row chart: dots on a horizontal scale, with an interval where there is one."""

    name: str
    dots: Sequence[float]
    interval: Sequence[float] = ()
    kind: str = "plain"


def line_chart(lines: Sequence[Line], x_title: str, y_title: str) -> Markup:
    """Lines over steps; those that matter are drawn last, above the others."""
    xs, ys = zip(*(p for one in lines for p in one.points), strict=True)
    x, y = across([0, *xs], low=0), upward(ys)
    order = sorted(lines, key=lambda one: one.kind == "strong")
    drawn = [line([(x(a), y(b)) for a, b in thinned(one.points)], one.kind) for one in order]
    return chart(f"{y_title} by {x_title}", frame(x, y, x_title, y_title), *drawn)


def thinned(points: Sequence[Point], most: int = POINTS) -> Sequence[Point]:
    """At most ``most`` points, each the mean of those it stands for."""
    if len(points) <= most:
        return points
    cuts = [round(i * len(points) / most) for i in range(most + 1)]
    groups = [points[a:b] for a, b in itertools.pairwise(cuts)]
    return [(sum(p[0] for p in g) / len(g), sum(p[1] for p in g) / len(g)) for g in groups]


def smoothed(points: Sequence[Point], window: int) -> list[Point]:
    """The mean of each value and those up to ``window - 1`` before it."""
    found, total = [], 0.0
    for i, (x, y) in enumerate(points):
        total += y - (points[i - window][1] if i >= window else 0.0)
        found.append((x, total / min(i + 1, window)))
    return found


def row_chart(rows: Sequence[Marks], title: str, low: float | None = None, high: float | None = None) -> Markup:
    """Names one under the other, each with its dots and interval on one scale."""
    values = [v for r in rows for v in (*r.dots, *r.interval)]
    x = across([*values, *([high] if high is not None else [])], low=low, pad=0.0 if high is not None else 0.08)
    x = Scale(x.low, x.high, 14, WIDTH - RIGHT)
    bottom = len(rows) * ROW + 6
    grid = [el("line", x1=x(t), x2=x(t), y1=4, y2=bottom, class_="grid") for t in x.ticks]
    parts = [part for i, row in enumerate(rows) for part in _marked(row, x, i * ROW + 18)]
    name = el("text", title, x=WIDTH / 2, y=bottom + 36, text_anchor="middle", class_="title")
    return chart(title, *grid, *parts, *bottom_axis(x, bottom), name, height=bottom + 42)


def _marked(row: Marks, x: Scale, y: float) -> list[Markup]:
    parts = [el("text", shortened(row.name, 56), x=x.start, y=y, class_=f"name {row.kind}")]
    if row.interval:
        low, high = (x(v) for v in row.interval)
        parts.append(el("line", x1=low, x2=high, y1=y + 13, y2=y + 13, class_=f"whisker {row.kind}"))
    dots = [el("circle", cx=x(v), cy=y + 13, r=5, class_=f"dot {row.kind}") for v in row.dots]
    return parts + dots


def reliability_chart(bins: Sequence[Bin]) -> Markup:
    """Accuracy by stated probability; the diagonal is what perfect calibration would be, areas are rows."""
    x, y = Scale(0, 1, LEFT, WIDTH - RIGHT), Scale(0, 1, HEIGHT - BOTTOM, TOP)
    most = max(b.rows for b in bins)
    diagonal = line([(x(0), y(0)), (x(1), y(1))], "reference")
    gaps = [
        el("line", x1=x(b.confidence), x2=x(b.confidence), y1=y(b.confidence), y2=y(b.accuracy), class_="gap")
        for b in bins
    ]
    dots = [
        el(
            "circle", el("title", f"{b.rows} rows: said {b.confidence:.2f}, right {b.accuracy:.2f}"),
            cx=x(b.confidence), cy=y(b.accuracy), r=round(3 + 7 * math.sqrt(b.rows / most), 1),
            class_="dot strong soft",
        )
        for b in bins
    ]  # fmt: skip
    axes = frame(x, y, "probability of the class it said", "share of rows that were right")
    return chart("reliability diagram", axes, diagonal, *gaps, *dots)


def scatter_chart(groups: Mapping[str, Sequence[Point]], x_title: str, y_title: str) -> Markup:
    """Dots over a logarithmic axis, one colour a group."""
    xs, ys = zip(*(p for points in groups.values() for p in points), strict=True)
    x, y = across(xs, log=True), upward(ys, pad=0.12)
    dots = [
        el("circle", cx=x(a), cy=y(b), r=5, class_=f"dot soft {colour(i)}")
        for i, points in enumerate(groups.values())
        for a, b in points
    ]
    return chart(f"{y_title} by {x_title}", frame(x, y, x_title, y_title, _own_ticks(xs, x)), *dots)


def _own_ticks(values: Sequence[float], x: Scale) -> list[float] | None:
    """The values themselves, where they are few and lie apart; else None: the scale's ticks."""
    own = sorted(set(values))
    apart = all(x(b) - x(a) >= TICK_WIDTH for a, b in itertools.pairwise(own))
    return own if apart else None


def colour(i: int) -> str:
    """The class of the ``i``-th colour."""
    return f"colour{i % COLOURS}"


def legend(names: Sequence[str]) -> Markup:
    """Which colour is what."""
    items = [el("li", el("i", class_=f"key {colour(i)}"), shortened(n, 40)) for i, n in enumerate(names)]
    return el("ul", *items, class_="legend")


def bar_chart(
    values: Mapping[int, float], intervals: Mapping[int, tuple[float, float]], x_title: str, y_title: str
) -> Markup:
    """A bar with its interval for each virtual token, up or down from 0; tokens are counted from 1 as in the table."""
    first, last = min(values) + 1, max(values) + 1
    x = Scale(first - 0.7, last + 0.7, LEFT, WIDTH - RIGHT)
    y = upward([0.0, *values.values(), *itertools.chain(*intervals.values())], pad=0.08)
    wide = max(min(28.0, 0.7 * (x(2) - x(1))), 2.0)
    bars = []
    for i, value in values.items():
        top, bottom = sorted((y(0), y(value)))
        bars.append(
            el(
                "rect", el("title", f"{i + 1}: {value:+.4f}"), x=round(x(i + 1) - wide / 2, 1), y=top,
                width=round(wide, 1), height=round(max(bottom - top, 0.5), 1),
                class_="bar" if value >= 0 else "bar less",
            )
        )  # fmt: skip
    lines = [
        el("line", x1=x(i + 1), x2=x(i + 1), y1=y(low), y2=y(high), class_="range")
        for i, (low, high) in intervals.items()
    ]
    ticks = [t for t in x.ticks if t == int(t) and first <= t <= last]
    zero = el("line", x1=LEFT, x2=WIDTH - RIGHT, y1=y(0), y2=y(0), class_="axis")
    return chart(f"{y_title} by {x_title}", frame(x, y, x_title, y_title, ticks), *bars, *lines, zero)
