"""Compare runs: a table for the terminal, and a page with their curves in the same charts.

`comparison` collects the numbers, `compare` prints them and `write_comparison` draws them.
"""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable, Hashable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from smolforge.errors import BadInput, CheckpointError
from smolforge.files import write_atomically
from smolforge.formatting import MISSING, clean, count, duration, flatten, number, percent, size, whole
from smolforge.report.charts import BUCKETS, Chart, ChartPage, Columns, Level, Series, smooth, smooth_ratio, thin
from smolforge.report.history import History, RunSummary, describe, read_history, summarize
from smolforge.report.page import continuation, group_samples, render
from smolforge.run import Run

MAX_RUNS = 32
DIFFERENT_TEXTS = "the held-out texts differ, so no score is called the best"
_MAX_PROMPTS = 6

# Values that depend on the text that was scored, and those that depend on the tokenizer as well.
_OF_TEXT = ("bits_per_byte", "gap", "validation_loss", "loss")
_OF_TOKENS = ("validation_loss", "loss")
# Of each run: the label, the value, its format, and whether it is better where small (-1) or large (+1).
_ROWS: tuple[tuple[str, str, Callable[[Any], str], int], ...] = (
    ("held-out bits per byte", "bits_per_byte", number, -1),
    ("above the source's entropy", "gap", percent, -1),
    ("held-out loss", "validation_loss", number, -1),
    ("training loss", "loss", number, -1),
    ("tokens", "tokens", lambda tokens: count(tokens, 4), 0),
    ("steps", "steps", whole, 0),
    ("running time", "seconds", duration, 0),
    ("tokens per second", "tokens_per_second", count, 1),
    ("parameters", "parameters", whole, 0),
    ("peak memory", "peak_memory_bytes", size, -1),
    ("waiting for data", "data_wait", percent, 0),
    ("state", "finished", lambda finished: "done" if finished else "not done", 0),
)


@dataclass(frozen=True)
class Comparison:
    """Several runs."""

    names: list[str]
    histories: list[History]
    summaries: list[RunSummary]
    rows: list[tuple[str, list[str], int | None]]  # label, the value of each run as text, the index of the best
    differences: list[tuple[str, list[str]]]  # keys of the configuration that differ, with their value in each run
    same_text: bool  # all runs were scored on the same held-out text; else no score is called the best

    def as_dict(self) -> dict[str, Any]:
        """For `--json`: the numbers of each run, and the keys that differ."""
        return {
            "runs": [asdict(summary) for summary in self.summaries],
            "same_held_out_text": self.same_text,
            "differences": {key: dict(zip(self.names, values, strict=True)) for key, values in self.differences},
        }


def comparison(runs: Sequence[str | Path | Run]) -> Comparison:
    """Read 1 to `MAX_RUNS` runs, in the order given; BadInput for other numbers, or a path without a run."""
    if not 1 <= len(runs) <= MAX_RUNS:
        raise BadInput(f"{len(runs)} runs cannot be compared", field="RUN", hint=f"Give 1 to {MAX_RUNS} of them.")
    histories = [read_history(run) for run in runs]
    summaries = [summarize(history) for history in histories]
    scored = [history for history in histories if len(history.validation["step"])]
    same_text = len({_scored_text(history) for history in scored}) <= 1
    same_tokens = same_text and len({_tokens(history) for history in scored}) <= 1
    incomparable = (() if same_text else _OF_TEXT) + (() if same_tokens else _OF_TOKENS)
    rows = [
        _row(summaries, label, field, say, 0 if field in incomparable else better)
        for label, field, say, better in _ROWS
    ]
    settings = [flatten(history.config) for history in histories]
    keys = list(dict.fromkeys(key for flat in settings for key in flat))
    table = [(key, [flat.get(key, MISSING) for flat in settings]) for key in keys]
    return Comparison(
        names=_names([history.run.path for history in histories]),
        histories=histories,
        summaries=summaries,
        rows=[row for row in rows if any(value != MISSING for value in row[1])],
        differences=[(key, values) for key, values in table if len(set(values)) > 1],
        same_text=same_text,
    )


def _scored_text(history: History) -> Hashable:
    """What decides the text that a run is scored on: equal where the scores of two runs can be compared.

    The hash of the data index says what the sources hold, wherever they are; their names count where there is none.
    """
    sources = history.setting("data.sources")
    sources = sources if isinstance(sources, dict) else {}
    try:
        index = history.run.read_index() or {}
    except CheckpointError:
        index = {}
    keys = ("data.holdout", "data.text_column", "evaluation.tokens")
    return repr([index.get("hash") or list(sources), list(sources.values()), *map(history.setting, keys)])


def _tokens(history: History) -> Hashable:
    return repr([history.setting("tokenizer"), history.setting("model.vocab_size")])


