"""Runs laid side by side: a table for the terminal, a page with their curves over each other.

`comparison` gathers, `compare` prints, `write_comparison` draws; all three tell the same numbers.
"""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from smolforge.errors import BadInput
from smolforge.files import write_atomically
from smolforge.report.axes import BITS, NATS, NORM, RATE, SPEED, TIME, TOKENS, Unit
from smolforge.report.chart import STRIPS, Chart, Level, Line
from smolforge.report.curves import COLUMNS, smooth, smooth_ratio
from smolforge.report.formatting import MISSING, clean, count, duration, number, percent, size, whole
from smolforge.report.history import History, read_history
from smolforge.report.page import render
from smolforge.report.summary import RunSummary, flatten, outcome, summarize
from smolforge.run import Run

MAX_RUNS = 32
_MAX_PROMPTS = 6
_ABSENT = MISSING

# What is told of each run: the words, the value in words, and the value that is better where small (-1) or large (+1).
_ROWS: tuple[tuple[str, Callable[[RunSummary], str], Callable[[RunSummary], float | None] | None, int], ...] = (
    ("held-out bits per byte", lambda f: number(f.bits_per_byte), lambda f: f.bits_per_byte, -1),
    ("above the source's entropy", lambda f: percent(f.gap), lambda f: f.gap, -1),
    ("held-out loss", lambda f: number(f.validation_loss), lambda f: f.validation_loss, -1),
    ("training loss", lambda f: number(f.loss), lambda f: f.loss, -1),
    ("tokens", lambda f: count(f.tokens, 4), None, 0),
    ("steps", lambda f: whole(f.steps), None, 0),
    ("running time", lambda f: duration(f.seconds), None, 0),
    ("tokens per second", lambda f: count(f.tokens_per_second), lambda f: f.tokens_per_second, 1),
    ("parameters", lambda f: whole(f.parameters), None, 0),
    ("memory at most", lambda f: size(f.peak_memory_bytes), lambda f: f.peak_memory_bytes, -1),
    ("waiting for data", lambda f: percent(f.data_wait), None, 0),
    ("state", lambda f: "done" if f.finished else "not done", None, 0),
)


@dataclass(frozen=True)
class Comparison:
    """Several runs, gathered."""

    names: list[str]
    histories: list[History]
    summary: list[RunSummary]
    rows: list[tuple[str, list[str], int | None]]
    """(what, the value of each run in words, the index of the best or None)"""
    differences: list[tuple[str, list[str]]]
    """(key of the configuration, its value in each run), for keys that are not the same in all."""

    def as_dict(self) -> dict[str, Any]:
        """For `--json`: the numbers of each run, and the keys that differ."""
        return {
            "runs": [summary.as_dict() for summary in self.summary],
            "differences": {key: dict(zip(self.names, values, strict=True)) for key, values in self.differences},
        }


def comparison(runs: Sequence[str | Path | Run]) -> Comparison:
    """Read and lay side by side 1 to `MAX_RUNS` runs, in the order given.

    Raises:
        BadInput: no run, too many, or a path that is none.
    """
    if not 1 <= len(runs) <= MAX_RUNS:
        raise BadInput(f"{len(runs)} runs cannot be compared", field="RUN", hint=f"Give 1 to {MAX_RUNS} of them.")
    histories = [read_history(run) for run in runs]
    summary = [summarize(history) for history in histories]
    names = _names([history.run.path for history in histories])
    flat = [flatten(history.config) for history in histories]
    keys = list(dict.fromkeys(key for config in flat for key in config))
    table = [(key, [config.get(key, _ABSENT) for config in flat]) for key in keys]
    return Comparison(
        names=names,
        histories=histories,
        summary=summary,
        rows=[row for row in (_row(summary, *entry) for entry in _ROWS) if any(value != _ABSENT for value in row[1])],
        differences=[(key, values) for key, values in table if len(set(values)) > 1],
    )


