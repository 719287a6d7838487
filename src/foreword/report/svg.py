"""Axes of small charts as SVG: scales, ticks and the frame. Colours come from the page's style sheet."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from foreword.report.markup import Markup, el, joined

WIDTH, HEIGHT = 440, 250
"""Of a chart, in its own units (about a pixel each)."""
LEFT, RIGHT, TOP, BOTTOM = 46, 14, 30, 40
TICKS = 5
SAME = 1e-3
"""Values that differ by less, as a share of themselves, are not drawn apart."""


@dataclass(frozen=True)
class Scale:
    """From a number to a place: ``low`` lies at ``start``, ``high`` at ``end``."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """The place of a value."""
        low, high, x = (math.log10(v) if self.log else v for v in (self.low, self.high, value))
        return round(self.start + (x - low) / (high - low) * (self.end - self.start), 1)

    @property
    def ticks(self) -> list[float]:
        """Round numbers inside: multiples of 1, 2 or 5 times a power of ten; of a log scale 1, 2 and 5 themselves."""
        if self.log:
            return _log_ticks(self.low, self.high)
        step = _step(self.high - self.low)
        first = math.ceil(self.low / step - 1e-9)
        return [i * step for i in range(first, math.floor(self.high / step + 1e-9) + 1)]

    def label(self, value: float) -> str:
        """A tick's number, with as many digits as tell it from the next."""
        if self.log or abs(value) >= 1e5:
            return f"{value:.3g}"
        return f"{value:.{max(0, -math.floor(math.log10(_step(self.high - self.low)) + 1e-9))}f}"


def across(values: Sequence[float], log: bool = False, low: float | None = None, pad: float = 0.0) -> Scale:
    """A horizontal scale around values."""
    return _around(values, LEFT, WIDTH - RIGHT, log, low, pad)


def upward(values: Sequence[float], low: float | None = None, pad: float = 0.05) -> Scale:
    """A vertical scale around values."""
    return _around(values, HEIGHT - BOTTOM, TOP, False, low, pad)


def frame(x: Scale, y: Scale, x_title: str, y_title: str, ticks: Sequence[float] | None = None) -> Markup:
    """Grid, tick labels and titles; the vertical axis has its title on top, where it needs no turned head.

    ``ticks`` are those of the horizontal axis, where the scale's own would not do.
    """
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    parts = []
    for value in y.ticks:
        at = y(value)
        parts.append(el("line", x1=LEFT, x2=right, y1=at, y2=at, class_="grid"))
        parts.append(el("text", y.label(value), x=LEFT - 8, y=at + 4, text_anchor="end"))
    parts += bottom_axis(x, bottom, ticks)
    parts.append(el("text", y_title, x=4, y=16, class_="title"))
    parts.append(el("text", x_title, x=(LEFT + right) / 2, y=HEIGHT - 4, text_anchor="middle", class_="title"))
    return joined(parts)


def bottom_axis(x: Scale, at: float, ticks: Sequence[float] | None = None) -> list[Markup]:
    """The horizontal axis with its tick labels, at a height."""
    parts = [el("line", x1=x.start, x2=x.end, y1=at, y2=at, class_="axis")]
    for value in x.ticks if ticks is None else ticks:
        parts.append(el("line", x1=x(value), x2=x(value), y1=at, y2=at + 4, class_="axis"))
        parts.append(el("text", x.label(value), x=x(value), y=at + 17, text_anchor="middle"))
    return parts


def chart(says: str, *parts: object, height: float = HEIGHT) -> Markup:
    """An SVG that grows with the page; ``says`` is for those who cannot see it."""
    return el("svg", *parts, viewBox=f"0 0 {WIDTH} {height:g}", role="img", aria_label=says, class_="chart")


def line(points: Sequence[tuple[float, float]], kind: str) -> Markup:
    """A line through places; one point alone is a dot."""
    if len(points) == 1:
        ((x, y),) = points
        return el("circle", cx=x, cy=y, r=3, class_=f"{kind} dot")
    return el("path", d="M" + "L".join(f"{x:g},{y:g}" for x, y in points), class_=kind)


def _around(values: Sequence[float], start: float, end: float, log: bool, low: float | None, pad: float) -> Scale:
    least, most = (min(values) if low is None else low), max(values)
    if log:
        return Scale(least / 1.6, most * 1.6, start, end, log=True)
    room = (most - least) * pad
    if most - least <= SAME * abs(most):  # as good as one value: some room on both sides of it
        room = abs(most) * 0.1 or 0.5
    return Scale(least - (room if low is None or most <= least else 0), most + room, start, end)


def _step(span: float) -> float:
    raw = span / TICKS
    power = 10.0 ** math.floor(math.log10(raw))
    return next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)


def _log_ticks(low: float, high: float) -> list[float]:
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    multiples = (1, 2, 5) if len(powers) <= 3 else (1,)
    found = [m * 10.0**p for p in powers for m in multiples if low <= m * 10.0**p <= high]
    return found or [low, high]
