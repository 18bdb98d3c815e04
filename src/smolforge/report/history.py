"""Read what a run has logged so far, as columns, and summarize it.

The files may be absent, torn or hostile: whatever cannot be read counts as absent. Rows are read as a stream into
columns of 8-byte numbers, so a run of a million rows needs little memory.
"""

from __future__ import annotations

import json
import math
from array import array
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from smolforge.config import ModelConfig, RunConfig
from smolforge.errors import BadInput
from smolforge.files import read_json_lines
from smolforge.formatting import clean, count, duration, is_known, number, percent, whole
from smolforge.report.charts import Columns, smooth
from smolforge.run import Run

TRAINING = ("step", "tokens", "loss", "lr", "grad_norm", "tokens_per_second", "mfu", "memory_bytes", "data_seconds")
VALIDATION = ("step", "tokens", "loss", "bits_per_byte", "average_bits_per_byte")
MAX_EVENTS = 100
MAX_TEXT = 4000
MAX_FILE = 4 << 20


@dataclass
class History:
    """What one run has logged."""

    run: Run
    name: str
    training: Columns  # of `TRAINING`, and `seconds` of running time; (rows,), NaN where absent
    validation: Columns  # of `VALIDATION`, and `seconds`; (validations,)
    entropy: float | None  # bits per byte of the source itself, where it is known
    events: list[dict[str, Any]]  # the first and the last `MAX_EVENTS`
    event_counts: Counter[str]
    samples: list[dict[str, Any]]
    config: dict[str, Any]
    environment: dict[str, Any]

    def setting(self, path: str, default: Any = None) -> Any:
        """A value of the configuration by its dotted path."""
        value: Any = self.config
        for part in path.split("."):
            if not isinstance(value, dict) or part not in value:
                return default
            value = value[part]
        return default if value is None else value


def read_history(path: str | Path | Run) -> History:
    """Read everything that the directory of a run holds at this moment; BadInput where there is none."""
    run = path if isinstance(path, Run) else Run(path)
    if not run.path.is_dir():
        raise BadInput(f"there is no run at {run.path}", field="RUN", hint="Give the directory that train wrote.")
    rows = _Rows()
    for row in read_json_lines(run.metrics_path):
        rows.add(row)
    return History(
        run=run,
        name=run.path.resolve().name or str(run.path),
        training=_newest(rows.training),
        validation=_newest(rows.validation),
        entropy=rows.entropy,
        events=[*rows.events, *rows.late_events],
        event_counts=rows.event_counts,
        samples=[
            {key: _short(row.get(key)) for key in ("step", "prompt", "text", "finish_reason")}
            for row in read_json_lines(run.samples_path)
            if _finite(row.get("step")) is not None
        ],
        config=_mapping(run.config_path, yaml.safe_load),
        environment=_mapping(run.path / "environment.json", json.loads),
    )


class _Rows:
    """Sorts rows into columns as they are read, and measures running time."""

    def __init__(self) -> None:
        self.training = {name: array("d") for name in (*TRAINING, "seconds")}
        self.validation = {name: array("d") for name in (*VALIDATION, "seconds")}
        self.entropy: float | None = None
        self.events: list[dict[str, Any]] = []
        self.late_events: deque[dict[str, Any]] = deque(maxlen=MAX_EVENTS)
        self.event_counts: Counter[str] = Counter()
        self._seconds: float | None = None
        self._last_time: float | None = None

    def add(self, row: dict[str, Any]) -> None:
        if _finite(row.get("step")) is None:
            return
        event, validation = row.get("event"), row.get("validation")
        seconds = self._running_seconds(row, resumed=event == "resume")
        if event is not None:
            self.event_counts[str(event)[:80]] += 1
            kept = {str(key)[:80]: _short(value) for key, value in list(row.items())[:30]}
            (self.events if len(self.events) < MAX_EVENTS else self.late_events).append(kept)
        elif isinstance(validation, dict):
            scores = {**row, **validation, "step": row["step"], "seconds": seconds}
            if isinstance(average := row.get("average"), dict):
                scores["average_bits_per_byte"] = average.get("bits_per_byte")
            _append(self.validation, scores)
            entropy = _finite(row.get("entropy_bits_per_byte"))
            self.entropy = entropy if entropy and entropy > 0 else self.entropy
        elif "loss" in row:
            _append(self.training, {**row, "seconds": seconds})

    def _running_seconds(self, row: dict[str, Any], *, resumed: bool) -> float | None:
        """Wall time up to `row` without the gaps before each resume, in which nothing ran."""
        now = _finite(row.get("time"))
        if resumed:
            self._last_time = now
        if now is None:
            return self._seconds
        if self._seconds is None:
            speed, tokens = _finite(row.get("tokens_per_second")), _finite(row.get("tokens"))
            if "loss" in row:
                self._seconds = tokens / speed if speed and tokens else 0.0
        elif self._last_time is not None:
            self._seconds += max(0.0, now - self._last_time)
        self._last_time = now
        return self._seconds


