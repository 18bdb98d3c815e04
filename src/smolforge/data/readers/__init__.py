"""Readers: from a shard to rows of text. A reader counts the rows of each row group once, then reads any of them.

    parquet.py     the text column of a parquet file, by row group
    text.py        jsonl, txt and other plain text, in row groups of about a megabyte
    as_lines.py    json, csv and tsv, and parquet with nested columns, as jsonl
    document.py    html, pdf, docx and epub, as txt
    conversation.py  from a row to a conversation, in every form of chat data

Adding a format is a file here, a line in `READERS`, and its ending in `sources.ENDINGS`.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import NamedTuple

from smolforge.data.sources import GROUPS, Context, Shard
from smolforge.errors import DataError

READERS = {
    "parquet": "smolforge.data.readers.parquet:ParquetReader",
    "jsonl": "smolforge.data.readers.text:JsonLinesReader",
    **dict.fromkeys(("csv", "tsv"), "smolforge.data.readers.as_lines:TableReader"),
    "json": "smolforge.data.readers.as_lines:JsonReader",
    **dict.fromkeys(("txt", "md", "code"), "smolforge.data.readers.text:PlainTextReader"),
    **dict.fromkeys(("html", "pdf", "docx", "epub"), "smolforge.data.readers.document:DocumentReader"),
    "tales": "smolforge.tales.source:TalesReader",
}

SKIP_HINT = "`--set data.on_error=skip` leaves such rows out."


class BadRow(DataError):
    """A row that cannot be used, where others of its shard can; `data.on_error` decides whether it is left out."""


class Row(NamedTuple):
    """One row of a shard.

    `ends` is False where its document continues in the next row; `problem` says why a row without text is left out.
    """

    text: str
    ends: bool = True
    problem: str | None = None


Rows = Callable[[int], Row]
"""Gives a row by its number in the row group."""


class Reader(ABC):
    """One shard read as rows of text; `groups` are its row groups as [rows, bytes of text, what else reading needs]."""

    def __init__(self, shard: Shard, context: Context) -> None:
        self.shard, self.context = shard, context
        self.bad_rows = 0  # that `scan` found, as far as it looks at rows
        self.first_bad: BadRow | None = None
        self.counted: dict[str, int] = {}  # documents and bytes of their text, where `scan` looks at each

    @abstractmethod
    def scan(self) -> list[list[int]]:
        """The row groups; DataError where the shard is damaged or lacks the text column, BadRow as the context says."""

    def use(self, groups: list[list[int]]) -> None:
        """Take the row groups from `scan` or an index."""
        self.groups = groups

    @abstractmethod
    def rows(self, group: int, start: int, count: int) -> Rows:
        """Rows [start, start + count) of a row group, each read when asked for; BadRow where it cannot be used."""

    def read_ahead(self, group: int) -> None:
        """Start to fetch what `rows` of this group will need, where there is room."""
        return

    def close(self) -> None:
        """Release files and memory."""
        return


def open_reader(shard: Shard, context: Context) -> Reader:
    """The reader of the shard's format; nothing is read yet."""
    # A conversation is in several columns, or in one with others inside: not what the parquet reader has ranges of.
    chat = context.format != "text"
    if chat and shard.format in {"txt"} | GROUPS[2]:
        hint = "Conversations are read from .parquet, .jsonl, .json, .csv and .tsv; `smolforge train` reads text."
        raise DataError(f"{shard.name} holds text, not conversations", field="data.sources", hint=hint)
    format = "csv" if chat and shard.format == "parquet" else shard.format
    module, _, name = READERS[format].partition(":")
    return getattr(importlib.import_module(module), name)(shard, context)
