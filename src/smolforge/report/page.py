"""The page of a run: RUN/report.html.

One file that opens anywhere, offline, at any time during a run. Nothing that came from the run is markup: the
template escapes everything, and the page's own policy lets no script run but the one it was written with.
"""

from __future__ import annotations

import base64
import hashlib
import shlex
import time
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup

from smolforge.files import write_atomically
from smolforge.report.axes import BITS, BYTES, NATS, NORM, RATE, SHARE, SPEED, TIME, TOKENS
from smolforge.report.chart import Chart, Level, Line, Mark
from smolforge.report.curves import smooth, smooth_ratio
from smolforge.report.formatting import MISSING, clean, count, duration, number, percent, size, whole
from smolforge.report.history import History, read_history
from smolforge.report.samples import stories
from smolforge.report.summary import RunSummary, flatten, outcome, summarize, waiting_share
from smolforge.run import Run

_MAX_DECISIONS = 60


def write_report(run_path: str | Path | Run) -> Path:
    """Write RUN/report.html from what the run has logged so far, and return its path.

    The page is self-contained and smaller than 2 MB however long the run; a reader sees the old page or the new one.

    Raises:
        BadInput: there is no such directory.
        RunFailed: no room on the disk; an earlier page is untouched.
    """
    history = read_history(run_path)
    summary = summarize(history)
    told = stories(history.samples)
    page = render(
        "report.html",
        history=history,
        title=clean(history.name, 120),
        outcome=outcome(summary, history),
        progress=progress(summary),
        tiles=tiles(summary, history),
        charts=[chart.draw() for chart in charts(history, summary)],
        stories=told,
        hidden_samples=sum(story.hidden for story in told),
        command=shlex.join(["smolforge", "train", clean(_shown(history.run.config_path)), "--out", "NEW"]),
        sections=configuration(history),
        environment=environment(history),
        decisions=decisions(history),
        events=events(history),
        hidden_events=whole(hidden) if (hidden := sum(history.event_counts.values()) - len(history.events)) > 0 else "",
    )
    write_atomically(history.run.report_path, page)
    return history.run.report_path


def render(template: str, **values: Any) -> str:
    """A template of this room, everything escaped, with the page's style, script and policy."""
    script = _text("hover.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return (
        _environment()
        .get_template(template)
        .render(
            style=Markup(_text("style.css")),
            script=Markup(script),
            policy=f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-{digest}'; "
            "base-uri 'none'; form-action 'none'",
            written=time.strftime("%Y-%m-%d %H:%M"),
            **values,
        )
    )


@lru_cache(maxsize=1)
def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.FunctionLoader(_text), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip


def _text(name: str) -> str:
    return (resources.files("smolforge.report") / "templates" / name).read_text(encoding="utf-8")


def _shown(path: Path) -> str:
    """The path as one would type it from here."""
    try:
        return str(path.resolve().relative_to(Path.cwd()))
    except (ValueError, OSError):
        return str(path)


def progress(summary: RunSummary) -> int | None:
    """Percent of the run that is done, for the bar under the title; None where it is over or not known."""
    if summary.finished or summary.steps is None or not summary.total_steps:
        return None
    return min(100, round(100 * summary.steps / summary.total_steps))


def tiles(summary: RunSummary, history: History) -> list[tuple[str, str, str]]:
    """(what, value, more) of the numbers on top."""
    entries = [
        ("held-out bits per byte", number(summary.bits_per_byte), _best(summary)),
        (
            "above the source's entropy",
            percent(summary.gap),
            f"floor {number(summary.entropy_bits_per_byte)} bits/byte",
        ),
        ("held-out loss", number(summary.validation_loss), "nats per token"),
        ("training loss", number(summary.loss), "mean of the last 1%"),
        ("tokens", count(summary.tokens), f"{whole(summary.steps)} steps"),
        ("running time", duration(summary.seconds), _pauses(summary)),
        ("tokens per second", count(summary.tokens_per_second), _mfu(summary)),
        ("parameters", count(summary.parameters, 4), str(history.key("model.architecture", ""))),
        ("memory at most", size(summary.peak_memory_bytes), ""),
        ("waiting for data", percent(summary.data_wait), "of the running time"),
    ]
    return [(clean(what), value, clean(more, 60)) for what, value, more in entries if value != "–"]


def _best(summary: RunSummary) -> str:
    best, last = summary.best_bits_per_byte, summary.bits_per_byte
    if best is None or last is None or last <= best * 1.001:
        return "the last is best"
    return f"best {number(best)}"


def _pauses(summary: RunSummary) -> str:
    return {0: "in one go", 1: "resumed once"}.get(summary.resumes, f"resumed {summary.resumes} times")


def _mfu(summary: RunSummary) -> str:
    return f"median · {percent(summary.mfu)} of the peak" if summary.mfu else "median"


