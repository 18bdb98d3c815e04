"""The cursor: the position of every lane, in integers only.

A lane's stream of one source is a concatenation of documents, cut into windows; between two windows at most one
document is open. So the lane's state is, for each source: k (the lane's k-th range), the row in its permuted order, how
many tokens of that row's document were used, and the tokens drawn in all. No token is stored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from smolforge.errors import CheckpointError

VERSION = 1


@dataclass
class Position:
    """Position of a lane in one source."""

    k: int = 0
    row: int = 0
    offset: int = 0
    drawn: int = 0


@dataclass
class LaneCursor:
    """Position of one lane in every source."""

    positions: list[Position]

    def to_json(self) -> list[list[int]]:
        """As a checkpoint keeps it."""
        return [[p.k, p.row, p.offset, p.drawn] for p in self.positions]

    @classmethod
    def start(cls, sources: int) -> LaneCursor:
        """The beginning of a run."""
        return cls([Position() for _ in range(sources)])

    @classmethod
    def from_json(cls, value: Any, sources: int) -> LaneCursor:
        """Read and check what `to_json` wrote.

        Raises:
            CheckpointError: it is not a lane's cursor, or has another number of sources.
        """
        try:
            positions = [Position(*(_count(n) for n in numbers)) for numbers in value]
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"the data cursor is damaged: {error}") from None
        if len(positions) != sources:
            raise CheckpointError(
                f"the data cursor has {len(positions)} sources, the configuration {sources}",
                field="data.sources",
                hint="A run continues with the sources it started with.",
            )
        return cls(positions)


@dataclass
class Cursor:
    """Position of a run (or of one rank's lanes): the step it resumes at and its lanes."""

    step: int
    index: str
    seed: int
    lane_count: int
    lanes: dict[int, LaneCursor] = field(default_factory=dict)

    @classmethod
    def from_json(cls, value: Any, *, index: str, seed: int, lane_count: int, sources: int) -> Cursor:
        """Read a cursor and check that it belongs to this stream.

        Raises:
            CheckpointError: it is damaged, or belongs to another index, seed or number of lanes.
        """
        try:
            if value["version"] != VERSION:
                raise ValueError(f"version {value['version']!r}")
            step = _count(value["step"])
            lanes = {int(lane): LaneCursor.from_json(state, sources) for lane, state in value["lanes"].items()}
            recorded = (value["index"], value["seed"], value["lane_count"])
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            raise CheckpointError(f"the data cursor is damaged: {error!r}") from None
        for name, was, now in zip(
            ("index", "data.seed", "data.lanes"), recorded, (index, seed, lane_count), strict=True
        ):
            if was != now:
                raise CheckpointError(
                    f"the cursor was made with {was!r}, the stream has {now!r}",
                    field=name,
                    hint="A run continues with the data, seed and lanes it started with; a new run may change them.",
                )
        if not set(lanes) <= set(range(lane_count)):
            raise CheckpointError(f"the data cursor is damaged: lanes {sorted(lanes)} of {lane_count}")
        return cls(step, index, seed, lane_count, lanes)


def merge_cursors(cursors: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The run's one cursor from those of all ranks at the same step.

    Raises:
        CheckpointError: the cursors are of different steps or streams, or two of them hold the same lane.
    """
    if not cursors:
        raise CheckpointError("no cursors to merge")
    first = cursors[0]
    lanes: dict[str, Any] = {}
    for cursor in cursors:
        for key in ("version", "step", "index", "seed", "lane_count"):
            if cursor.get(key) != first.get(key):
                raise CheckpointError(f"the ranks' cursors differ in {key}: {first.get(key)!r} and {cursor.get(key)!r}")
        twice = set(lanes) & set(cursor["lanes"])
        if twice:
            raise CheckpointError(f"two ranks hold the same lanes: {sorted(twice, key=int)}")
        lanes |= cursor["lanes"]
    return {**first, "lanes": dict(sorted(lanes.items(), key=lambda item: int(item[0])))}


def _count(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**62:
        raise ValueError(f"{value!r} is not a whole number in range")
    return value
