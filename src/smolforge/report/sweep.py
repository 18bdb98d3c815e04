"""A sweep for people: the table of its candidates for the terminal and in Markdown, and a page with its curves."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from smolforge.files import write_atomically
from smolforge.formatting import clean, count, duration, number, setting, whole
from smolforge.report.charts import Chart, ChartPage, Columns, Series
from smolforge.report.history import read_history
from smolforge.report.page import render

MAX_CURVES = 8  # colours that can be told apart


def table(rows: Sequence[dict[str, Any]], metric: str) -> tuple[list[str], list[list[str]]]:
    """The head and the rows of the table, as text.

    Args:
        rows: of the candidates, the best first: `values` ({key: value}), `mean`, `spread`, `scores`, `rounds`, `steps`,
            `tokens`, `seconds` and `error`.
        metric: what `mean` is, for the head.
    """
    keys = list(rows[0]["values"])
    head = [*keys, metric, "± (std)", "seeds", "steps", "tokens", "time"]
    lines = []
    for row in rows:
        values = [clean(setting(row["values"][key]), 40) for key in keys]
        scores = [number(row["mean"]), number(row["spread"], 2), str(len(row["scores"]))]
        if row["error"]:
            scores[0] = "failed"
        lines.append([*values, *scores, whole(row["steps"]), count(row["tokens"]), duration(row["seconds"])])
    return head, lines


def failures(rows: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    """(the values of a candidate, why it failed) of those that did."""
    return [(_label(row["values"]), clean(row["error"], 300)) for row in rows if row["error"]]


def markdown(rows: Sequence[dict[str, Any]], metric: str) -> str:
    """The table in Markdown, its columns aligned, and what failed."""
    head, lines = table(rows, metric)
    lines = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    widths = [max(map(len, column)) for column in zip(head, *lines, strict=True)]
    rule = ["-" * (width - 1) + ":" for width in widths]
    text = "".join(
        f"| {' | '.join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))} |\n"
        for line in (head, rule, *lines)
    )
    return text + "".join(f"\n- {values} failed: {error}" for values, error in failures(rows))


def write_sweep_page(
    path: Path, title: str, outcome: str, rows: Sequence[dict[str, Any]], metric: str, runs: Sequence[Path]
) -> None:
    """Write one self-contained page: the table, the metric against each key that has numbers, and held-out curves.

    Args:
        rows: as of `table`.
        runs: of the first seed of each row; directories that may be missing.
    """
    head, lines = table(rows, metric)
    failed = failures(rows)
    tables: list[Columns] = []
    charts = [_curves(rows, runs, tables)]
    charts += [_against(key, rows, tables) for key in rows[0]["values"] if _is_numeric(key, rows)]
    page = ChartPage(tables, charts)
    write_atomically(
        path, render("sweep.html", title=title, outcome=outcome, head=head, lines=lines, failed=failed, page=page)
    )


def _is_numeric(key: str, rows: Sequence[dict[str, Any]]) -> bool:
    values = [row["values"][key] for row in rows]
    return all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values)


def _label(values: dict[str, Any], without: str = "") -> str:
    parts = (f"{key.rpartition('.')[2]} {setting(value)}" for key, value in values.items() if key != without)
    return clean(", ".join(parts), 60)


def _curves(rows: Sequence[dict[str, Any]], runs: Sequence[Path], tables: list[Columns]) -> Chart:
    """Held-out bits per byte through time, of the first seed of the best candidates."""
    series = []
    for row, run in zip(rows, runs, strict=True):
        if run.is_dir() and len(series) < MAX_CURVES:
            series.append(Series("bits_per_byte", _label(row["values"]), "points", len(series) + 1, len(tables)))
            tables.append(read_history(run).validation)
    return Chart("Held-out bits per byte of the best, first seed", "bits", series, wide=True)


def _against(key: str, rows: Sequence[dict[str, Any]], tables: list[Columns]) -> Chart:
    """The metric against a key: a line for each combination of the others, or of many combinations the best."""
    last = max(row["rounds"] for row in rows)
    lines: dict[str, dict[float, float]] = defaultdict(dict)
    for row in rows:
        if row["mean"] is not None and row["rounds"] == last:
            lines[_label(row["values"], without=key)][float(row["values"][key])] = row["mean"]
    if len(lines) > MAX_CURVES or max(map(len, lines.values())) < 2:
        best: dict[float, float] = {}
        for line in lines.values():
            best |= {x: min(y, best.get(x, math.inf)) for x, y in line.items()}
        lines = {"best of the others": best}
    series = []
    for label, line in lines.items():
        series.append(Series("score", label or "mean over seeds", "points", len(series) + 1, len(tables)))
        places = np.array(sorted(line))
        scores = np.array([line[x] for x in places])
        tables.append({"value": places, "score": scores, "step": np.full(len(places), np.nan)})
    return Chart(f"Against {key}", "bits", series, x="value")
