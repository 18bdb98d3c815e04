"""Smoothing, thinning, ticks and the words for numbers."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from smolforge.report.axes import BYTES, NATS, SHARE, TIME, TOKENS, Unit, make_axis
from smolforge.report.chart import Chart, Level, Line
from smolforge.report.curves import sample, smooth, smooth_ratio, thin, typical_range
from smolforge.report.formatting import clean, count, duration, number, percent, size


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
    kept_x, kept_y = thin(x, y, columns)
    real = np.isfinite(y)
    if not real.any():
        assert not len(kept_x)
        return
    assert len(kept_x) <= 4 * columns and (np.diff(kept_x) >= 0).all()
    assert set(zip(kept_x, kept_y, strict=True)) <= set(zip(x, y, strict=True))
    rx, ry = x[real], y[real]
    assert kept_x[0] == rx[0] and kept_x[-1] == rx[-1] and kept_y.min() == ry.min() and kept_y.max() == ry.max()
    if len(kept_x) < len(rx):
        column = np.floor((rx - rx[0]) / (rx[-1] - rx[0]) * columns).clip(0, columns - 1)
        kept = np.floor((kept_x - rx[0]) / (rx[-1] - rx[0]) * columns).clip(0, columns - 1)
        for place in np.unique(column):
            assert kept_y[kept == place].max() == ry[column == place].max()
            assert kept_y[kept == place].min() == ry[column == place].min()


def test_the_nearest_row_is_sampled() -> None:
    x, y = np.array([0.0, 10, 20]), np.array([1.0, 2, 3])
    assert sample(x, y, np.array([-5, 4, 6, 14.9, 99])).tolist() == [1, 1, 2, 2, 3]


def test_a_lone_spike_does_not_stretch_the_range() -> None:
    assert typical_range(np.append(np.ones(10_000), 1e6)) == (1.0, 1.0)
    assert typical_range(np.array([np.nan])) is None


def check_axis(low: float, high: float, unit: Unit, log: bool, wanted: int) -> None:
    axis = make_axis(low, high, unit, log=log, number=wanted)
    places = [place for place, _ in axis.ticks]
    assert 1 <= len(places) <= 2 * wanted + 4
    assert all(-1e-6 <= place <= 1 + 1e-6 for place in places) and places == sorted(places)
    inside = axis.place(np.array([low, high]))
    assert 0 <= inside[0] <= inside[1] <= 1
    if high / low > 1.5:
        labels = [label for _, label in axis.ticks]
        assert len(set(labels)) == len(labels), labels


_VALUES = st.floats(-6, 9).map(lambda power: 10**power)


@settings(deadline=None)
@given(_VALUES, _VALUES, st.booleans(), st.sampled_from([TOKENS, TIME, NATS, SHARE]), st.integers(4, 9))
@example(0.0625, 556247776.0, True, TOKENS, 4)
def test_axes_have_a_few_ticks_in_order_with_different_words(a, b, log, unit, wanted) -> None:
    check_axis(*sorted((a, b)), unit, log, wanted)


@settings(deadline=None)
@given(st.floats(1e6, 1e12), st.floats(1e6, 1e12), st.integers(4, 9))
def test_bytes_have_binary_ticks(a, b, wanted) -> None:
    check_axis(*sorted((a, b)), BYTES, False, wanted)


@pytest.mark.parametrize(
    ("low", "high", "unit", "log", "labels"),
    [
        (0, 2.6e6, TOKENS, False, ["0", "500k", "1M", "1.5M", "2M", "2.5M"]),
        (0, 100, TIME, False, ["0", "30 s", "1 min", "1:30"]),
        (0, 5 * 3600, TIME, False, ["0", "1 h", "2 h", "3 h", "4 h", "5 h"]),
        (1.5, 10.8, NATS, True, ["1.5", "2", "3", "5", "7", "10"]),
        (0, 2**32, BYTES, False, ["0", "512 MiB", "1 GiB", "1.5 GiB", "2 GiB"]),
    ],
)
def test_ticks_are_numbers_people_use(low, high, unit, log, labels) -> None:
    axis = make_axis(low, high, unit, log=log, number=6, tight=not log)
    told = [label for _, label in axis.ticks]
    assert told[: len(labels)] == labels


def test_constant_and_empty_curves_draw() -> None:
    x = np.arange(5.0)
    flat = Chart("Flat", TOKENS, NATS, [Line("y", x, np.full(5, 2.0))], levels=[Level("limit", 2.0)])
    assert "NaN" not in str(flat.draw()) and "nan" not in str(flat.draw()) and "<figure" in str(flat.draw())
    zero = Chart("Zero", TOKENS, SHARE, [Line("y", x, np.zeros(5))], zero=True)
    assert "nan" not in str(zero.draw())
    assert str(Chart("None", TOKENS, NATS, [Line("y", x, np.full(5, np.nan))]).draw()) == ""


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


def test_long_text_loses_its_middle() -> None:
    assert clean("a" * 50 + "b" * 50, 10) == "aaaaa […90 characters…] bbbbb"
