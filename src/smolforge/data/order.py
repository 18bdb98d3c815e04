"""The order of documents, and the position in it: a pure function of (seed, epoch, source), dealt to a number of lanes.

A source is split into ranges of rows: its row groups, cut where they are too large for memory, or until each lane can
have two. In epoch e the n ranges are permuted; range p of epoch e has the number q = e*n + p and belongs to lane q mod
lanes. So a lane's k-th range is q = lane + k*lanes, each document comes exactly once per epoch, and a source with fewer
ranges than lanes still feeds every lane. The rows of a range are permuted likewise.

Permutations sort the raw output of Philox, a counter-based generator whose stream NumPy guarantees across versions
(unlike `Generator.permutation`).

The cursor is the position of every lane, in integers only; no token is stored. A lane's stream of one source is a
concatenation of documents, cut into windows; between two windows at most one document is open. A cursor is kept as
JSON: version, step, index, seed, lane_count, and of each lane its positions in the sources as [k, row, offset, drawn].
Where rows were left out, `bad_rows` has their number for each lane.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from smolforge.errors import CheckpointError

MAX_RANGE_BYTES = 32 << 20  # text of one range; a lane holds one or two of them
MAX_RANGE_ROWS = 1 << 20
RANGES_PER_LANE = 2
VERSION = 1  # of the cursor


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


# The cursor


@dataclass
class Position:
    """Position of a lane in one source."""

    k: int = 0  # the lane's k-th range
    row: int = 0  # in the range's permuted order
    offset: int = 0  # tokens of the row's document that were used
    drawn: int = 0  # tokens in all


def to_json(positions: Sequence[Position]) -> list[list[int]]:
    """A lane's positions as the cursor keeps them."""
    return [[p.k, p.row, p.offset, p.drawn] for p in positions]


def read_cursor(
    value: Any, *, index: str, seed: int, lane_count: int, sources: int
) -> tuple[int, dict[int, list[Position]]]:
    """The step that a cursor resumes at and the positions of its lanes, checked to belong to this stream.

    Raises:
        CheckpointError: it is damaged, or belongs to another index, seed or number of lanes or sources.
    """
    try:
        if value["version"] != VERSION:
            raise ValueError(f"version {value['version']!r}")
        step = _count(value["step"])
        given = {int(lane): state for lane, state in value["lanes"].items()}
        lanes = {lane: [Position(*map(_count, numbers)) for numbers in state] for lane, state in given.items()}
        recorded = (value["index"], value["seed"], value["lane_count"])
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise CheckpointError(f"the data cursor is damaged: {error!r}") from None
    for name, was, now in zip(("index", "data.seed", "data.lanes"), recorded, (index, seed, lane_count), strict=True):
        if was != now:
            hint = "A run continues with the data, seed and lanes it started with; a new run may change them."
            raise CheckpointError(f"the cursor was made with {was!r}, the stream has {now!r}", field=name, hint=hint)
    if not set(lanes) <= set(range(lane_count)):
        raise CheckpointError(f"the data cursor is damaged: lanes {sorted(lanes)} of {lane_count}")
    for positions in lanes.values():
        if len(positions) != sources:
            problem = f"the data cursor has {len(positions)} sources, the configuration {sources}"
            hint = "A run continues with the sources it started with."
            raise CheckpointError(problem, field="data.sources", hint=hint)
    return step, lanes


def bad_rows(cursor: dict[str, Any] | None) -> dict[int, int]:
    """How many rows each lane has left out so far, because they could not be used; lanes without any are missing."""
    found = (cursor or {}).get("bad_rows", {})
    try:
        return {int(lane): _count(rows) for lane, rows in found.items()}
    except (TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"the data cursor is damaged: {error!r}") from None


def accepted_cursor(cursor: dict[str, Any], index: dict[str, Any]) -> dict[str, Any]:
    """The cursor for this index.

    Where it belongs to data before a change that the user accepted, it is the same place of the new data; documents
    that were begun are read from their start.
    """
    known = [change["was"] for change in index.get("accepted", [])]
    if cursor["index"] == index["hash"] or cursor["index"] not in known:
        return cursor
    lanes = {lane: [[k, row, 0, drawn] for k, row, _, drawn in state] for lane, state in cursor["lanes"].items()}
    return {**cursor, "index": index["hash"], "lanes": lanes}


def merge_cursors(cursors: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The run's one cursor from those of all ranks at the same step.

    Raises:
        CheckpointError: the cursors are of different steps or streams, or two of them differ in a lane.
    """
    first = cursors[0]
    lanes: dict[str, Any] = {}
    bad: dict[str, int] = {}
    for cursor in cursors:
        for key in ("version", "step", "index", "seed", "lane_count"):
            if cursor.get(key) != first.get(key):
                raise CheckpointError(f"the ranks' cursors differ in {key}: {first.get(key)!r} and {cursor.get(key)!r}")
        if differ := [lane for lane, state in cursor["lanes"].items() if lanes.get(lane, state) != state]:
            raise CheckpointError(f"the ranks' cursors differ in lanes {sorted(differ, key=int)}")
        lanes |= cursor["lanes"]
        bad |= cursor.get("bad_rows", {})
    merged = {**first, "lanes": dict(sorted(lanes.items(), key=lambda item: int(item[0])))}
    return {**merged, "bad_rows": bad} if bad else merged


def _count(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**62:
        raise ValueError(f"{value!r} is not a whole number in range")
    return value
