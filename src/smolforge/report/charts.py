"""The data of the charts: tables of numbers and what to draw of them, as one JSON object that uPlot's page reads.

A run may have a million rows and a chart has a thousand pixels. `thin` keeps the lowest and the highest value of each
bucket of a column, so a single spike among a million rows is still drawn.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise

import numpy as np

from smolforge.formatting import clean, number

Columns = dict[str, np.ndarray]
BUCKETS = 300  # equal parts of the x axis that a long table is thinned to
MAX_MARKS = 60
_LOG_FROM = 4.0  # largest over smallest value, from which on a logarithmic axis shows more

# By the name of a unit: what the caption says. charts.js has the same names, with their ticks.
UNITS = {
    "tokens": "tokens", "seconds": "time", "nats": "nats per token", "bits": "bits per byte", "rate": "",
    "norm": "before clipping", "speed": "tokens per second", "bytes": "", "share": "share of time",
    "peak": "share of the peak", "value": "value",
}  # fmt: skip


@dataclass(frozen=True)
class Series:
    """One curve: a column of a table. `kind` is line, raw (faint, behind the others) or points (a line with dots)."""

    column: str
    label: str
    kind: str = "line"
    colour: int = 1
    table: int = 0


@dataclass(frozen=True)
class Level:
    """A horizontal line at a value such as a limit; its label is on the side that the curve leaves free."""

    label: str
    value: float
    side: str = "left"


@dataclass(frozen=True)
class Mark:
    """A vertical line where something happened, at its place on each x axis."""

    kind: str
    label: str
    tokens: float
    seconds: float | None


@dataclass(frozen=True)
class Chart:
    """What to draw. `zero`: a linear y axis from zero; else the values decide between linear and logarithmic."""

    title: str
    y: str
    series: Sequence[Series]
    x: str = "tokens"
    levels: Sequence[Level] = ()
    marks: bool = False
    zero: bool = False
    wide: bool = False
    note: str = ""


class ChartPage:
    """The charts of one page, with the tables they draw from. Charts without a value are left out.

    Args:
        tables: columns of equal length; every table has the x columns that charts use.
        charts: the charts, in their order.
        marks: events, drawn in the charts that ask for them.
    """

    def __init__(self, tables: Sequence[Columns], charts: Sequence[Chart], marks: Sequence[Mark] = ()) -> None:
        self._tables = tables
        self.charts = [_Drawn(chart, tables) for chart in charts if any(map(len, _values(chart, tables)))]
        chosen = np.linspace(0, len(marks) - 1, min(len(marks), MAX_MARKS))
        self._marks = [marks[round(index)] for index in chosen]
        self.mark_kinds = ", ".join(list(dict.fromkeys(mark.kind for mark in marks))[:3])

    def to_json(self) -> str:
        """The JSON object, fit for a `<script>` element."""
        used: list[set[str]] = [{"step"} for _ in self._tables]
        for drawn in self.charts:
            for series in drawn.chart.series:
                used[series.table] |= {series.column, drawn.chart.x}
        data = {
            "tables": [
                {name: _json_column(name, values) for name, values in table.items() if name in names}
                for table, names in zip(self._tables, used, strict=True)
            ],
            "charts": [drawn.options for drawn in self.charts],
            "marks": [asdict(mark) for mark in self._marks],
        }
        return json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


class _Drawn:
    """A chart with what follows from its values: range, scale, and the description for who cannot see it."""

    def __init__(self, chart: Chart, tables: Sequence[Columns]) -> None:
        self.chart = chart
        found = _values(chart, tables)
        low, high = self._range([values for values in found if len(values)])
        self.log = bool(0 < low * _LOG_FROM <= high and not chart.zero)
        if chart.zero:
            low, high = min(low, 0.0), max(high, 0.0)
        low, high = _padded(low, high, self.log)
        self.unit = " · ".join(filter(None, [UNITS[chart.y], "log scale" if self.log else ""]))
        self.options = asdict(chart) | {"log": self.log, "low": float(f"{low:.6g}"), "high": float(f"{high:.6g}")}
        parts = [
            f"{series.label} from {number(values[0])} to {number(values[-1])}"
            for series, values in zip(chart.series, found, strict=True)
            if len(values) and series.kind != "raw"
        ] + [f"{level.label} at {number(level.value)}" for level in chart.levels]
        unit = f", {UNITS[chart.y]}" if UNITS[chart.y] else ""
        self.description = clean(f"{chart.title} against {UNITS[chart.x]}{unit}: {'; '.join(parts)}", 400)

    def _range(self, found: Sequence[np.ndarray]) -> tuple[float, float]:
        """The range of 99.8% of each series, so that a single spike does not flatten a chart, and of all levels."""
        ends = [np.quantile(v, [0.001, 0.999]) if len(v) > 200 else (v.min(), v.max()) for v in found]
        values = [float(value) for pair in ends for value in pair] + [level.value for level in self.chart.levels]
        return min(values), max(values)


def _values(chart: Chart, tables: Sequence[Columns]) -> list[np.ndarray]:
    """The values that each series of `chart` draws."""
    curves = [(tables[series.table][chart.x], tables[series.table][series.column]) for series in chart.series]
    return [y[np.isfinite(x) & np.isfinite(y)] for x, y in curves]


def _padded(low: float, high: float, log: bool) -> tuple[float, float]:
    if log:
        return low / 1.06, high * 1.06
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        half = 0.5 * abs(high) or 1.0
        return (max(low - half, 0.0) if high >= 0 else low - half), high + half
    margin = 0.06 * (high - low)
    return (low - margin if low - margin >= 0 or low < 0 else 0.0), high + margin


def _json_column(name: str, values: np.ndarray) -> list[float | None]:
    """Steps and tokens exactly, other numbers in 5 digits, None for NaN."""
    to_json = int if name in ("step", "tokens") else lambda value: float(f"{value:.5g}")
    return [to_json(value) if math.isfinite(value) else None for value in values.tolist()]


def smooth(values: np.ndarray, share: float = 0.01) -> np.ndarray:
    """Centred running mean over a window of 2 x `share` of the curve; NaN counts as absent.

    The window shrinks towards the start, where a loss falls steeply and a wide window would draw a plateau that
    is not in the data; at the end it is cut, and the last value is the mean of the last `share` of the rows.
    """
    size = len(values)
    if not size:
        return np.asarray(values, dtype=float)
    finite = np.isfinite(values)
    total = np.concatenate([[0.0], np.cumsum(np.where(finite, values, 0.0))])
    number = np.concatenate([[0], np.cumsum(finite)])
    index = np.arange(size)
    half = np.minimum(max(2, round(share * size)), index // 2)
    low, high = index - half, np.minimum(index + half, size - 1) + 1
    present = number[high] - number[low]
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(present > 0, (total[high] - total[low]) / present, np.nan)


def smooth_ratio(values: np.ndarray) -> np.ndarray:
    """`smooth` by the geometric mean, for positive quantities whose spikes are many times their usual size."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.exp(smooth(np.log(np.where(values > 0, values, np.nan))))


