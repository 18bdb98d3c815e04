"""Read json, csv, tsv and, for chat data, parquet with nested columns: copied once into the cache as lines of JSON.

A .json file is one array of objects, copied piece by piece, or has an object on each line, and is then read as it is.
"""

from __future__ import annotations

import codecs
import csv
import functools
import io
import itertools
import json
import re
import sys
from collections.abc import Iterator
from typing import Any

from smolforge.data.readers.text import MAX_LINE, JsonLinesReader, not_utf8
from smolforge.data.sources import damaged
from smolforge.errors import DataError

LINES = 1000  # written at a time
_BETWEEN = re.compile(r"[\s,\ufeff]*")
_LINE_ENDS = str.maketrans("\r\n", "  ")  # of JSON they are always between two tokens
_DECODER = json.JSONDecoder()


class TableReader(JsonLinesReader):
    """Rows of a csv, tsv or parquet file, through JSON lines."""

    def place(self, number: int) -> str:
        return f"{self.shard.name}, row {number}"

    def is_copied(self) -> bool:
        return True

    def convert(self, blocks: Iterator[bytes]) -> Iterator[bytes]:
        rows = self._parquet() if self.shard.format == "parquet" else self._csv(blocks)
        while some := list(itertools.islice(rows, LINES)):
            lines = (json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in some)
            yield "".join(lines).encode("utf-8", "surrogatepass")

    def _csv(self, blocks: Iterator[bytes]) -> Iterator[dict[str, Any]]:
        csv.field_size_limit(sys.maxsize)
        try:
            file = io.StringIO(b"".join(blocks).decode("utf-8-sig"), newline="")
        except UnicodeDecodeError as error:
            raise not_utf8(self.shard.name, error, 0) from None
        rows = csv.DictReader(file, strict=True, delimiter="\t" if self.shard.format == "tsv" else ",")
        try:
            for row in rows:
                if None in row or None in row.values():
                    problem = f"{self.shard.name}, line {rows.line_num} has another number of columns than the first"
                    hint = "Quote values that contain commas (in .tsv, tabs)."
                    raise DataError(f"{problem} line", field="data.sources", hint=hint)
                yield row
        except csv.Error as error:
            problem = f"{self.shard.name}, line {rows.line_num} is not valid {self.shard.format}: {error}"
            raise DataError(problem, field="data.sources") from None

    def _parquet(self) -> Iterator[dict[str, Any]]:
        import pyarrow.parquet as pq

        try:
            for batch in pq.ParquetFile(self.shard.whole()).iter_batches(LINES, use_threads=False):
                yield from batch.to_pylist()
        except Exception as error:
            raise damaged(self.shard.name, error) from None


class JsonReader(JsonLinesReader):
    """A .json file."""

    @functools.cached_property
    def is_array(self) -> bool:
        """Whether the file begins with a bracket."""
        for block in self.blocks():
            if start := block.removeprefix(codecs.BOM_UTF8).lstrip():
                return start.startswith(b"[")
        return False

    def is_copied(self) -> bool:
        return super().is_copied() or self.is_array

    def convert(self, blocks: Iterator[bytes]) -> Iterator[bytes]:
        return split_array(blocks, self.shard.name) if self.is_array else blocks

    def place(self, number: int) -> str:
        return f"{self.shard.name}, item {number}" if self.is_array else super().place(number)


def split_array(blocks: Iterator[bytes], name: str) -> Iterator[bytes]:
    """The items of a JSON array, one a line. An item cut by the end of the file is given as it is, so a bad row.

    Raises:
        DataError: an item is not JSON, so that nobody knows where the next one begins.
    """
    text = _Text(blocks)
    text.pass_over()
    text.at += 1  # the bracket
    for number in itertools.count(1):
        text.pass_over()
        if text.content[text.at : text.at + 1] in ("", "]"):
            return
        end = _end_of_item(text, f"{name}, item {number}")
        yield text.content[text.at : end].translate(_LINE_ENDS).encode("utf-8", "surrogateescape") + b"\n"
        text.at = end


class _Text:
    """The characters of a file from some place on; the next one to look at is content[at]."""

    def __init__(self, blocks: Iterator[bytes]) -> None:
        self._blocks = blocks
        # Bytes that are not UTF-8 pass through: the row that they are in is bad, not the file.
        self._decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        self.content, self.at, self.more = "", 0, True

    def fill(self, characters: int) -> None:
        """Have so many characters from `at` on, or all that there are."""
        while self.more and len(self.content) - self.at < characters:
            block = next(self._blocks, b"")
            self.more = bool(block)
            self.content = self.content[self.at :] + self._decoder.decode(block, final=not self.more)
            self.at = 0

    def pass_over(self) -> None:
        """Pass over what lies between two items."""
        while True:
            self.fill(1)
            self.at = _BETWEEN.match(self.content, self.at).end()  # type: ignore[union-attr]
            if self.at < len(self.content) or not self.more:
                return


def _end_of_item(text: _Text, place: str) -> int:
    wanted = 1
    while True:
        text.fill(wanted)
        try:
            _, end = _DECODER.raw_decode(text.content, text.at)
            # What ends otherwise is a number or a word, which may continue.
            if text.content[end - 1] in '}]"' or text.content[end : end + 1] in set(",] \t\r\n") or not text.more:
                return end
        except (ValueError, RecursionError) as error:
            cut = isinstance(error, json.JSONDecodeError) and (
                error.msg.startswith("Unterminated string") or error.pos >= len(text.content) - 16
            )
            if not cut or len(text.content) - text.at > MAX_LINE:
                hint = "A .json file holds one array of objects, or an object on each line."
                raise DataError(f"{place} is not valid JSON: {error}", field="data.sources", hint=hint) from None
            if not text.more:
                return len(text.content)
        wanted = 2 * (len(text.content) - text.at) + 1