def _append(columns: dict[str, array[float]], row: dict[str, Any]) -> None:
    for name, column in columns.items():
        value = _finite(row.get(name))
        column.append(math.nan if value is None else value)


def _newest(columns: dict[str, array[float]]) -> Columns:
    """The columns without rows whose step was logged again later, as after a rollback or a resume."""
    arrays = {name: np.frombuffer(column, dtype=float) if column else np.empty(0) for name, column in columns.items()}
    step = arrays["step"]
    if len(step):
        lowest_after = np.append(np.minimum.accumulate(step[::-1])[::-1][1:], np.inf)
        arrays = {name: values[step < lowest_after] for name, values in arrays.items()}
        for name in ("tokens", "seconds"):  # the x axes of charts must not decrease
            running = np.maximum.accumulate(np.where(np.isfinite(arrays[name]), arrays[name], -np.inf))
            arrays[name] = np.where(np.isfinite(running), running, np.nan)
    return arrays


def _finite(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    # No quantity of a run comes near 1e30, and larger values would overflow the arithmetic of charts.
    return float(value) if abs(value) < 1e30 else None


def _short(value: Any) -> Any:
    if isinstance(value, (int, float, bool)) or value is None:
        return value
    return (value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str))[:MAX_TEXT]


def _mapping(path: Path, parse: Any) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            value = parse(file.read(MAX_FILE).decode("utf-8", "replace"))
    except (OSError, ValueError, yaml.YAMLError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


@dataclass(frozen=True)
class RunSummary:
    """One run in numbers, shared by the report and `compare`; None is not known (yet)."""

    name: str
    path: str
    finished: bool
    steps: int | None
    total_steps: int | None
    tokens: float | None
    seconds: float | None  # running, without the gaps in which the run was down
    loss: float | None  # of training in nats per token, the mean of the last 1% of the rows
    validation_loss: float | None
    bits_per_byte: float | None
    best_bits_per_byte: float | None
    entropy_bits_per_byte: float | None
    gap: float | None  # of the last held-out bits per byte above the source's own entropy, as a share of it
    tokens_per_second: float | None  # median of the logged rows, like `mfu`
    mfu: float | None
    peak_memory_bytes: float | None
    data_wait: float | None  # share of the running time that was spent waiting for data
    parameters: int | None
    resumes: int


def summarize(history: History) -> RunSummary:
    """The numbers of a run."""
    training, validation = history.training, history.validation
    bits, floor, total = _last(validation["bits_per_byte"]), history.entropy, total_steps(history)
    steps = _reduce(np.max, np.append(training["step"], validation["step"]))
    return RunSummary(
        name=history.name,
        path=str(history.run.path),
        finished=steps is not None and total is not None and (steps >= total or _ended_early(history, steps)),
        steps=None if steps is None else int(steps),
        total_steps=total,
        tokens=_last(training["tokens"]),
        seconds=_reduce(np.max, np.append(training["seconds"], validation["seconds"])),
        loss=_last(smooth(training["loss"])),
        validation_loss=_last(validation["loss"]),
        bits_per_byte=bits,
        best_bits_per_byte=_reduce(np.min, validation["bits_per_byte"]),
        entropy_bits_per_byte=floor,
        gap=bits / floor - 1 if bits is not None and floor else None,
        tokens_per_second=_reduce(np.median, training["tokens_per_second"]),
        mfu=_reduce(np.median, training["mfu"]),
        peak_memory_bytes=_reduce(np.max, training["memory_bytes"]),
        data_wait=_mean_wait(waiting_share(training), training["seconds"]),
        parameters=_parameters(history),
        resumes=history.event_counts["resume"],
    )


def waiting_share(training: Columns) -> np.ndarray:
    """Share of each row's time that was spent waiting for data, (rows,) in [0, 1].

    `data_seconds` are those since the row before, like tokens / tokens_per_second.
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        took = np.diff(training["tokens"], prepend=0.0) / training["tokens_per_second"]
        share = training["data_seconds"] / took
    return np.where(np.isfinite(share) & (took > 0), share.clip(0, 1), np.nan)


def describe(summary: RunSummary, history: History) -> str:
    """The run in one sentence."""
    if summary.steps is None or summary.tokens is None:
        return "The run has been set up; no step is logged yet."
    size = f"A {count(summary.parameters)}-parameter" if summary.parameters else "A"
    from smolforge.model.architecture import architectures

    architecture = architectures().get(str(history.setting("model.architecture")))
    what = architecture.label if architecture else "language"
    sources = history.setting("data.sources", {})
    sources = list(sources) if isinstance(sources, dict) else []
    data = clean(" and ".join(map(str, sources)), 80) if len(sources) <= 2 else f"{len(sources)} sources"
    span = f"{count(summary.tokens)} tokens{f' of {data}' if data else ''}"
    time = duration(summary.seconds).replace(" ", "\N{NO-BREAK SPACE}")
    if summary.finished:
        sentence = f"{size} {what} model learned from {span} in {time} ({whole(summary.steps)} steps)"
    else:
        total = summary.total_steps
        done = f" of {whole(total)}, {percent(summary.steps / total, 0)}" if total else ""
        sentence = f"{size} {what} model has learned from {span} so far, in {time} (step {whole(summary.steps)}{done})"
    if summary.bits_per_byte is None:
        return f"{sentence}; its training loss is {number(summary.loss)}." if is_known(summary.loss) else f"{sentence}."
    sentence += f" and predicts held-out text at {number(summary.bits_per_byte)} bits per byte"
    if summary.gap is None:
        return f"{sentence}."
    side = "above" if summary.gap >= 0 else "below"
    floor = number(summary.entropy_bits_per_byte)
    return f"{sentence}, {percent(abs(summary.gap))} {side} the {floor} of the source itself."


def _reduce(function: Callable[[np.ndarray], Any], values: np.ndarray) -> float | None:
    """`function` of the finite values, or None where there is none."""
    known = values[np.isfinite(values)]
    return float(function(known)) if len(known) else None


def _ended_early(history: History, step: float) -> bool:
    """Whether the run ended at this step, before its length, because the held-out loss rose."""
    return any(event["event"] == "ended" and event["step"] >= step for event in history.events[-1:])


def _last(values: np.ndarray) -> float | None:
    return _reduce(lambda known: known[-1], values)


def _mean_wait(share: np.ndarray, seconds: np.ndarray) -> float | None:
    took = np.diff(seconds, prepend=0.0)
    counted = np.isfinite(share) & (took > 0)
    return float(np.average(share[counted], weights=took[counted])) if counted.any() else None


def total_steps(history: History) -> int | None:
    """How many steps the run was configured for, or None where its configuration cannot be read."""
    try:
        return RunConfig.model_validate(history.config).total_steps if history.config else None
    except ValueError:  # the configuration of another version; its length can still be read
        steps = history.setting("training.steps")
        return steps if isinstance(steps, int) else None


def _parameters(history: History) -> int | None:
    """Parameters of the configured model, counted on the meta device."""
    section = history.setting("model")
    if not isinstance(section, dict):
        return None
    try:
        from smolforge.model.summary import count_parameters

        config = ModelConfig.model_validate(section)
        # Even on the meta device, building takes time in proportion to the layers; real models have tens.
        return count_parameters(config) if config.num_hidden_layers <= 1000 else None
    except Exception:
        return None  # a report is written for every run, also of a model that this version does not know
