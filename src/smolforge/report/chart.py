"""One plot as inline SVG that fits every width.

Words keep their size while the curves stretch: text is placed in percent of the plot, and the curves live in an
inner SVG of 1000 x 1000 units that is stretched to it with strokes that are not. Points are lines of no length with
round ends, since circles would become eggs. Hover text is a `<title>` per strip of the plot, so that it works without
any script; the page's script only makes it prettier.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape

import numpy as np
from markupsafe import Markup

from smolforge.report.axes import Axis, Unit, make_axis
from smolforge.report.curves import COLUMNS, sample, thin, typical_range
from smolforge.report.formatting import clean

STRIPS = 160
"""Hover strips of one plot."""
MAX_MARKS = 60
_LOG_FROM = 4.0
"""Where the largest value is this many times the smallest, a logarithmic axis shows more."""


@dataclass(frozen=True)
class Line:
    """One curve, or one series of points."""

    label: str
    x: np.ndarray
    y: np.ndarray
    kind: str = "line"
    """line, raw (faint, behind), points (a line with dots)."""
    colour: str = "c1"
    """CSS class: c1 to c8."""


@dataclass(frozen=True)
class Level:
    """A horizontal line at a value that matters: a floor, a limit."""

    label: str
    value: float
    side: str = "left"
    """Where the label stands: left or right, whichever the curve leaves free."""


@dataclass(frozen=True)
class Mark:
    """A vertical line where something happened."""

    kind: str
    label: str
    x: float


@dataclass(frozen=True)
class Chart:
    """A plot to be drawn; nothing in it is trusted to be clean text."""

    title: str
    x_unit: Unit
    y_unit: Unit
    lines: Sequence[Line]
    levels: Sequence[Level] = ()
    marks: Sequence[Mark] = ()
    log: bool | None = None
    """A logarithmic y axis; where None, if the values span a factor of `_LOG_FROM`."""
    note: str = ""
    wide: bool = False
    hint: Callable[[float], str] | None = None
    """More words about an x, for the hover text."""
    zero: bool = False
    """Whether the y axis starts at zero."""
    strips: int = STRIPS
    columns: int = COLUMNS
    """Pixel columns that each curve is thinned to."""
    legend: Sequence[tuple[str, str, str]] = field(default=())
    """(kind, colour, label) instead of the lines' own."""

    @property
    def empty(self) -> bool:
        """Whether there is nothing to draw."""
        return not any((np.isfinite(line.x) & np.isfinite(line.y)).any() for line in self.lines)

    def draw(self) -> Markup:
        """The `<figure>`, or nothing where the chart is empty."""
        if self.empty:
            return Markup("")
        thinned = [(line, *thin(line.x, line.y, self.columns)) for line in self.lines]
        x_axis = self._x_axis(thinned)
        y_axis = self._y_axis()
        parts = [self._grid(x_axis, y_axis)]
        parts.append('<svg class="curves" viewBox="0 0 1000 1000" preserveAspectRatio="none">')
        parts += [_mark(mark, x_axis) for mark in _few(self.marks, MAX_MARKS)]
        parts += [_path(line, x_axis.place(x), y_axis.place(y)) for line, x, y in sorted(thinned, key=_behind_first)]
        parts.append('<path class="cursor" d=""/>')
        parts += self._strips(x_axis, y_axis)
        parts.append("</svg>")
        parts += [_level(level, y_axis) for level in self.levels]
        unit = " · ".join(filter(None, [self.y_unit.name, "log scale" if y_axis.log else ""]))
        label = escape(clean(f"{self.title} against {self.x_unit.name}; {unit}"))
        return Markup(
            f'<figure class="chart{" wide" if self.wide else ""}"><figcaption><b>{escape(clean(self.title))}</b> '
            f'<span class="unit">{escape(unit)}</span>'
            f"{self._legend()}</figcaption>"
            f'<div class="plot"><svg class="frame" role="img" aria-label="{label}">{"".join(parts)}</svg></div>'
            + (f'<p class="note">{escape(clean(self.note))}</p>' if self.note else "")
            + "</figure>"
        )

    def _x_axis(self, thinned: list[tuple[Line, np.ndarray, np.ndarray]]) -> Axis:
        xs = np.concatenate([x for _, x, _ in thinned])
        low, high = float(xs.min()), float(xs.max())
        # Runs start at nothing seen; a plot that begins at its first row would hide the steepest part.
        return make_axis(min(0.0, low), high if high > 0 else 1.0, self.x_unit, number=8, tight=True)

    def _y_axis(self) -> Axis:
        ranges = [typical_range(line.y[np.isfinite(line.x)]) for line in self.lines]
        values = [value for found in ranges if found for value in found] + [level.value for level in self.levels]
        low, high = min(values), max(values)
        log = low > 0 and high / low >= _LOG_FROM if self.log is None else self.log and low > 0
        return make_axis(0.0 if self.zero and not log else low, high, self.y_unit, log=log, number=5)

    def _grid(self, x_axis: Axis, y_axis: Axis) -> str:
        rows = [
            f'<line class="grid" x1="0" x2="100%" y1="{_at(1 - place)}" y2="{_at(1 - place)}"/>'
            f'<text class="y" x="-8" y="{_at(1 - place)}" dy=".33em">{escape(label)}</text>'
            for place, label in y_axis.ticks
        ]
        many = len(x_axis.ticks) > 5
        columns = [
            f'<g class="{"sparse" if many and index % 2 else "tick"}">'
            f'<line class="grid" x1="{_at(place)}" x2="{_at(place)}" y1="0" y2="100%"/>'
            f'<text class="x" x="{_at(place)}" y="100%" dy="18">{escape(label)}</text></g>'
            for index, (place, label) in enumerate(x_axis.ticks)
        ]
        axis = '<line class="axis" x1="0" x2="100%" y1="100%" y2="100%"/>'
        name = f'<text class="x name" x="100%" y="100%" dy="34">{escape(self.x_unit.name)}</text>'
        return "".join([*columns, *rows, axis, name])

    def _legend(self) -> str:
        entries = list(self.legend) or [(line.kind, line.colour, line.label) for line in self.lines if len(line.x)]
        if len(entries) < 2:
            entries = []
        if self.marks:
            kinds = list(dict.fromkeys(mark.kind for mark in self.marks))
            entries.append(("event", "", ", ".join(kinds[:3]) + (" …" if len(kinds) > 3 else "")))
        return "".join(
            f'<span class="key {escape(kind)} {escape(colour)}"><i></i>{escape(clean(label, 120))}</span>'
            for kind, colour, label in entries
        )

    def _strips(self, x_axis: Axis, y_axis: Axis) -> list[str]:
        """Invisible strips with what the curves say there; each stands at a row that really is."""
        anchor = max(self.lines, key=lambda line: int(np.isfinite(line.y).sum()))
        known = np.isfinite(anchor.x) & np.isfinite(anchor.y)
        rows = anchor.x[known]
        places = np.unique(np.linspace(0, len(rows) - 1, min(self.strips, len(rows))).round().astype(int))
        if len(rows) > self.strips:  # rows may be anything but even in x; strips are to be
            even = np.linspace(rows[0], rows[-1], self.strips)
            places = np.unique(np.searchsorted(rows, even).clip(0, len(rows) - 1))
        at = np.unique(rows[places])
        edges = np.concatenate([[0.0], (x_axis.place(at)[1:] + x_axis.place(at)[:-1]) / 2, [1.0]]) * 1000
        said: list[tuple[Line, np.ndarray, np.ndarray]] = []
        for line in self.lines:
            finite = np.isfinite(line.x) & np.isfinite(line.y)
            x, y = line.x[finite], line.y[finite]
            values = sample(x, y, at)
            if line.kind == "points" and line is not anchor and len(x):
                # A point speaks only in the strip that it stands in, not in all the strips between two points.
                owner = np.searchsorted(edges[1:-1], x_axis.place(x) * 1000)
                values = np.full(len(at), np.nan)
                values[owner] = y
            said.append((line, values, y_axis.place(values) * 1000))
        return [self._strip(index, at, edges, x_axis, said) for index in range(len(at))]

    def _strip(
        self,
        index: int,
        at: np.ndarray,
        edges: np.ndarray,
        x_axis: Axis,
        said: list[tuple[Line, np.ndarray, np.ndarray]],
    ) -> str:
        x = float(at[index])
        head = self.x_unit.words(x) + (f" · {self.hint(x)}" if self.hint else "")
        spoken = [(line, values[index], y[index]) for line, values, y in said if np.isfinite(values[index])]
        words = [head, *(f"{line.label}: {self.y_unit.words(float(value))}" for line, value, _ in spoken)]
        left, right = float(edges[index]), float(edges[index + 1])
        near = [mark.label for mark in self.marks if left <= 1000 * float(x_axis.place(np.array([mark.x]))[0]) < right]
        words += near[:3]
        dots = " ".join(f"{1000 - y:.0f}" for _, _, y in spoken)
        place = 1000 * float(x_axis.place(at[index : index + 1])[0])
        return (
            f'<rect class="hit" x="{left:.1f}" width="{max(0.1, right - left):.1f}" height="1000" '
            f'data-x="{place:.1f}" data-y="{dots}">'
            f"<title>{escape(clean(chr(10).join(words), 600))}</title></rect>"
        )