def thin(table: Columns, *, x: str, extremes: Sequence[str], buckets: int = BUCKETS) -> Columns:
    """The rows of `table` that a chart needs: of each bucket the first, the last, and every column's extremes.

    Args:
        table: columns of n values; `x` does not decrease. Rows whose x is NaN are left out.
        x: the column that is cut into `buckets` equal parts.
        extremes: columns whose lowest and highest value of each bucket are kept; NaN is absent.

    Returns:
        The same columns with at most (2 + 2 * len(extremes)) * buckets rows, in order.
    """
    known = np.isfinite(table[x])
    table = {name: values[known] for name, values in table.items()}
    at = table[x]
    if len(at) <= 2 * buckets:
        return table
    span = at[-1] - at[0]
    bucket = np.floor((at - at[0]) / (span or 1.0) * buckets).clip(0, buckets - 1).astype(int)
    starts = np.flatnonzero(np.diff(bucket, prepend=-1)).tolist()
    rows: set[int] = set()
    for low, high in pairwise([*starts, len(at)]):
        rows |= {low, high - 1}
        for name in extremes:
            present = low + np.flatnonzero(np.isfinite(table[name][low:high]))
            if len(present):
                values = table[name][present]
                rows |= {int(present[values.argmin()]), int(present[values.argmax()])}
    kept = sorted(rows)
    return {name: values[kept] for name, values in table.items()}