def compare(runs: Sequence[str | Path | Run], *, width: int | None = None) -> str:
    """The comparison as a table of plain text, `width` columns wide (the terminal's, unless given).

    Raises:
        BadInput: no run, too many, or a path that is none.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    found = comparison(runs)
    table = Table(show_edge=False, pad_edge=False, header_style="bold")
    table.add_column("")
    for name in found.names:
        table.add_column(Text(_line(name)), justify="right", overflow="fold")
    for what, values, best in found.rows:
        star = [f"{value} *" if index == best else f"{value}  " for index, value in enumerate(values)]
        table.add_row(what, *(Text(value) for value in star))
    if found.differences:
        table.add_section()
        for key, values in found.differences:
            table.add_row(Text(_line(key)), *(Text(f"{_line(value)}  ") for value in values))
    output = io.StringIO()
    columns = width or max(shutil.get_terminal_size((100, 24)).columns, 60)
    Console(file=output, width=columns, color_system=None, legacy_windows=False).print(table)
    notes = ["* the best"] if any(best is not None for _, _, best in found.rows) else []
    if len(found.names) > 1 and not found.differences:
        notes.append("the configurations are the same")
    return output.getvalue() + "".join(f"{note}\n" for note in notes)


def write_comparison(runs: Sequence[str | Path | Run], path: str | Path) -> Path:
    """Write one self-contained page that lays the runs over each other, and return its path.

    Raises:
        BadInput: no run, too many, or a path that is none.
        RunFailed: no room on the disk.
    """
    found = comparison(runs)
    page = render(
        "compare.html",
        title=clean(" · ".join(found.names) if len(found.names) <= 4 else f"{len(found.names)} runs", 160),
        outcome=_headline(found),
        runs=[(clean(name, 60), _colour(index)) for index, name in enumerate(found.names)],
        rows=found.rows,
        charts=[chart.draw() for chart in _charts(found)],
        stories=_stories(found),
        differences=found.differences,
    )
    path = Path(path)
    write_atomically(path, page)
    return path


def _row(
    summary: list[RunSummary],
    what: str,
    say: Callable[[RunSummary], str],
    value: Callable[[RunSummary], float | None] | None,
    better: int,
) -> tuple[str, list[str], int | None]:
    best = None
    words = [say(f) for f in summary]
    if value is not None and len(summary) > 1:
        known = [(better * number_, index) for index, f in enumerate(summary) if (number_ := value(f)) is not None]
        top = [index for score, index in known if score == max(known)[0]]
        # A difference that the words do not show is no better.
        best = top[0] if top and len(known) > 1 and words.count(words[top[0]]) == 1 else None
    return what, words, best


def _names(paths: list[Path]) -> list[str]:
    """The shortest tails of the paths that tell the runs apart."""
    parts = [path.resolve().parts for path in paths]
    for depth in range(1, 5):
        names = [clean("/".join(part[-depth:]), 80) for part in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{index + 1}: {clean(path, 80)}" for index, path in enumerate(paths)]


def _line(text: str) -> str:
    return " ".join(clean(text, 200).split())


def _headline(found: Comparison) -> str:
    if len(found.names) == 1:
        return outcome(found.summary[0], found.histories[0])
    best = next((best for what, _, best in found.rows if what == "held-out bits per byte"), None)
    if best is None:
        return ""
    bits = number(found.summary[best].bits_per_byte)
    return f"{clean(found.names[best], 80)} predicts held-out text best, at {bits} bits per byte."


def _colour(index: int) -> str:
    return f"c{index % 8 + 1}"


def _charts(found: Comparison) -> list[Chart]:
    # However many the runs, the page has one size.
    strips, columns = max(30, STRIPS // len(found.names)), max(50, 2 * COLUMNS // len(found.names))

    def over(title: str, x: str, x_unit: Unit, column: str, unit: Unit, **more: Any) -> Chart:
        even = {"lr": np.asarray, "grad_norm": smooth_ratio}.get(column, smooth)
        lines = [
            Line(name, history.training[x], even(history.training[column]), "line", _colour(index))
            for index, (name, history) in enumerate(zip(found.names, found.histories, strict=True))
        ]
        return Chart(title, x_unit, unit, lines, strips=strips, columns=columns, **more)

    held_out = [
        Line(name, history.validation["tokens"], history.validation["bits_per_byte"], "points", _colour(index))
        for index, (name, history) in enumerate(zip(found.names, found.histories, strict=True))
    ]
    floors = {history.entropy for history in found.histories if history.entropy}
    levels = [Level("the source's own entropy", floors.pop())] if len(floors) == 1 else []
    return [
        over("Training loss, smoothed", "tokens", TOKENS, "loss", NATS, wide=True),
        Chart("Held-out bits per byte", TOKENS, BITS, held_out, levels=levels, strips=strips),
        over("Loss against time", "seconds", TIME, "loss", NATS),
        over("Learning rate", "tokens", TOKENS, "lr", RATE, log=False, zero=True),
        over("Gradient norm", "tokens", TOKENS, "grad_norm", NORM),
        over("Throughput", "tokens", TOKENS, "tokens_per_second", SPEED, log=False, zero=True),
    ]


def _stories(found: Comparison) -> list[tuple[str, list[tuple[str, str, str]]]]:
    """Prompt by prompt the newest continuation of each run that has it: (prompt, [(run, step, text)])."""
    newest: dict[str, dict[int, dict[str, Any]]] = {}
    for index, history in enumerate(found.histories):
        for row in history.samples:
            prompt = str(row.get("prompt") or "")
            if prompt in newest or len(newest) < _MAX_PROMPTS:
                newest.setdefault(prompt, {})[index] = row
    limit = max(200, 2000 * 8 // (len(found.names) * _MAX_PROMPTS))
    told = []
    for prompt, rows in newest.items():
        cards = [
            (
                clean(found.names[index], 60),
                whole(float(np.float64(row["step"]))),
                clean(str(row.get("text") or "").removeprefix(prompt), limit),
            )
            for index, row in sorted(rows.items())
        ]
        told.append((clean(prompt, 300), cards))
    return told
