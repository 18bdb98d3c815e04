"""What the file of a sweep says: the keys that are tried, their values, and how many steps each trial is given."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import random
import re
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from smolforge.config import key_records
from smolforge.config.layers import merge, merge_key, read_file
from smolforge.config.values import Count, Section
from smolforge.data.sources import absolute
from smolforge.errors import BadInput, first_problem

# What a trial does without, unless the sweep or its base says otherwise.
QUIET = {"samples.prompts": [], "logging.trackers": [], "checkpoint.keep": 1}


class Range(Section):
    """Values between two numbers: evenly spaced in a grid, drawn at random else."""

    log: tuple[float, float] | None = None
    """Lowest and highest, evenly spread by their ratio."""
    linear: tuple[float, float] | None = None
    """Lowest and highest, evenly spread by their difference."""
    points: int = Field(default=3, ge=2)
    """grid only: how many values."""

    @model_validator(mode="after")
    def _check(self) -> Range:
        if (self.log is None) == (self.linear is None):
            raise ValueError("a range has either log or linear, as {log: [0.001, 0.01], points: 4}")
        low, high = self.log or self.linear or (0.0, 0.0)
        if not low < high or (self.log and low <= 0):
            raise ValueError(f"a range goes from a lower to a higher number, of log above 0, not from {low} to {high}")
        return self

    def at(self, share: float, whole: bool) -> float:
        """The value at a share of the way, in three digits or as a whole number."""
        if self.log:
            value = self.log[0] * (self.log[1] / self.log[0]) ** share
        else:
            low, high = self.linear or (0.0, 0.0)
            value = low + (high - low) * share
        return round(value) if whole else float(f"{value:.3g}")


class Halving(Section):
    """Successive halving (Jamieson & Talwalkar 2016, arXiv:1502.07943): the best of each round are trained further."""

    steps: Count = Field(ge=1)
    """Length of the first round."""
    factor: int = Field(default=3, ge=2)
    """A round is so many times as long as the one before, and one in so many candidates takes part."""

    def rounds(self, total: int) -> list[int]:
        """The steps at which rounds end, the last of them `total`."""
        ends = itertools.takewhile(lambda end: end < total, (self.steps * self.factor**i for i in itertools.count()))
        return [*ends, total]


class Sweep(Section):
    """The file of a sweep."""

    base: str = "pocket"
    """Preset or YAML file of a run."""
    data: dict[str, float] | list[str] | str | None = None
    """Sources, as of `train --data`; those of the base unless given."""
    set: dict[str, Any] = Field(default_factory=dict)
    """Keys that have the same value in every trial."""
    keys: dict[str, Range | list[Any]] = Field(min_length=1)
    """Keys that are tried: a list of values, or a range."""
    method: Literal["grid", "random"] = "grid"
    """grid tries every combination, random draws `trials` of them."""
    trials: Count | None = Field(default=None, ge=1)
    """random only: how many combinations."""
    seeds: list[int] | int = 1
    """Seeds of each combination, or how many; a seed decides new weights and the order of the data."""
    seed: int = 0
    """random only: of the draws."""
    halving: Halving | None = None
    metric: Literal["bits_per_byte", "loss"] = "bits_per_byte"
    """The lowest held-out value of a run counts, of its weights or of their average."""

    @field_validator("seeds")
    @classmethod
    def _at_least_one(cls, seeds: list[int] | int) -> list[int] | int:
        if seeds == [] or (isinstance(seeds, int) and seeds < 1):
            raise ValueError(f"at least one seed is needed, not {seeds}")
        return seeds

    @field_validator("keys", mode="before")
    @classmethod
    def _one_value(cls, keys: Any) -> Any:
        if not isinstance(keys, dict):
            return keys
        return {key: values if isinstance(values, (list, dict)) else [values] for key, values in keys.items()}

    @model_validator(mode="after")
    def _check(self) -> Sweep:
        if (self.method == "random") != (self.trials is not None):
            raise ValueError("trials: method random needs a number of trials, and grid has none")
        if empty := [key for key, values in self.keys.items() if isinstance(values, list) and not values]:
            raise ValueError(f"keys.{empty[0]}: has no values")
        return self

    def all_seeds(self) -> list[int]:
        """The seeds of each combination."""
        return list(range(self.seeds) if isinstance(self.seeds, int) else dict.fromkeys(self.seeds))

    def candidates(self) -> list[dict[str, Any]]:
        """The combinations that are tried, {key: value}; more `trials` leave the earlier ones as they are."""
        whole = {record.key for record in key_records() if record.allowed.startswith("a whole number")}
        if self.method == "grid":
            columns = [
                [values.at(i / (values.points - 1), key in whole) for i in range(values.points)]
                if isinstance(values, Range)
                else [_number(value) for value in values]
                for key, values in self.keys.items()
            ]
            # A whole number between two others is often one of them.
            once = [[value for i, value in enumerate(column) if value not in column[:i]] for column in columns]
            return [dict(zip(self.keys, chosen, strict=True)) for chosen in itertools.product(*once)]
        draw, found = random.Random(self.seed), {}
        for _ in range(self.trials or 0):
            chosen = {}
            for key, values in self.keys.items():
                is_range = isinstance(values, Range)
                chosen[key] = values.at(draw.random(), key in whole) if is_range else _number(draw.choice(values))
            found[json.dumps(chosen)] = chosen
        return list(found.values())

    def chosen(self, values: dict[str, Any]) -> dict[str, Any]:
        """The sections of a configuration with these values, over those of the base."""
        sources = {} if self.data is None else {"data.sources": self.data}
        return _sections({**sources, **self.set, **values})

    def layers(self, values: dict[str, Any], seed: int) -> dict[str, Any]:
        """The sections of a trial's configuration over those of the base."""
        tree = _sections({**QUIET, "training.seed": seed, "data.seed": seed})
        merge(tree, self.chosen(values))
        return tree


