"""The order of documents: a pure function of (seed, epoch, source), dealt to a fixed number of lanes.

A source is split into ranges of rows: its row groups, cut where they are too large for memory, or until each lane can
have two. In epoch e the n ranges are permuted; range p of epoch e has the number q = e*n + p and belongs to lane q mod
lanes. So a lane's k-th range is q = lane + k*lanes, each document comes exactly once per epoch, and a source with fewer
ranges than lanes still feeds every lane. The rows of a range are permuted likewise.

Permutations sort the raw output of Philox, a counter-based generator whose stream NumPy guarantees across versions
(unlike `Generator.permutation`).
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import numpy as np

MAX_RANGE_BYTES = 32 << 20  # text of one range; a lane holds one or two of them
MAX_RANGE_ROWS = 1 << 20
RANGES_PER_LANE = 2


class RowRange(NamedTuple):
    """Consecutive rows of one row group: what a lane reads at a time."""

    shard: int
    group: int
    start: int
    rows: int
    bytes: int


def split_into_ranges(shards: Sequence[Sequence[Sequence[int]]], lanes: int) -> list[RowRange]:
    """Ranges of a source in canonical order, from the row groups of each shard as its reader scanned them."""
    all_groups = [(s, g, *group[:2]) for s, groups in enumerate(shards) for g, group in enumerate(groups)]
    filled = [(s, g, rows, size) for s, g, rows, size in all_groups if rows]
    total = sum(rows for _, _, rows, _ in filled)
    wanted = RANGES_PER_LANE * lanes
    ranges: list[RowRange] = []
    for shard, group, rows, size in filled:
        parts = max(-(-size // MAX_RANGE_BYTES), -(-rows // MAX_RANGE_ROWS), 1)
        if len(filled) < wanted:
            parts = max(parts, -(-rows * wanted // total))
        parts = min(parts, rows)
        edges = [rows * i // parts for i in range(parts + 1)]
        ranges += [RowRange(shard, group, a, b - a, size * (b - a) // rows) for a, b in pairwise(edges)]
    return ranges


def permutation(n: int, *key: int) -> np.ndarray:
    """A permutation of range(n), int64 (n,), that depends on the integers of `key` alone."""
    digest = hashlib.blake2b(struct.pack(f"<{len(key)}q", *key), digest_size=16, person=b"order").digest()
    draws = np.random.Philox(key=np.frombuffer(digest, dtype="<u8")).random_raw(n)
    return np.argsort(draws, kind="stable")


class Order:
    """The order of source number `source` of a mixture; its ranges are in canonical order, and not empty."""

    def __init__(self, ranges: Sequence[RowRange], *, seed: int, source: int, lanes: int) -> None:
        self.ranges, self.seed, self.source, self.lanes = ranges, seed, source, lanes
        # Lanes are rarely more than one epoch apart.
        self._permuted = lru_cache(maxsize=4)(lambda epoch: permutation(len(ranges), 0, seed, epoch, source))

    def place(self, lane: int, k: int) -> tuple[int, int]:
        """(epoch, number of the range in canonical order) of a lane's k-th range."""
        epoch, position = divmod(lane + k * self.lanes, len(self.ranges))
        return epoch, int(self._permuted(epoch)[position])

    def rows(self, epoch: int, number: int) -> np.ndarray:
        """The order in which range `number` gives its rows in `epoch`."""
        return permutation(self.ranges[number].rows, 1, self.seed, epoch, self.source, number)
