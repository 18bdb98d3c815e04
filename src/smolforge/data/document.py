"""A document and its address, and the rule that decides which documents training never sees.

The rule is a hash of the text alone: it gives the same answer in any order, on any rank, for any seed, and identical
texts always land on the same side, so a held-out document cannot leak into training through a duplicate.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import NamedTuple


class Address(NamedTuple):
    """Where a document is: source as configured, file in it, row group of the file, row of the group."""

    source: str
    file: str
    row_group: int
    row: int


class Row(NamedTuple):
    """One row of a shard as its reader gives it. `ends` is False where its document continues in the next row."""

    text: str
    ends: bool = True


@dataclass(frozen=True, slots=True)
class Document:
    """One document (of a very long text: one piece of it) with its address."""

    source: str
    file: str
    row_group: int
    row: int
    text: str

    @property
    def address(self) -> Address:
        """The document without its text."""
        return Address(self.source, self.file, self.row_group, self.row)


def is_blank(text: str) -> bool:
    """Whether a document has only white space; such documents are passed over everywhere."""
    return not text or text.isspace()


def is_held_out(text: str, share: float) -> bool:
    """Whether `text` belongs to the `share` of all texts that training never sees (uniform hash below share)."""
    if share <= 0:
        return False
    digest = hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=8, person=b"held-out").digest()
    return int.from_bytes(digest, "little") < share * 2.0**64
