"""The order is a pure function, a permutation, and deals everything exactly once."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from smolforge.data.order import MAX_RANGE_BYTES, MAX_RANGE_ROWS, Order, RowRange, permutation, split_into_ranges

GROUPS = st.lists(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 10**9)), max_size=6), min_size=1, max_size=5)


@given(GROUPS, st.integers(1, 20))
def test_ranges_cover_every_row_once_and_are_bounded(groups: list[list[tuple[int, int]]], lanes: int) -> None:
    ranges = split_into_ranges(groups, lanes)
    rows = [(s.shard, s.group, s.start + i) for s in ranges for i in range(s.rows)]
    expected = [(s, g, r) for s, gs in enumerate(groups) for g, (n, _) in enumerate(gs) for r in range(n)]
    assert rows == expected
    total = len(expected)
    assert len(ranges) >= min(total, 2 * lanes)
    for piece in ranges:
        assert piece.rows > 0
        assert piece.bytes <= MAX_RANGE_BYTES + piece.bytes / piece.rows + 1  # cut between rows: one more at most


def test_huge_row_groups_are_split_into_ranges() -> None:
    assert {s.rows for s in split_into_ranges([[(3 * MAX_RANGE_ROWS, 1)]], 1)} == {MAX_RANGE_ROWS}
    assert len(split_into_ranges([[(1000, 10 * MAX_RANGE_BYTES)]], 1)) == 10


@given(st.integers(0, 200), st.integers(0, 2**62), st.integers(0, 100))
def test_permutations_are_permutations_and_depend_on_the_key(n: int, seed: int, epoch: int) -> None:
    one = permutation(n, 0, seed, epoch)
    assert sorted(one) == list(range(n))
    assert list(one) == list(permutation(n, 0, seed, epoch))
    if n > 30:
        assert list(one) != list(permutation(n, 0, seed, epoch + 1))
        assert list(one) != list(permutation(n, 1, seed, epoch))


def test_the_permutation_is_the_one_that_runs_on_disk_were_made_with() -> None:
    # Changing this list changes every run's data: cursors in checkpoints would point elsewhere.
    assert permutation(10, 0, 7, 3).tolist() == PINNED


PINNED = [9, 3, 5, 8, 2, 1, 7, 6, 0, 4]


@settings(max_examples=50)
@given(st.integers(1, 30), st.integers(1, 12), st.integers(0, 5), st.integers(1, 4))
def test_each_range_comes_once_per_epoch_over_all_lanes(n: int, lanes: int, seed: int, epochs: int) -> None:
    order = Order([RowRange(0, i, 0, 3, 9) for i in range(n)], seed=seed, source=0, lanes=lanes)
    seen = []
    for lane in range(lanes):
        k = 0
        while (place := order.place(lane, k))[0] < epochs:
            seen.append(place)
            k += 1
    assert sorted(seen) == [(epoch, i) for epoch in range(epochs) for i in range(n)]


def test_every_lane_gets_text_even_from_one_range() -> None:
    order = Order([RowRange(0, 0, 0, 1, 9)], seed=0, source=0, lanes=8)
    assert [order.place(lane, 0) for lane in range(8)] == [(lane, 0) for lane in range(8)]


def test_epochs_far_back_can_be_asked_again() -> None:
    order = Order([RowRange(0, i, 0, 1, 9) for i in range(5)], seed=0, source=0, lanes=1)
    first = [order.place(0, k) for k in range(5)]
    for k in range(200):
        order.place(0, k)
    assert [order.place(0, k) for k in range(5)] == first
