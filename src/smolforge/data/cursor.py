"""The cursor: the position of every lane, in integers only; no token is stored.

A lane's stream of one source is a concatenation of documents, cut into windows; between two windows at most one
document is open. A cursor is kept as JSON: version, step, index, seed, lane_count, and of each lane its positions in
the sources as [k, row, offset, drawn]. Where rows were left out, `bad_rows` has their number for each lane.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from smolforge.errors import CheckpointError

VERSION = 1


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
        lanes = {
            int(lane): [Position(*(_count(n) for n in numbers)) for numbers in state]
            for lane, state in value["lanes"].items()
        }
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
    if cursor["index"] == index["hash"] or cursor["index"] not in [
        change["was"] for change in index.get("accepted", [])
    ]:
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
        if differ := [
            lane for lane in cursor["lanes"] if lanes.get(lane, cursor["lanes"][lane]) != cursor["lanes"][lane]
        ]:
            raise CheckpointError(f"the ranks' cursors differ in lanes {sorted(differ, key=int)}")
        lanes |= cursor["lanes"]
        bad |= cursor.get("bad_rows", {})
    merged = {**first, "lanes": dict(sorted(lanes.items(), key=lambda item: int(item[0])))}
    return {**merged, "bad_rows": bad} if bad else merged


def _count(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**62:
        raise ValueError(f"{value!r} is not a whole number in range")
    return value
