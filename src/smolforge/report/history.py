"""What a run has written so far, as columns.

Everything here may be absent, torn, half a run old, or made by somebody who wishes the reader ill: what cannot be
read counts as absent. A million rows are read as a stream into columns of 8 bytes, never as a million objects.
"""

from __future__ import annotations

import json
import math
from array import array
from collections import Counter, deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from smolforge.errors import BadInput
from smolforge.files import read_json_lines
from smolforge.run import Run

TRAINING = ("step", "tokens", "loss", "lr", "grad_norm", "tokens_per_second", "mfu", "memory_bytes", "data_seconds")
VALIDATION = ("loss", "perplexity", "bits_per_byte")
MAX_EVENTS = 100
MAX_TEXT = 4000
MAX_FILE = 4 << 20
# The gap before these is time in which nothing ran.
_BREAKS = {"resume", "resumed", "start", "started"}
_ENDS = {"done", "end", "finish", "finished", "complete", "completed"}


@dataclass
class History:
    """One run, read."""

    run: Run
    name: str
    training: dict[str, np.ndarray]
    """Columns of `TRAINING`, and `seconds` of running time, (rows,), NaN where absent."""
    validation: dict[str, np.ndarray]
    """step, tokens, seconds and the columns of `VALIDATION`, (validations,)."""
    entropy: float | None
    """Bits per byte of the source itself, where it is known."""
    events: list[dict[str, Any]]
    """The first and the last `MAX_EVENTS` of them."""
    event_counts: Counter[str]
    samples: list[dict[str, Any]]
    config: dict[str, Any]
    environment: dict[str, Any] = field(default_factory=dict)
    ended: bool = False
    """Whether the run itself said that it is done."""

    def key(self, path: str, default: Any = None) -> Any:
        """A value of the configuration by its dotted path."""
        value: Any = self.config
        for part in path.split("."):
            if not isinstance(value, dict) or part not in value:
                return default
            value = value[part]
        return default if value is None else value

    def seconds_at(self, steps: np.ndarray) -> np.ndarray:
        """Running time at which each of `steps` was logged, between rows in proportion."""
        return self._at(steps, "seconds")

    def tokens_at(self, steps: np.ndarray) -> np.ndarray:
        """Tokens seen at each of `steps`, between rows in proportion."""
        return self._at(steps, "tokens")

    def _at(self, steps: np.ndarray, column: str) -> np.ndarray:
        known = np.isfinite(self.training[column])
        if not known.any():
            return np.full(len(steps), np.nan)
        return np.interp(steps, self.training["step"][known], self.training[column][known])


def read_history(path: str | Path | Run) -> History:
    """Everything that a run's directory says about it at this moment.

    Raises:
        BadInput: there is no such directory.
    """
    run = path if isinstance(path, Run) else Run(path)
    if not run.path.is_dir():
        raise BadInput(f"there is no run at {run.path}", field="RUN", hint="Give the directory that train wrote.")
    rows = _Rows()
    for row in read_json_lines(run.metrics_path):
        rows.take(row)
    return History(
        run=run,
        name=run.path.resolve().name or str(run.path),
        training=rows.training(),
        validation=rows.validation(),
        entropy=rows.entropy,
        events=rows.events + [event for event in rows.late_events if event not in rows.events],
        event_counts=rows.event_counts,
        samples=[_cut(row) for row in read_json_lines(run.samples_path) if _finite(row.get("step")) is not None],
        config=_mapping(run.config_path, yaml.safe_load),
        environment=_mapping(run.path / "environment.json", json.loads),
        ended=rows.ended,
    )


