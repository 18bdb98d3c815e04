"""What a run comes down to: the handful of numbers, and the one sentence.

Shared by the report and by `compare`, so that both tell the same.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from smolforge.report.curves import smooth
from smolforge.report.formatting import MISSING, clean, count, duration, known, number, percent, whole
from smolforge.report.history import History


@dataclass(frozen=True)
class RunSummary:
    """One run in numbers; None is not known (yet)."""

    name: str
    path: str
    finished: bool
    steps: int | None
    total_steps: int | None
    tokens: float | None
    seconds: float | None
    """Running time, without the gaps in which the run was down."""
    loss: float | None
    """Training loss, the mean of the last 1% of the rows (nats per token)."""
    validation_loss: float | None
    bits_per_byte: float | None
    best_bits_per_byte: float | None
    entropy_bits_per_byte: float | None
    gap: float | None
    """How far the last held-out bits per byte lie above the source's own entropy, as a share of it."""
    tokens_per_second: float | None
    """Median over the logged rows."""
    mfu: float | None
    peak_memory_bytes: float | None
    data_wait: float | None
    """Share of the running time that was spent waiting for data."""
    parameters: int | None
    resumes: int

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return asdict(self)


def summarize(history: History) -> RunSummary:
    """The numbers of a run, from what was read of it."""
    training, validation = history.training, history.validation
    bits = validation["bits_per_byte"]
    floor = history.entropy
    last_bits = _last(bits)
    steps = _furthest(training["step"], validation["step"])
    total = _total_steps(history)
    waited = waiting_share(history)
    return RunSummary(
        name=history.name,
        path=str(history.run.path),
        finished=history.ended or (steps is not None and total is not None and steps >= total),
        steps=None if steps is None else int(steps),
        total_steps=total,
        tokens=_last(training["tokens"]),
        seconds=_furthest(training["seconds"], validation["seconds"]),
        loss=_last(smooth(training["loss"])),
        validation_loss=_last(validation["loss"]),
        bits_per_byte=last_bits,
        best_bits_per_byte=float(np.nanmin(bits)) if np.isfinite(bits).any() else None,
        entropy_bits_per_byte=floor,
        gap=last_bits / floor - 1 if last_bits is not None and floor else None,
        tokens_per_second=_median(training["tokens_per_second"]),
        mfu=_median(training["mfu"]),
        peak_memory_bytes=float(np.nanmax(memory)) if np.isfinite(memory := training["memory_bytes"]).any() else None,
        data_wait=_mean_wait(waited, training["seconds"]),
        parameters=_parameters(history),
        resumes=sum(history.event_counts[kind] for kind in ("resume", "resumed")),
    )


def waiting_share(history: History) -> np.ndarray:
    """Share of each row's time that was spent waiting for data, (rows,) in [0, 1].

    `data_seconds` are those since the row before; so are tokens / tokens_per_second.
    """
    training = history.training
    with np.errstate(invalid="ignore", divide="ignore"):
        took = np.diff(training["tokens"], prepend=0.0) / training["tokens_per_second"]
        share = training["data_seconds"] / took
    return np.where(np.isfinite(share) & (took > 0), share.clip(0, 1), np.nan)


