"""Axes: where the ticks stand and what they say."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from smolforge.report.formatting import count, duration, known, percent, size

_MINUTE, _HOUR, _DAY = 60, 3600, 86400
_TIMES = (1, 2, 5, 10, 15, 30, *(_MINUTE * n for n in (1, 2, 5, 10, 15, 30)), *(_HOUR * n for n in (1, 2, 3, 6, 12)))


@dataclass(frozen=True)
class Unit:
    """A quantity: its ticks and its words."""

    name: str
    """What stands beside the title; empty where the title says it."""
    words: Callable[[float], str] = lambda value: f"{value:,.4g}"
    """A value in full, as the hover text says it."""
    tick: Callable[[float, float], str] | None = None
    """(value, step between ticks) → label."""
    base: str = "decimal"
    """decimal, time (60 and 24), or binary (powers of two)."""


def _plain(value: float, step: float) -> str:
    if value and (abs(value) < 1e-3 or abs(value) >= 1e4):
        if abs(value) >= 1e4:
            return count(value)
        mantissa, power = f"{value:.1e}".split("e")
        return f"{mantissa.removesuffix('.0')}e{int(power)}"
    decimals = max(0, -math.floor(math.log10(step) + 1e-9)) if step > 0 else 3
    text = f"{value:,.{min(decimals, 8)}f}"
    # 2.5 between 2 and 3 needs its decimal even where the step alone would not give it one.
    return text if math.isclose(float(text.replace(",", "")), value, rel_tol=1e-6, abs_tol=1e-12) else f"{value:g}"


def _time(value: float, step: float) -> str:
    if value == 0:
        return "0"
    for unit, name in ((_DAY, "d"), (_HOUR, "h"), (_MINUTE, "min")):
        if step >= unit or (value >= unit and step < 1 and unit == _MINUTE):
            return f"{value / unit:g} {name}"
    if value % _MINUTE == 0:
        return f"{value / _MINUTE:g} min"
    if value > _MINUTE:
        return f"{int(value // _MINUTE)}:{int(value % _MINUTE):02d}"
    return f"{value:g} s"


def _bytes(value: float) -> str:
    amount, unit = size(value).split(" ")
    return f"{float(amount.replace(',', '')):g} {unit}" if value else "0"


TOKENS = Unit("tokens", lambda v: f"{count(v, 4)} tokens", lambda v, s: count(v, 4))
TIME = Unit("time", duration, _time, base="time")
NATS = Unit("nats per token")
BITS = Unit("bits per byte")
RATE = Unit("", lambda v: f"{v:.3g}")
NORM = Unit("before clipping")
SPEED = Unit("tokens per second", lambda v: f"{count(v, 4)}/s", lambda v, s: count(v, 4))
BYTES = Unit("", size, lambda v, s: _bytes(v), base="binary")
SHARE = Unit("share of time", percent, lambda v, s: f"{_plain(100 * v, 100 * s)}%")


@dataclass(frozen=True)
class Axis:
    """A range of values on a line from 0 to 1."""

    low: float
    high: float
    log: bool
    ticks: tuple[tuple[float, str], ...]
    """(place in [0, 1], label)"""

    def place(self, values: np.ndarray) -> np.ndarray:
        """Values → places, cut to [0, 1]; NaN stays NaN."""
        low, high = self.low, self.high
        if self.log:
            with np.errstate(invalid="ignore", divide="ignore"):
                values = np.where(values > 0, np.log10(np.where(values > 0, values, 1)), -np.inf)
            low, high = math.log10(low), math.log10(high)
        return np.clip((values - low) / (high - low), 0, 1)


def make_axis(low: float, high: float, unit: Unit, *, log: bool = False, number: int = 6, tight: bool = False) -> Axis:
    """An axis over [low, high] and a little more (not where `tight`), with about `number` ticks."""
    if not (known(low) and known(high)):
        low, high = 0.0, 1.0
    if log and low > 0:
        return _log_axis(low, high, unit, number)
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        low, high = (low - 0.5 * abs(low), high + 0.5 * abs(high)) if high else (0.0, 1.0)
        low = max(low, 0.0) if high > 0 else low
    elif not tight:
        margin = 0.06 * (high - low)
        low, high = (low - margin if low - margin >= 0 or low < 0 else 0.0), high + margin
    step = _step((high - low) / number, unit.base)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    values = [step * index for index in range(first, last + 1)]
    return Axis(low, high, False, _label(values, step, unit, lambda v: (v - low) / (high - low)))


def _log_axis(low: float, high: float, unit: Unit, number: int) -> Axis:
    low, high = low / 1.06, high * 1.06
    decades = math.log10(high / low)
    sets: Sequence[Sequence[float]] = (
        (1,),
        (1, 3),
        (1, 2, 5),
        (1, 1.5, 2, 3, 5, 7),
        (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8),
    )
    values: list[float] = []
    for mantissas in sets:
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        stride = max(1, math.floor(decades / number)) if len(mantissas) == 1 else 1
        values = [m * 10.0**p for p in powers if p % stride == 0 for m in mantissas if low <= m * 10.0**p <= high]
        if len(values) >= (3 if len(mantissas) == 1 else min(4, number)):
            break
    if len(values) < 3:  # a range so narrow that linear ticks say more
        step = _step((high - low) / number, "decimal")
        values = [step * index for index in range(math.ceil(low / step), math.floor(high / step) + 1)]
        place = math.log10
        return Axis(low, high, True, _label(values, step, unit, lambda v: (place(v) - place(low)) / decades))
    labels = tuple(
        ((math.log10(v) - math.log10(low)) / decades, unit.tick(v, v) if unit.tick else _plain(v, v)) for v in values
    )
    return Axis(low, high, True, labels)


def _label(
    values: list[float], step: float, unit: Unit, place: Callable[[float], float]
) -> tuple[tuple[float, str], ...]:
    word = unit.tick or _plain
    return tuple((place(value), word(0.0 if abs(value) < 1e-12 * step else value, step)) for value in values)


def _step(rough: float, base: str) -> float:
    """The readable number nearest above `rough`: 1, 2, 5 x 10^n; 15 s, 2 h; powers of two for bytes."""
    if rough <= 0:
        return 1.0
    if base == "time" and rough > 0.5:
        for step in _TIMES:
            if step >= rough:
                return float(step)
        return _DAY * _step(rough / _DAY, "decimal")
    if base == "binary":
        return 2.0 ** round(math.log2(rough))
    power = 10.0 ** math.floor(math.log10(rough))
    return next(m * power for m in (1, 2, 5, 10) if m * power >= rough * (1 - 1e-9))
