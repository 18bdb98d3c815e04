"""Write RUN/report.html: one self-contained file that opens offline, at any time during a run.

Text that came from the run is never markup: the template escapes everything, and the page's own content policy allows
no script but those it was written with.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import shlex
import time
from collections.abc import Hashable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import numpy as np
from markupsafe import Markup

from smolforge.config import RunConfig
from smolforge.files import write_atomically
from smolforge.formatting import MISSING, clean, count, duration, flatten, number, percent, setting, size, typed, whole
from smolforge.report.charts import Chart, ChartPage, Columns, Level, Mark, Series, smooth, smooth_ratio, thin
from smolforge.report.history import History, RunSummary, describe, read_history, summarize, waiting_share
from smolforge.run import Run

SCRIPTS = ("static/uPlot.iife.min.js", "templates/charts.js")
STYLES = ("static/uPlot.min.css", "templates/style.css")
MAX_DECISIONS = 60
MAX_PROMPTS = 8
MAX_CARDS = 5  # continuations shown of one prompt
MAX_CHARACTERS = 2000  # of one continuation
TABLE_ROWS = 24


def write_report(run_path: str | Path | Run) -> Path:
    """Write RUN/report.html from what the run has logged so far, and return its path.

    The page is self-contained and smaller than 2 MB however long the run; a reader sees the old page or the new one.

    Raises:
        BadInput: there is no such directory.
        RunFailed: no room on the disk; an earlier page is untouched.
    """
    history = read_history(run_path)
    summary = summarize(history)
    samples = select_samples(history.samples)
    environment = {key: value for key, value in history.environment.items() if key != "decisions"}
    decisions = history.environment.get("decisions")
    hidden_events = sum(history.event_counts.values()) - len(history.events)
    page = render(
        "report.html",
        history=history,
        title=clean(history.name, 120),
        outcome=describe(summary, history),
        progress=_progress(summary),
        tiles=_tiles(summary, history),
        page=charts(history, summary),
        numbers=_numbers(history),
        samples=samples,
        asked=history.setting("data.format", "text") != "text",  # the prompts are questions
        hidden_samples=sum(sample.hidden for sample in samples),
        command=shlex.join(["smolforge", "train", clean(typed(history.run.config_path.resolve())), "--out", "NEW"]),
        sections=_configuration(history),
        environment=list(flatten(environment, 40).items()),
        decisions=[setting(item) for item in decisions[:MAX_DECISIONS]] if isinstance(decisions, list) else [],
        events=_events(history),
        hidden_events=whole(hidden_events) if hidden_events else "",
    )
    write_atomically(history.run.report_path, page)
    return history.run.report_path


def render(template: str, **values: Any) -> str:
    """A template of this package, everything escaped, with its styles, scripts and content policy."""
    page = _environment().get_template(f"templates/{template}")
    return page.render(written=time.strftime("%Y-%m-%d %H:%M"), **values)


@functools.cache
def _environment() -> jinja2.Environment:
    loader = jinja2.PackageLoader("smolforge.report", ".")
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    scripts, styles = ([loader.get_source(environment, name)[0] for name in names] for names in (SCRIPTS, STYLES))
    digests = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    allowed = " ".join(f"'sha256-{digest}'" for digest in digests)
    environment.globals |= {
        "style": Markup("\n".join(styles)),
        "scripts": [Markup(script) for script in scripts],
        "policy": "default-src 'none'; style-src 'unsafe-inline'; img-src data:; "
        f"script-src {allowed}; base-uri 'none'; form-action 'none'",
    }
    return environment


def _progress(summary: RunSummary) -> int | None:
    """Percent of the run that is done; None where it has ended or its length is not known."""
    if summary.finished or summary.steps is None or not summary.total_steps:
        return None
    return min(100, round(100 * summary.steps / summary.total_steps))


def _tiles(summary: RunSummary, history: History) -> list[tuple[str, str, str]]:
    """(label, value, detail) of the numbers on top."""
    best, last = summary.best_bits_per_byte, summary.bits_per_byte
    is_best = best is None or last is None or last <= best * 1.001
    floor = number(summary.entropy_bits_per_byte)
    resumes = {0: "in one go", 1: "resumed once"}.get(summary.resumes, f"resumed {summary.resumes} times")
    mfu = f" · {percent(summary.mfu)} of the peak" if summary.mfu else ""
    entries = [
        ("held-out bits per byte", number(last), "the last is best" if is_best else f"best {number(best)}"),
        ("above the source's entropy", percent(summary.gap), f"floor {floor} bits/byte"),
        ("held-out loss", number(summary.validation_loss), "nats per token"),
        ("training loss", number(summary.loss), "mean of the last 1%"),
        ("tokens", count(summary.tokens), f"{whole(summary.steps)} steps"),
        ("running time", duration(summary.seconds), resumes),
        ("tokens per second", count(summary.tokens_per_second), f"median{mfu}"),
        ("parameters", count(summary.parameters, 4), str(history.setting("model.architecture", ""))),
        ("peak memory", size(summary.peak_memory_bytes), ""),
        ("waiting for data", percent(summary.data_wait), "of the running time"),
    ]
    return [(label, value, clean(detail, 60)) for label, value, detail in entries if value != MISSING]


def charts(history: History, summary: RunSummary) -> ChartPage:
    """The charts of the page, the most telling first."""
    training = history.training
    columns: Columns = {
        **training,
        "waiting": waiting_share(training),
        "loss_smooth": smooth(training["loss"]),
        "grad_norm_smooth": smooth_ratio(training["grad_norm"]),
    }
    for name in ("tokens_per_second", "mfu", "waiting"):
        columns[f"{name}_smooth"] = smooth(columns[name])
    noisy = ("loss", "grad_norm", "tokens_per_second", "mfu", "waiting")
    tables = [
        thin(columns, x="tokens", extremes=(*noisy, "lr", "memory_bytes")),
        thin(history.validation, x="tokens", extremes=("loss", "bits_per_byte")),
    ]

    def raw_and_smooth(column: str, label: str = "logged") -> list[Series]:
        return [Series(column, label, "raw"), Series(f"{column}_smooth", "smoothed")]

    loss = [*raw_and_smooth("loss", "training"), Series("loss", "held-out", "points", colour=2, table=1)]
    bits = [Series("bits_per_byte", "held-out", "points", colour=2, table=1)]
    if np.isfinite(history.validation["average_bits_per_byte"]).any():
        bits.append(Series("average_bits_per_byte", "averaged weights", "points", colour=3, table=1))
    floor = [Level("the source's own entropy", summary.entropy_bits_per_byte)] if summary.entropy_bits_per_byte else []
    gap = f"The last value is {percent(summary.gap)} above the source's entropy." if (summary.gap or 0) > 0 else ""
    clip = history.setting("training.grad_clip")
    clipped = _clipped(training["grad_norm"], clip)
    waited = f"{percent(summary.data_wait)} of the running time in all."
    return ChartPage(
        tables,
        [
            Chart("Loss", "nats", loss, marks=True, wide=True),
            Chart("Held-out bits per byte", "bits", bits, levels=floor, note=gap),
            Chart("Loss against time", "nats", loss, x="seconds", marks=True),
            Chart("Learning rate", "rate", [Series("lr", "learning rate")], zero=True),
            Chart("Gradient norm", "norm", raw_and_smooth("grad_norm"), note=clipped, marks=True,
                  levels=[Level(f"clipped at {clip:g}", float(clip), "right")] if clipped else ()),
            Chart("Throughput", "speed", raw_and_smooth("tokens_per_second"), marks=True, zero=True),
            Chart("Memory", "bytes", [Series("memory_bytes", "memory", colour=4)], zero=True),
            Chart("Waiting for data", "share", raw_and_smooth("waiting"), marks=True, note=waited, zero=True),
            Chart("Model FLOP utilisation", "peak", raw_and_smooth("mfu"), zero=True),
        ],
        _marks(history),
    )  # fmt: skip


def _clipped(norms: np.ndarray, clip: Any) -> str:
    known = norms[np.isfinite(norms)]
    if not isinstance(clip, (int, float)) or not clip or not (known > clip).any():
        return ""
    return f"Clipped in {percent(float((known > clip).mean()))} of the logged steps."


def _marks(history: History) -> list[Mark]:
    """A vertical line per event, between the logged steps in proportion."""
    known = np.isfinite(history.training["tokens"])
    if not known.any():
        return []
    steps, tokens, seconds = (history.training[name][known] for name in ("step", "tokens", "seconds"))
    marks = []
    for event in history.events:
        label = clean(f"{event['event']} at step {whole(event['step'])}", 100)
        moment = float(np.interp(event["step"], steps, seconds))
        place = float(np.interp(event["step"], steps, tokens))
        marks.append(Mark(clean(event["event"], 40), label, place, moment if np.isfinite(moment) else None))
    return marks


def _numbers(history: History) -> list[list[str]]:
    """The curves as rows of text, for who cannot see them: evenly chosen logged steps and the validations near them."""
    training, validation = history.training, history.validation
    total = len(training["step"])
    if not total:
        return []
    rows = []
    previous = -1.0
    for row in np.unique(np.linspace(0, total - 1, TABLE_ROWS).round().astype(int)):
        value = {name: float(column[row]) for name, column in training.items()}
        near = np.flatnonzero((validation["step"] > previous) & (validation["step"] <= value["step"]))
        held_out = {name: float(column[near[-1]]) for name, column in validation.items()} if len(near) else {}
        previous = value["step"]
        rows.append([
            whole(value["step"]), count(value["tokens"], 4), duration(value["seconds"]), number(value["loss"]),
            number(held_out.get("loss")), number(held_out.get("bits_per_byte")), number(value["lr"], 3),
            number(value["grad_norm"], 3), count(value["tokens_per_second"]), size(value["memory_bytes"]),
        ])  # fmt: skip
    return rows


class Card(NamedTuple):
    """One continuation of a prompt."""

    step: str
    text: str
    reason: str


class PromptSamples(NamedTuple):
    """One prompt and its continuations, the oldest first; `hidden` more lie between those shown."""

    prompt: str
    cards: list[Card]
    hidden: int


def select_samples(samples: Sequence[dict[str, Any]]) -> list[PromptSamples]:
    """The prompts in the order they first came, each with at most `MAX_CARDS` steps: first, last, some between."""
    grouped = group_samples(((row["step"], row) for row in samples), MAX_PROMPTS)
    return [_prompt_samples(prompt, rows) for prompt, rows in grouped.items()]


def group_samples(rows: Iterable[tuple[Any, dict[str, Any]]], prompts: int) -> dict[str, dict[Any, dict[str, Any]]]:
    """{prompt: {key: sample}} of (key, sample) pairs, for the first `prompts` prompts; the last of equal keys."""
    grouped: dict[str, dict[Hashable, dict[str, Any]]] = {}
    for key, row in rows:
        prompt = str(row.get("prompt") or "")
        if prompt in grouped or len(grouped) < prompts:
            grouped.setdefault(prompt, {})[key] = row
    return grouped


def _prompt_samples(prompt: str, rows: dict[float, dict[str, Any]]) -> PromptSamples:
    shown = steps = sorted(rows)
    if len(steps) > MAX_CARDS:
        # Even on a logarithmic scale, as early steps change the most; of few steps, each at most once.
        places = np.geomspace(1, len(steps), MAX_CARDS).round().astype(int) - 1
        shown = [steps[index] for index in np.maximum(places, np.arange(MAX_CARDS))]
    cards = []
    for step in shown:
        reason = str(rows[step].get("finish_reason") or "length")
        reason = {"stop": "ended by itself", "length": ""}.get(reason, reason)
        cards.append(Card(whole(step), continuation(prompt, rows[step], MAX_CHARACTERS), clean(reason, 40)))
    return PromptSamples(clean(prompt, 300), cards, len(steps) - len(shown))


def continuation(prompt: str, row: dict[str, Any], limit: int) -> str:
    """The text of a sample without its prompt, cut to `limit` characters."""
    return clean(str(row.get("text") or "").removeprefix(prompt), limit)


def _configuration(history: History) -> list[tuple[str, list[tuple[str, str, bool]]]]:
    """[(section, [(key, value, differs from the default)])], sections in the order of the file."""
    defaults = flatten(RunConfig().model_dump(mode="json"))
    sections: dict[str, list[tuple[str, str, bool]]] = {}
    for path, value in flatten(history.config).items():
        if value == MISSING and defaults.get(path) == MISSING:
            continue  # a key that is not set
        section, dot, key = path.partition(".")
        entry = (key if dot else section, value, defaults.get(path) != value)
        sections.setdefault(section if dot else "run", []).append(entry)
    return list(sections.items())


def _events(history: History) -> list[tuple[str, str, str, str]]:
    """(step, time, event, details) of each kept event."""
    rows = []
    for event in history.events:
        stamp = event.get("time")
        known = isinstance(stamp, (int, float)) and 1e8 < stamp < 1e11
        details = ", ".join(
            f"{key} {number(value) if isinstance(value, float) else value}"
            for key, value in event.items()
            if key not in ("step", "event", "time") and value is not None
        )
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(stamp)) if known else ""
        rows.append((whole(event["step"]), when, clean(event["event"], 80), clean(details, 400)))
    return rows
