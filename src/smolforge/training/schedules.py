"""Learning rates as pure functions of the step.

`rate(config, step, total)` is the factor of the peak learning rate for the update of step `step` (0-based) in a run
of `total` steps. Nothing is kept between calls: a resumed run needs only its step.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from smolforge.config import ScheduleConfig


def rate(config: ScheduleConfig, step: int, total: int) -> float:
    """Factor of the peak learning rate, in [0, 1]."""
    return _SCHEDULES[config.name](config, step, total)


def steps_of(value: float, total: int) -> int:
    """A length given in steps, or as a share of the run where below 1."""
    return round(value * total) if value < 1 else min(int(value), total)


def _warm(config: ScheduleConfig, step: int, total: int) -> float:
    # The first update already moves: (step + 1) / (warmup + 1) is above 0 and reaches 1 right after the warmup.
    return min(1.0, (step + 1) / (steps_of(config.warmup, total) + 1))


def _constant(config: ScheduleConfig, step: int, total: int) -> float:
    return _warm(config, step, total)


def _wsd(config: ScheduleConfig, step: int, total: int) -> float:
    """Warmup, stable, linear decay (Hu et al. 2024, arXiv:2404.06395; SmolLM2's own)."""
    decay = steps_of(config.decay, total)
    left = total - step
    falling = 1.0 if left > decay else config.floor + (1 - config.floor) * left / (decay + 1)
    return min(_warm(config, step, total), falling)


def _cosine(config: ScheduleConfig, step: int, total: int) -> float:
    """Warmup, then half a cosine to the floor (Loshchilov & Hutter 2016, arXiv:1608.03983)."""
    warmup = steps_of(config.warmup, total)
    if step < warmup:
        return _warm(config, step, total)
    share = min(1.0, (step - warmup) / max(1, total - warmup))
    return config.floor + (1 - config.floor) * (1 + math.cos(math.pi * share)) / 2


def _onecycle(config: ScheduleConfig, step: int, total: int) -> float:
    """Up from `start`, down to `floor` times the start, as torch's OneCycleLR (Smith 2017, arXiv:1708.07120)."""
    peak_at = max(1.0, steps_of(config.warmup, total) - 1.0)
    last = max(peak_at + 1, total - 1.0)
    end = config.start * config.floor
    if step <= peak_at:
        return _anneal(config.anneal, config.start, 1.0, step / peak_at)
    return _anneal(config.anneal, 1.0, end, min(1.0, (step - peak_at) / (last - peak_at)))


def _anneal(shape: str, first: float, last: float, share: float) -> float:
    if shape == "linear":
        return first + (last - first) * share
    return last + (first - last) * (1 + math.cos(math.pi * share)) / 2


_SCHEDULES: dict[str, Callable[[ScheduleConfig, int, int], float]] = {
    "wsd": _wsd,
    "cosine": _cosine,
    "onecycle": _onecycle,
    "constant": _constant,
}
