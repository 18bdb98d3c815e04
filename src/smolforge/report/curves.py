"""Long curves made short without changing what they show.

A page is about a thousand pixels wide, a run may have a million rows. Thinning keeps the lowest and the highest
value of each pixel column, so that a single spike among a million rows is still seen.
"""

from __future__ import annotations

import numpy as np

Array = np.ndarray
COLUMNS = 500
"""Pixel columns that a thinned curve is resolved into."""


def smooth(values: Array, share: float = 0.01) -> Array:
    """Centred running mean over a window of 2 x `share` of the curve; NaN counts as absent.

    The window shrinks towards the start, where a loss falls steeply and a wide window would draw a plateau that
    never was; at the end it is cut, and the last value is the mean of the last `share` of the rows.
    """
    size = len(values)
    if not size:
        return np.asarray(values, dtype=float)
    finite = np.isfinite(values)
    total = np.concatenate([[0.0], np.cumsum(np.where(finite, values, 0.0))])
    number = np.concatenate([[0], np.cumsum(finite)])
    index = np.arange(size)
    half = np.minimum(max(2, round(share * size)), index // 2)
    low, high = index - half, np.minimum(index + half, size - 1) + 1
    present = number[high] - number[low]
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(present > 0, (total[high] - total[low]) / present, np.nan)


def smooth_ratio(values: Array) -> Array:
    """`smooth` by the geometric mean, for positive quantities whose spikes are many times their usual size."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.exp(smooth(np.log(np.where(values > 0, values, np.nan))))


def thin(x: Array, y: Array, columns: int = COLUMNS) -> tuple[Array, Array]:
    """At most 4 points of each of `columns` equal parts of x: first, lowest, highest, last.

    Args:
        x: (n,) not falling.
        y: (n,) where NaN is absent.

    Returns:
        The kept (x, y), in order.
    """
    finite = np.isfinite(x) & np.isfinite(y)
    x, y = x[finite], y[finite]
    if len(x) <= 2 * columns:
        return x, y
    span = x[-1] - x[0]
    place = np.floor((x - x[0]) / (span or 1.0) * columns).clip(0, columns - 1).astype(int)
    starts = np.flatnonzero(np.diff(place, prepend=-1))
    ends = np.append(starts[1:], len(x)) - 1
    by_value = np.lexsort((y, place))  # inside a column from the lowest to the highest; columns keep their extent
    kept = np.unique(np.concatenate([starts, ends, by_value[starts], by_value[ends]]))
    return x[kept], y[kept]


def sample(x: Array, y: Array, at: Array) -> Array:
    """The y whose x is nearest to each of `at`; NaN where the curve is empty."""
    if not len(x):
        return np.full(len(at), np.nan)
    right = np.searchsorted(x, at).clip(0, len(x) - 1)
    left = (right - 1).clip(0)
    nearer = np.abs(x[left] - at) <= np.abs(x[right] - at)
    return y[np.where(nearer, left, right)]


def typical_range(values: Array) -> tuple[float, float] | None:
    """The range that holds 99.8% of the values, or None where there is none: a single spike must not flatten a plot."""
    values = values[np.isfinite(values)]
    if not len(values):
        return None
    low, high = np.quantile(values, [0.001, 0.999]) if len(values) > 200 else (values.min(), values.max())
    return float(low), float(high)