def compare(runs: Sequence[str | Path | Run], *, width: int | None = None) -> str:
    """The comparison as a table of plain text, `width` columns wide (the terminal's, unless given)."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    found = comparison(runs)
    table = Table(show_edge=False, pad_edge=False, header_style="bold")
    table.add_column("")
    for name in found.names:
        table.add_column(Text(_line(name)), justify="right", overflow="fold")
    for label, values, best in found.rows:
        starred = [f"{value} *" if index == best else f"{value}  " for index, value in enumerate(values)]
        table.add_row(label, *map(Text, starred))
    if found.differences:
        table.add_section()
        for key, values in found.differences:
            table.add_row(Text(_line(key)), *(Text(f"{_line(value)}  ") for value in values))
    output = io.StringIO()
    columns = width or max(shutil.get_terminal_size((100, 24)).columns, 60)
    Console(file=output, width=columns, color_system=None, legacy_windows=False).print(table)
    notes = ["* the best"] if any(best is not None for _, _, best in found.rows) else []
    if not found.same_text:
        notes.append(DIFFERENT_TEXTS)
    if len(found.names) > 1 and not found.differences:
        notes.append("the configurations are the same")
    return output.getvalue() + "".join(f"{note}\n" for note in notes)


def write_comparison(runs: Sequence[str | Path | Run], path: str | Path) -> Path:
    """Write one self-contained page with the curves of the runs in the same charts, and return its path."""
    found = comparison(runs)
    path = Path(path)
    page = render(
        "compare.html",
        title=clean(" · ".join(found.names) if len(found.names) <= 4 else f"{len(found.names)} runs", 160),
        outcome=_headline(found),
        runs=[(clean(name, 60), index % 8 + 1) for index, name in enumerate(found.names)],
        rows=found.rows,
        page=_charts(found),
        samples=_newest_samples(found),
        differences=found.differences,
    )
    write_atomically(path, page)
    return path


def _row(
    summaries: list[RunSummary], label: str, field: str, say: Callable[[Any], str], better: int
) -> tuple[str, list[str], int | None]:
    values = [getattr(summary, field) for summary in summaries]
    texts = [say(value) for value in values]
    known = [index for index, value in enumerate(values) if value is not None]
    best = max(known, key=lambda index: better * values[index]) if better and len(known) > 1 else None
    # Where the text of another run is the same, neither is better.
    return label, texts, best if best is not None and texts.count(texts[best]) == 1 else None


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
        return describe(found.summaries[0], found.histories[0])
    if not found.same_text:
        return f"{DIFFERENT_TEXTS[0].upper()}{DIFFERENT_TEXTS[1:]}."
    best = next((best for label, _, best in found.rows if label == "held-out bits per byte"), None)
    if best is None:
        return ""
    bits = number(found.summaries[best].bits_per_byte)
    return f"{clean(found.names[best], 80)} predicts held-out text best, at {bits} bits per byte."


def _charts(found: Comparison) -> ChartPage:
    runs = len(found.names)
    # The page has about one size however many runs it shows.
    tables = [_table(history, max(50, 2 * BUCKETS // runs)) for history in found.histories]
    validations = [history.validation for history in found.histories]
    floors = {history.entropy for history in found.histories if history.entropy}

    def chart(title: str, unit: str, column: str, **more: Any) -> Chart:
        points = column == "bits_per_byte"
        series = [
            Series(column, clean(name, 120), "points" if points else "line", index % 8 + 1, index + runs * points)
            for index, name in enumerate(found.names)
        ]
        return Chart(title, unit, series, **more)

    levels = [Level("the source's own entropy", floors.pop())] if len(floors) == 1 else []
    return ChartPage(
        [*tables, *validations],
        [
            chart("Training loss, smoothed", "nats", "loss", wide=True),
            chart("Held-out bits per byte", "bits", "bits_per_byte", levels=levels),
            chart("Loss against time", "nats", "loss", x="seconds"),
            chart("Learning rate", "rate", "lr", zero=True),
            chart("Gradient norm", "norm", "grad_norm"),
            chart("Throughput", "speed", "tokens_per_second", zero=True),
        ],
    )


def _table(history: History, buckets: int) -> Columns:
    training = history.training
    smoothed = {name: smooth(training[name]) for name in ("loss", "tokens_per_second")}
    columns = {**training, **smoothed, "grad_norm": smooth_ratio(training["grad_norm"])}
    return thin(columns, x="tokens", extremes=("loss", "lr", "grad_norm", "tokens_per_second"), buckets=buckets)


def _newest_samples(found: Comparison) -> list[tuple[str, list[tuple[str, str, str]]]]:
    """Of each prompt the newest continuation of each run that has it: (prompt, [(run, step, text)])."""
    rows = ((index, row) for index, history in enumerate(found.histories) for row in history.samples)
    limit = max(200, 2000 * 8 // (len(found.names) * _MAX_PROMPTS))

    def card(prompt: str, index: int, row: dict[str, Any]) -> tuple[str, str, str]:
        return clean(found.names[index], 60), whole(row["step"]), continuation(prompt, row, limit)

    return [
        (clean(prompt, 300), [card(prompt, index, row) for index, row in newest.items()])
        for prompt, newest in group_samples(rows, _MAX_PROMPTS).items()
    ]
