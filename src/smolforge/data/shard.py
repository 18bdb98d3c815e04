"""A shard is a file of text somewhere; a source is the list of its shards, resolved to a revision.

The three words that the rest of the room speaks. *Sources* (`sources/`, one file per kind of SRC) turn the user's
word into a `Source`. A `Shard` gives bytes by range and says what must not change about it. *Formats*
(`readers/`, one file per format) turn a shard into rows: `Format.scan` counts them once for the index,
`Format.rows` reads a few of them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from smolforge.data.document import Row

if TYPE_CHECKING:
    from smolforge.data.cache import Cache
    from smolforge.data.network import Network
    from smolforge.data.readahead import ReadAhead


@dataclass
class Context:
    """What kinds, shards and formats share: the words of the configuration and the machinery below them."""

    column: str
    separator: str | None
    read_ahead: ReadAhead
    offline: bool
    cache: Cache
    network: Network


class Shard(ABC):
    """One file of a source.

    Attributes:
        name: path inside the source, with `/`; what errors and addresses call it.
        format: the format it is in, a key of `formats.FORMATS`.
        size: bytes.
        remote: whether reading it asks the network.
    """

    name: str
    format: str
    size: int
    remote: bool = False

    @abstractmethod
    def read(self, start: int, length: int) -> bytes:
        """Exactly `length` bytes from `start`.

        Raises:
            SourceChanged: the shard is no longer the one that was looked at.
            SourceUnavailable: the network stayed away.
            DataError: the shard cannot be read.
        """

    @abstractmethod
    def whole(self) -> Path:
        """A local file with all its bytes; one that is remote is fetched into the cache once."""

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """What must stay equal while a run lives, JSON-able; goes into the index and its hash."""

    def same_as(self, recorded: dict[str, Any]) -> str | None:
        """What changed against an index entry, in words, or None."""
        if recorded["size"] != self.size:
            return f"its size was {recorded['size']:,} bytes and is {self.size:,}"
        now = self.identity()
        for key, was in recorded["identity"].items():
            if now.get(key) != was:
                return f"its {key} was {was} and is {now.get(key)}"
        return None

    def notes(self) -> dict[str, Any]:
        """What helps to recognise the shard quickly but may change without harm; kept beside the identity."""
        return {}

    def forget(self) -> None:
        """Drop cached bytes: what was read made no sense."""
        return


@dataclass
class Source:
    """A source as resolved: its shards in canonical order (by name)."""

    spec: str
    kind: str
    shards: list[Shard]
    revision: str | None = None
    entropy_bits_per_byte: Callable[[], float] | None = None


class Rows(Protocol):
    """Rows of one row group, readable at random."""

    def take(self, rows: Sequence[int]) -> list[Row]:
        """The named rows (relative to the group), in the order asked."""
        ...


class Format(ABC):
    """One shard read as rows of text."""

    def __init__(self, shard: Shard, context: Context) -> None:
        self.shard, self.context = shard, context

    @abstractmethod
    def scan(self) -> list[list[int]]:
        """The row groups as [rows, bytes of text, what else reading needs]; reads as little as the format allows.

        Raises:
            DataError: the shard is damaged or lacks the text column.
        """

    def use(self, groups: list[list[int]]) -> None:
        """Take the row groups from an index instead of scanning."""
        self.groups = groups

    @abstractmethod
    def rows(self, group: int, start: int, count: int) -> Rows:
        """Rows [start, start + count) of a row group; other rows of it may be missing from the answer.

        Raises:
            DataError: the shard is damaged.
        """

    def ahead(self, group: int) -> None:
        """Begin to fetch what `rows` of this group will need, where there is room."""
        return

    def close(self) -> None:
        """Let go of files."""
        return
