"""jsonl: a JSON object per line, blank lines passed over, row groups of about a megabyte of whole lines."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from smolforge.data.document import Row
from smolforge.data.readers.plain import GROUP_BYTES, PlainBytes, not_utf8
from smolforge.data.shard import Rows
from smolforge.errors import DataError

MAX_LINE = 256 << 20


class JsonLines(PlainBytes):
    """Lines that are JSON objects with the text column."""

    def scan_file(self, path: Path) -> list[list[int]]:
        groups: list[list[int]] = []
        rows = size = offset = 0
        first = True
        with path.open("rb") as file:
            while line := file.readline(MAX_LINE + 1):
                if len(line) > MAX_LINE:
                    raise DataError(f"{self.label} has a line longer than {MAX_LINE >> 20} MiB at offset {offset:,}")
                try:
                    line.decode("utf-8")
                except UnicodeDecodeError as error:
                    raise not_utf8(self.label, error, offset) from None
                if line.strip():
                    if first:  # a wrong column or format shows before anything trains
                        self.text_of(line, f"{self.label}, first line")
                        first = False
                    rows += 1
                offset += len(line)
                size += len(line)
                if size >= GROUP_BYTES:
                    groups.append([rows, size])
                    rows = size = 0
        if size:
            groups.append([rows, size])
        return groups

    def rows(self, group: int, start: int, count: int) -> Rows:
        lines = [line for line in self.group_bytes(group).split(b"\n") if line.strip()]
        if len(lines) != self.groups[group][0]:
            raise DataError(f"{self.label} is not the file that was indexed: row group {group} differs")
        return _Lines(self, group, lines)

    def text_of(self, line: bytes, place: str) -> str:
        """The text of one line.

        Raises:
            DataError: the line is no JSON object, or has no text under the column's name.
        """
        column = self.context.column
        try:
            value: Any = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{place} is no JSON: {error}", field="data.sources") from None
        if not isinstance(value, dict):
            raise DataError(
                f"{place} is no JSON object but {type(value).__name__}",
                field="data.sources",
                hint=f'Each line must look like {{"{column}": "..."}}.',
            )
        text = value.get(column)
        if column not in value:
            raise DataError(
                f"{place} has no column {column!r}",
                field="data.text_column",
                hint=f"It has: {', '.join(map(repr, list(value)[:20])) or 'nothing'}.",
            )
        if text is None:
            return ""
        if not isinstance(text, str):
            raise DataError(f"{place}: column {column!r} is no text but {type(text).__name__}")
        # JSON may spell half of a surrogate pair, which no UTF-8 can hold.
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace") if _is_torn(text) else text


class _Lines:
    def __init__(self, format: JsonLines, group: int, lines: list[bytes]) -> None:
        self.format, self.group, self.lines = format, group, lines

    def take(self, rows: Sequence[int]) -> list[Row]:
        place = f"{self.format.label}, row group {self.group}, row"
        return [Row(self.format.text_of(self.lines[row], f"{place} {row}")) for row in rows]


def _is_torn(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return True
    return False