class _Rows:
    """Takes rows one by one; keeps numbers in columns and a clock of running time."""

    def __init__(self) -> None:
        self._training = {name: array("d") for name in (*TRAINING, "seconds")}
        self._validation = {name: array("d") for name in ("step", "tokens", "seconds", *VALIDATION)}
        self.entropy: float | None = None
        self.events: list[dict[str, Any]] = []
        self.late_events: deque[dict[str, Any]] = deque(maxlen=MAX_EVENTS)
        self.event_counts: Counter[str] = Counter()
        self.ended = False
        self._clock: float | None = None
        self._last: float | None = None

    def take(self, row: dict[str, Any]) -> None:
        step = _finite(row.get("step"))
        if step is None:
            return
        event = row.get("event")
        seconds = self._tick(row, broken=isinstance(event, str) and event in _BREAKS)
        if event is not None:
            self._event(row, str(event))
        elif isinstance(row.get("validation"), dict):
            self._append(self._validation, {**row["validation"], **row, "seconds": seconds}, skip="loss", row=row)
            entropy = _finite(row.get("entropy_bits_per_byte"))
            self.entropy = entropy if entropy and entropy > 0 else self.entropy
        elif "loss" in row:
            self._append(self._training, {**row, "seconds": seconds}, row=row)
            self.ended = False

    def _append(
        self, columns: dict[str, array[float]], values: dict[str, Any], *, row: dict[str, Any], skip: str = ""
    ) -> None:
        for name, column in columns.items():
            value = row["validation"].get(name) if skip and name == skip else values.get(name)
            number = _finite(value)
            column.append(math.nan if number is None else number)

    def _tick(self, row: dict[str, Any], *, broken: bool) -> float | None:
        """Running time at `row`: wall time between rows, without the gaps in which the run was down."""
        now = _finite(row.get("time"))
        if broken:
            self._last = now
        if now is None:
            return self._clock
        if self._clock is None:
            speed, tokens = _finite(row.get("tokens_per_second")), _finite(row.get("tokens"))
            self._clock = tokens / speed if speed and tokens and "loss" in row else None
            if self._clock is None and "loss" in row:
                self._clock = 0.0
        elif self._last is not None:
            self._clock += max(0.0, now - self._last)
        self._last = now
        return self._clock

    def _event(self, row: dict[str, Any], kind: str) -> None:
        kind = kind[:80]
        self.event_counts[kind] += 1
        self.ended = kind in _ENDS
        kept = {str(key)[:80]: _short(value) for key, value in list(row.items())[:30]}
        (self.events if len(self.events) < MAX_EVENTS else self.late_events).append(kept)

    def training(self) -> dict[str, np.ndarray]:
        return _newest(self._training)

    def validation(self) -> dict[str, np.ndarray]:
        return _newest(self._validation)


def _newest(columns: dict[str, array[float]]) -> dict[str, np.ndarray]:
    """Columns without the rows whose step was written again later: a step that was repeated counts once."""
    arrays = {name: np.frombuffer(column, dtype=float) if column else np.empty(0) for name, column in columns.items()}
    step = arrays["step"]
    if len(step):
        lowest_after = np.append(np.minimum.accumulate(step[::-1])[::-1][1:], np.inf)
        kept = step < lowest_after
        arrays = {name: values[kept] for name, values in arrays.items()}
        for name in ("tokens", "seconds"):  # what is drawn against must not run backwards
            filled = np.where(np.isfinite(arrays[name]), arrays[name], -np.inf)
            running = np.maximum.accumulate(filled)
            arrays[name] = np.where(np.isfinite(running), running, np.nan)
    return arrays


def _finite(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    # No quantity of a run comes near; beyond it the arithmetic of a plot would overflow.
    return number if math.isfinite(number) and abs(number) < 1e30 else None


def _short(value: Any) -> Any:
    if isinstance(value, (int, float, bool)) or value is None:
        return value
    return (value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str))[:MAX_TEXT]


def _cut(row: dict[str, Any]) -> dict[str, Any]:
    return {key: _short(row.get(key)) for key in ("step", "prompt", "text", "finish_reason", "seed")}


def _mapping(path: Path, load: Any) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            value = load(file.read(MAX_FILE).decode("utf-8", "replace"))
    except (OSError, ValueError, yaml.YAMLError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