def read_sweep(path: Path) -> Sweep:
    """Read a sweep's file; sources and base get absolute paths.

    Raises:
        BadInput: it cannot be read, or a key or value is wrong.
    """
    try:
        sweep = Sweep.model_validate(read_file(path))
    except ValidationError as error:
        parts = [str(part) for part in error.errors()[0]["loc"]]
        place = ".".join(part for part in parts if "Range" not in part)  # the tag of a member of a union
        field = f"{path}: {place}" if place else str(path)
        raise BadInput(first_problem(error).message, field=field, hint="docs/sweep.md has examples.") from None
    sources = [sweep.data] if isinstance(sweep.data, str) else sweep.data
    if sources is not None:
        weights = sources if isinstance(sources, dict) else dict.fromkeys(sources, 1.0)
        sources = {absolute(source): weight for source, weight in weights.items()}
    base = str(Path(sweep.base).resolve()) if sweep.base.endswith((".yaml", ".yml")) else sweep.base
    return sweep.model_copy(update={"data": sources, "base": base})


def _sections(keys: dict[str, Any]) -> dict[str, Any]:
    """{"a.b": 1} → {"a": {"b": 1}}."""
    tree: dict[str, Any] = {}
    for key, value in keys.items():
        merge_key(tree, key, value)
    return tree


def trial_name(values: dict[str, Any], seed: int) -> str:
    """The directory of a trial, after its values: the sweep may get more values later, and finds it again."""
    short = {key: key.rpartition(".")[2] for key in values}
    if len(set(short.values())) < len(short):
        short = {key: key for key in values}
    shown = {short[key]: value if isinstance(value, str) else json.dumps(value) for key, value in values.items()}
    exact = ",".join(f"{key}={value}" for key, value in {**shown, "seed": seed}.items())
    safe = re.sub(r"[^\w.,=+-]", "_", exact)[:120]
    return safe if safe == exact else f"{safe}-{hashlib.sha256(exact.encode()).hexdigest()[:8]}"


def _number(value: Any) -> Any:
    """1e-3 as a number, which YAML takes for a text; other values as they are."""
    try:
        return float(value) if isinstance(value, str) and math.isfinite(float(value)) else value
    except ValueError:
        return value
