"""Smoothing, thinning, ranges of charts, and numbers as text."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smolforge.formatting import clean, count, duration, flatten, number, percent, size
from smolforge.report.charts import Chart, ChartPage, Level, Series, smooth, smooth_ratio, thin


@given(st.lists(st.floats(-100, 100), min_size=1, max_size=400))
def test_smoothing_stays_inside_what_it_smooths(values: list[float]) -> None:
    y = np.array(values)
    even = smooth(y, 0.05)
    assert len(even) == len(y) and even[0] == pytest.approx(y[0])
    assert (even >= y.min() - 1e-9).all() and (even <= y.max() + 1e-9).all()


def test_smoothing_is_the_mean_around_a_row() -> None:
    y = np.arange(1000.0) % 7
    assert smooth(y, 0.01)[500] == pytest.approx(y[490:511].mean())
    assert smooth(y, 0.01)[999] == pytest.approx(y[989:].mean())


def test_smoothing_passes_over_missing_values() -> None:
    y = np.full(50, 3.0)
    y[[7, 8, 49]] = np.nan
    assert smooth(y).tolist() == [3.0] * 50
    assert np.isnan(smooth(np.full(4, np.nan))).all()


def test_a_geometric_mean_hardly_notices_a_spike() -> None:
    y = np.ones(1000)
    y[500] = 1000
    assert smooth_ratio(y)[500] < 1.5 < smooth(y)[500]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 5000), st.integers(2, 80))
def test_thinning_keeps_order_ends_and_extremes_of_every_column(seed: int, size_: int, columns: int) -> None:
    generator = np.random.default_rng(seed)
    x, y = np.sort(generator.random(size_)), generator.normal(size=size_)
    y[generator.random(size_) < 0.05] = np.nan
    kept = thin({"x": x, "y": y, "z": -y}, x="x", extremes=["y"], buckets=columns)
    kept_x, kept_y = kept["x"], kept["y"]
    assert np.array_equal(kept["z"], -kept_y, equal_nan=True)
    real, seen = np.isfinite(y), np.isfinite(kept_y)
    assert len(kept_x) <= 4 * columns and (np.diff(kept_x) >= 0).all() and set(kept_x) <= set(x)
    assert kept_x[0] == x[0] and kept_x[-1] == x[-1]
    if not real.any():
        return
    assert set(zip(kept_x[seen], kept_y[seen], strict=True)) <= set(zip(x, y, strict=True))
    assert kept_y[seen].min() == y[real].min() and kept_y[seen].max() == y[real].max()
    if len(kept_x) < len(x):
        bucket = np.floor((x - x[0]) / (x[-1] - x[0]) * columns).clip(0, columns - 1)
        kept_bucket = np.floor((kept_x - x[0]) / (x[-1] - x[0]) * columns).clip(0, columns - 1)
        for place in np.unique(bucket[real]):
            assert kept_y[seen & (kept_bucket == place)].max() == y[real & (bucket == place)].max()
            assert kept_y[seen & (kept_bucket == place)].min() == y[real & (bucket == place)].min()


def options(y: np.ndarray, **more: Any) -> dict[str, Any]:
    table = {"tokens": np.arange(len(y), dtype=float), "step": np.arange(len(y), dtype=float), "y": y}
    page = ChartPage([table], [Chart("A chart", "nats", [Series("y", "curve")], **more)])
    return json.loads(page.to_json())["charts"][0]


def test_a_lone_spike_does_not_stretch_the_range() -> None:
    chart = options(np.append(np.ones(10_000), 1e6))
    assert (chart["low"], chart["high"], chart["log"]) == (0.5, 1.5, False)


@given(st.lists(st.floats(-1e29, 1e29), min_size=1, max_size=30), st.booleans())
def test_a_range_holds_its_values(values: list[float], zero: bool) -> None:
    chart = options(np.array(values), zero=zero)
    assert chart["low"] < chart["high"] and (not chart["log"] or chart["low"] > 0)
    slack = 1e-5 * max(map(abs, values))
    assert chart["low"] <= min(values) + slack and chart["high"] >= max(values) - slack


def test_values_that_span_a_factor_of_four_are_logarithmic() -> None:
    assert options(np.array([1.0, 5.0]))["log"] and not options(np.array([1.0, 3.0]))["log"]
    assert not options(np.array([1.0, 5.0]), zero=True)["log"] and not options(np.array([-1.0, 5.0]))["log"]
    assert options(np.array([1.0, 2.0]), levels=[Level("limit", 9.0)])["high"] > 9


def test_constant_and_empty_curves() -> None:
    flat = options(np.full(5, 2.0), levels=[Level("limit", 2.0)])
    assert flat["low"] == 1 and flat["high"] == 3
    assert options(np.zeros(5), zero=True)["high"] == 1
    nothing = ChartPage([{"tokens": np.arange(3.0), "y": np.full(3, np.nan)}], [Chart("x", "nats", [Series("y", "y")])])
    assert nothing.charts == []


@pytest.mark.parametrize(
    ("told", "words"),
    [
        (count(134_515_008), "135M"),
        (count(134_515_008, 4), "134.5M"),
        (count(999_999), "1M"),
        (count(512), "512"),
        (count(2_000_000), "2M"),
        (count(None), "–"),
        (count(math.nan), "–"),
        (duration(7.25), "7.2 s"),
        (duration(59.7), "1 min 00 s"),
        (duration(161), "2 min 41 s"),
        (duration(11_100), "3 h 05 min"),
        (duration(187_200), "2 d 4 h"),
        (size(1536), "1.50 KiB"),
        (size(5), "5 B"),
        (number(0.0030), "0.003000"),
        (number(12.3456), "12.35"),
        (number(1.2e-5), "1.20e-05"),
        (number(0), "0"),
        (percent(0.1834), "18.3%"),
        (clean("a\x00b\ud800"), "a\ufffdb\ufffd"),
    ],
)
def test_numbers_as_words(told: str, words: str) -> None:
    assert told == words


def test_settings_as_text() -> None:
    tree = {"a": {"b": 0.003, "c": None, "d": {"e": 1}}, "f": [1, "x"], "g": True, "h": 10**40}
    assert flatten(tree) == {"a.b": "0.003", "a.c": "–", "a.d": "e: 1", "f": "1, x", "g": "yes", "h": "…"}


def test_long_text_loses_its_middle() -> None:
    assert clean("a" * 50 + "b" * 50, 10) == "aaaaa […90 characters…] bbbbb"
