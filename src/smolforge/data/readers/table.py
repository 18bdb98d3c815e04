"""Read csv, tsv and, for chat data, parquet with nested columns: copied once into the cache, rows as lines of JSON."""

from __future__ import annotations

import csv
import io
import itertools
import json
import sys
from collections.abc import Iterator
from typing import Any

from smolforge.data.readers.text import JsonLinesReader, not_utf8
from smolforge.errors import DataError

LINES = 1000  # written at a time


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
                    problem = (
                        f"{self.shard.name}, line {rows.line_num} has another number of columns than the first line"
                    )
                    raise DataError(
                        problem, field="data.sources", hint="Quote values that contain commas (in .tsv, tabs)."
                    )
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
            message = " ".join(str(error).split())[:300]
            problem = f"{self.shard.name} is damaged: {message}"
            raise DataError(problem, field="data.sources", hint="Fetch or write the file again.") from None