def charts(history: History, summary: RunSummary) -> list[Chart]:
    """The plots of the page, the most telling first; empty ones draw nothing."""
    training, validation = history.training, history.validation
    tokens, seconds = training["tokens"], training["seconds"]
    floor = [Level("the source's own entropy", summary.entropy_bits_per_byte)] if summary.entropy_bits_per_byte else []
    clip = history.key("training.grad_clip")
    clipped = _clipped(training["grad_norm"], clip)

    def of(title: str, column: np.ndarray, unit: Any, **more: Any) -> Chart:
        return Chart(
            title,
            TOKENS,
            unit,
            _noisy(tokens, column, geometric=unit is NORM),
            marks=marks(history, tokens),
            hint=step_at,
            **more,
        )

    def step_at(x: float) -> str:
        return f"step {whole(float(np.interp(x, tokens, training['step'])))}"

    loss = [
        *_noisy(tokens, training["loss"], "training"),
        Line("held-out", validation["tokens"], validation["loss"], "points", "c2"),
    ]
    timed = [
        *_noisy(seconds, training["loss"], "training"),
        Line("held-out", validation["seconds"], validation["loss"], "points", "c2"),
    ]
    bits = [Line("held-out", validation["tokens"], validation["bits_per_byte"], "points", "c2")]
    waiting = waiting_share(history)
    gap = f"The last value lies {percent(summary.gap)} above the floor." if summary.gap and summary.gap > 0 else ""
    return [
        Chart("Loss", TOKENS, NATS, loss, marks=marks(history, tokens), wide=True, hint=step_at),
        Chart("Held-out bits per byte", TOKENS, BITS, bits, levels=floor, hint=step_at, note=gap),
        Chart("Loss against time", TIME, NATS, timed, marks=marks(history, seconds)),
        Chart("Learning rate", TOKENS, RATE, [Line("learning rate", tokens, training["lr"])], log=False, hint=step_at,
              zero=True),
        of("Gradient norm", training["grad_norm"], NORM, note=clipped,
           levels=[Level(f"clipped at {clip:g}", clip, "right")] if clipped else ()),
        of("Throughput", training["tokens_per_second"], SPEED, log=False, zero=True),
        Chart("Memory", TOKENS, BYTES, [Line("memory", tokens, training["memory_bytes"], colour="c4")], log=False,
              zero=True, hint=step_at),
        of("Waiting for data", waiting, SHARE, log=False, zero=True,
           note=f"{percent(summary.data_wait)} of the running time in all."),
        Chart("Model FLOP utilisation", TOKENS, SHARE, _noisy(tokens, training["mfu"]), log=False, zero=True,
              hint=step_at),
    ]  # fmt: skip


def _noisy(x: np.ndarray, y: np.ndarray, name: str = "logged", *, geometric: bool = False) -> list[Line]:
    even = smooth_ratio(y) if geometric else smooth(y)
    return [Line(name, x, y, "raw"), Line("smoothed", x, even, "line")]


def _clipped(norms: np.ndarray, clip: Any) -> str:
    finite = norms[np.isfinite(norms)]
    if not isinstance(clip, (int, float)) or not clip or not len(finite) or not (finite > clip).any():
        return ""
    return f"Clipped in {percent(float((finite > clip).mean()))} of the logged steps."


def marks(history: History, x: np.ndarray) -> list[Mark]:
    """A vertical line per event, at its place on the x axis of `x`."""
    known = np.isfinite(x)
    if not known.any():
        return []
    steps = history.training["step"][known]
    return [
        Mark(
            clean(event.get("event"), 40),
            f"{event.get('event')} at step {whole(event.get('step'))}",
            float(np.interp(event["step"], steps, x[known])),
        )
        for event in history.events
        if isinstance(event.get("step"), (int, float)) and str(event.get("event")) not in ("done", "finished")
    ]


def configuration(history: History) -> list[tuple[str, list[tuple[str, str, bool]]]]:
    """[(section, [(key, value, differs from the default)])], sections in the order of the file."""
    from smolforge.config import RunConfig

    plain = flatten(RunConfig().model_dump(mode="json"))
    sections: dict[str, list[tuple[str, str, bool]]] = {}
    for path, value in flatten(history.config).items():
        if value == MISSING and plain.get(path) == MISSING:
            continue  # a key that is left open says nothing
        section, dot, key = path.partition(".")
        sections.setdefault(section if dot else "run", []).append(
            (key if dot else section, value, plain.get(path) != value)
        )
    return list(sections.items())


def environment(history: History) -> list[tuple[str, str]]:
    """What environment.json says, but for the decisions."""
    return [
        (clean(key, 60), clean(value if isinstance(value, str) else _joined(value), 500))
        for key, value in list(history.environment.items())[:40]
        if key != "decisions" and value is not None
    ]


def decisions(history: History) -> list[str]:
    """What training decided by itself, with its reasons."""
    found = history.environment.get("decisions")
    return [clean(_joined(item), 500) for item in found[:_MAX_DECISIONS]] if isinstance(found, list) else []


def _joined(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key}: {inner}" for key, inner in list(value.items())[:30])
    if isinstance(value, (list, tuple)):
        return " ".join(str(item) for item in value[:200])
    return str(value)


def events(history: History) -> list[tuple[str, str, str, str]]:
    """(step, when, what, more) of each kept event."""
    rows = []
    for event in history.events:
        stamp = event.get("time")
        when = ""
        if isinstance(stamp, (int, float)) and 1e8 < stamp < 1e11:
            when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(stamp))
        more = ", ".join(
            f"{key} {_told(value)}"
            for key, value in event.items()
            if key not in ("step", "event", "time") and value is not None
        )
        rows.append((whole(event["step"]), when, clean(event.get("event"), 80), clean(more, 400)))
    return rows


def _told(value: Any) -> str:
    return number(value) if isinstance(value, float) else str(value)