def _at(place: float) -> str:
    return f"{100 * place:.2f}%"


def _behind_first(entry: tuple[Line, np.ndarray, np.ndarray]) -> int:
    return {"raw": 0, "line": 1, "points": 2}.get(entry[0].kind, 1)


def _path(line: Line, x: np.ndarray, y: np.ndarray) -> str:
    if not len(x):
        return ""
    points = [f"{1000 * a:.1f} {1000 - 1000 * b:.1f}" for a, b in zip(x.tolist(), y.tolist(), strict=True)]
    drawn = f'<path class="{line.kind} {line.colour}" d="M{"L".join(points)}"/>' if len(points) > 1 else ""
    if line.kind == "points" or len(points) == 1:
        dots = "".join(f"M{point}h0" for point in points if len(points) <= 120)
        drawn += f'<path class="dots {line.colour}" d="{dots}"/>' if dots else ""
    return drawn


def _mark(mark: Mark, x_axis: Axis) -> str:
    x = 1000 * float(x_axis.place(np.array([mark.x]))[0])
    return f'<path class="mark" d="M{x:.1f} 0V1000"/>' if np.isfinite(x) else ""


def _level(level: Level, y_axis: Axis) -> str:
    place = _at(1 - float(y_axis.place(np.array([level.value]))[0]))
    x, shift = ("100%", 0) if level.side == "right" else ("0", 4)
    return (
        f'<line class="level" x1="0" x2="100%" y1="{place}" y2="{place}"/>'
        f'<text class="level {escape(level.side)}" x="{x}" dx="{shift}" y="{place}" dy="-6">'
        f"{escape(clean(level.label, 120))}</text>"
    )


def _few(items: Sequence[Mark], most: int) -> list[Mark]:
    if len(items) <= most:
        return list(items)
    return [items[round(index)] for index in np.linspace(0, len(items) - 1, most)]
