"""`tales` as a source of training data: document i is a pure function of i, so nothing is read and nothing stored.

An epoch is its first 2**20 documents, in row groups of 512. The corpus is the same for every `data.seed`, which only
decides the order, so the losses of runs with different seeds can be compared. Data finds this module by its name in
`smolforge.data.sources.SOURCES`, and the reader in `smolforge.data.readers.READERS`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from smolforge import tales
from smolforge.data.document import Row
from smolforge.data.readers import Reader, Rows
from smolforge.data.sources import Context, Shard, Source
from smolforge.errors import DataError

DOCUMENTS = 2**20
GROUP = 512
PROBE = 8  # documents whose text identifies the corpus


class TalesShard(Shard):
    """The generator as one shard."""

    name, format, size = "tales", "tales", 0

    def read(self, start: int, length: int) -> bytes:
        raise DataError("the embedded corpus has no bytes to read")

    def whole(self) -> Path:
        raise DataError("the embedded corpus is not a file", hint="`smolforge data write` makes files of it.")

    def identity(self) -> dict[str, Any]:
        probe = "\0".join(tales.document(i * (DOCUMENTS // PROBE)).text for i in range(PROBE))
        return {"documents": DOCUMENTS, "hash": hashlib.blake2b(probe.encode(), digest_size=16).hexdigest()}


class TalesRows:
    """Documents from number `first` on, generated when they are asked for."""

    def __init__(self, first: int) -> None:
        self.first = first

    def take(self, rows: Sequence[int]) -> list[Row]:
        return [Row(tales.document(self.first + row).text) for row in rows]


class TalesReader(Reader):
    """Row groups of 512 documents."""

    def scan(self) -> list[list[int]]:
        return [[GROUP, 0] for _ in range(DOCUMENTS // GROUP)]

    def rows(self, group: int, start: int, count: int) -> Rows:
        return TalesRows(group * GROUP)


def matches(spec: str) -> bool:
    """Whether SRC is the embedded corpus (a local folder of that name is written ./tales)."""
    return spec == "tales"


def resolve(spec: str, context: Context, recorded: dict[str, Any] | None) -> Source:
    """The one shard of the generator."""
    return Source(spec, "tales", [TalesShard()], entropy_bits_per_byte=tales.entropy_bits_per_byte)