def outcome(summary: RunSummary, history: History) -> str:
    """The run in one sentence."""
    if summary.steps is None or summary.tokens is None:
        return "The run has been set up; no step is logged yet."
    size = f"A {count(summary.parameters)}-parameter" if summary.parameters else "A"
    what = {"llama": "Llama", "recreation": "recreated-SmolLM2"}.get(str(history.key("model.architecture")), "language")
    sources = history.key("data.sources", {})
    names = list(sources) if isinstance(sources, dict) else []
    on = clean(" and ".join(map(str, names)), 80) if 0 < len(names) <= 2 else f"{len(names)} sources" if names else ""
    span = f"{count(summary.tokens)} tokens{f' of {on}' if on else ''}"
    if summary.finished:
        sentence = (
            f"{size} {what} model learned from {span} in {_unbroken(summary.seconds)} ({whole(summary.steps)} steps)"
        )
    else:
        share = f" of {whole(summary.total_steps)}" if summary.total_steps else ""
        done = f", {percent(summary.steps / summary.total_steps, 0)}" if summary.total_steps else ""
        sentence = (
            f"{size} {what} model has learned from {span} so far, in {_unbroken(summary.seconds)} "
            f"(step {whole(summary.steps)}{share}{done})"
        )
    if summary.bits_per_byte is None:
        return f"{sentence}; its training loss is {number(summary.loss)}." if known(summary.loss) else f"{sentence}."
    sentence += f" and predicts held-out text at {number(summary.bits_per_byte)} bits per byte"
    if summary.gap is None:
        return f"{sentence}."
    side = "above" if summary.gap >= 0 else "below"
    floor = number(summary.entropy_bits_per_byte)
    return f"{sentence}, {percent(abs(summary.gap))} {side} the {floor} of the source itself."


def _unbroken(seconds: float | None) -> str:
    return duration(seconds).replace(" ", "\N{NO-BREAK SPACE}")


def flatten(config: dict[str, Any], limit: int = 400) -> dict[str, str]:
    """`{section: {key: value}}` as `{"section.key": "value"}`, lists and short mappings in one value."""
    flat: dict[str, str] = {}

    def walk(prefix: str, value: Any, depth: int) -> None:
        if len(flat) >= limit:
            return
        deep = isinstance(value, dict) and value and depth < 2
        if deep:
            for key, inner in value.items():
                walk(f"{prefix}.{key}" if prefix else str(key), inner, depth + 1)
        else:
            flat[clean(prefix, 200)] = _value(value)

    walk("", config, 0)
    return flat


def _value(value: Any) -> str:
    if value == {} or value == []:
        return MISSING
    if value is None or isinstance(value, bool):
        return {None: MISSING, True: "yes", False: "no"}[value]
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, int):
        return str(value) if abs(value) < 10**18 else "…"
    if isinstance(value, (list, tuple)) and all(isinstance(item, (str, int, float)) for item in value):
        return clean(", ".join(_value(item) for item in value[:50]), 600)
    if isinstance(value, dict) and all(isinstance(item, (str, int, float)) for item in value.values()):
        return clean(", ".join(f"{key}: {_value(item)}" for key, item in list(value.items())[:50]), 600)
    return clean(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)[:2000], 600)


def _last(values: np.ndarray) -> float | None:
    finite = values[np.isfinite(values)]
    return float(finite[-1]) if len(finite) else None


def _furthest(*columns: np.ndarray) -> float | None:
    return max((last for column in columns if (last := _last(column)) is not None), default=None)


def _median(values: np.ndarray) -> float | None:
    finite = values[np.isfinite(values)]
    return float(np.median(finite)) if len(finite) else None


def _mean_wait(share: np.ndarray, seconds: np.ndarray) -> float | None:
    took = np.diff(seconds, prepend=0.0)
    counted = np.isfinite(share) & np.isfinite(took) & (took >= 0)
    if not counted.any():
        return None
    weights = took[counted]
    return float(np.average(share[counted], weights=weights if weights.sum() > 0 else None))


def _total_steps(history: History) -> int | None:
    try:
        from smolforge.config import RunConfig

        return RunConfig.model_validate(history.config).total_steps if history.config else None
    except ValueError:  # a configuration of another version: its length may still be read
        steps = history.key("training.steps")
        return steps if isinstance(steps, int) else None


def _parameters(history: History) -> int | None:
    """Parameters of the configured model, counted on the model itself without memory."""
    section = history.key("model")
    if not isinstance(section, dict):
        return None
    try:
        from smolforge.config import ModelConfig
        from smolforge.model.registry import build

        config = ModelConfig.model_validate(section)
        # Building even an empty model takes time in proportion to its layers; ours have tens.
        if config.num_hidden_layers > 1000:
            return None
        model = build(config, device="meta", seed=None)
        return sum(parameter.numel() for parameter in model.parameters())
    except Exception:
        return None  # a report is written for any run, also one whose model this version does not know
