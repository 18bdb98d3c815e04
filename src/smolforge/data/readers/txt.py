"""txt: a file is a document, or several, split at the separator; row groups of about a megabyte.

A document longer than 64 KiB is dealt in pieces, cut where a line ends, each a row of its own: otherwise a book
in one file would be one document, which no two lanes can share, no shuffle can mix, and of which nothing can be
held out. Only the last piece of a document is followed by EOS. The rule looks at nothing before the piece, so a
row group may begin with any of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from smolforge.data.document import Row
from smolforge.data.readers.plain import GROUP_BYTES, PlainBytes, not_utf8
from smolforge.data.shard import Rows
from smolforge.errors import DataError

PIECE = 64 << 10
MAX_BREAKS = 64  # line ends after a separator that are taken for part of it
BLOCK = 1 << 20


class PlainText(PlainBytes):
    """Text split at the separator of the configuration."""

    @property
    def separator(self) -> bytes:
        """UTF-8 of `data.separator`; empty where documents are whole files."""
        return (self.context.separator or "").encode()

    def scan_file(self, path: Path) -> list[list[int]]:
        groups: list[list[int]] = []
        rows = size = offset = 0
        for raw in pieces_of_file(path, self.separator):
            try:
                raw.decode("utf-8")
            except UnicodeDecodeError as error:
                raise not_utf8(self.label, error, offset) from None
            rows, size, offset = rows + 1, size + len(raw), offset + len(raw)
            if size >= GROUP_BYTES:
                groups.append([rows, size])
                rows = size = 0
        if size:
            groups.append([rows, size])
        return groups

    def rows(self, group: int, start: int, count: int) -> Rows:
        data = self.group_bytes(group)
        last = group == len(self.groups) - 1
        raws = list(pieces(data, self.separator))
        if len(raws) != self.groups[group][0]:
            raise DataError(f"{self.label} is not the file that was indexed: row group {group} differs")
        return _Pieces(self, group, raws, last)


class _Pieces:
    def __init__(self, format: PlainText, group: int, raws: list[bytes], last: bool) -> None:
        self.format, self.group, self.raws, self.last = format, group, raws, last

    def take(self, rows: Sequence[int]) -> list[Row]:
        return [self._row(row) for row in rows]

    def _row(self, row: int) -> Row:
        raw, separator = self.raws[row], self.format.separator
        bare = raw.rstrip(b"\r\n")
        ends = bool(separator) and bare.endswith(separator)
        try:
            text = (bare[: -len(separator)].rstrip(b"\r\n") if ends else raw).decode("utf-8")
        except UnicodeDecodeError as error:
            raise not_utf8(f"{self.format.label}, row group {self.group}, row {row}", error, 0) from None
        return Row(text, ends or (self.last and row == len(self.raws) - 1))


def pieces_of_file(path: Path, separator: bytes) -> Iterator[bytes]:
    """The raw rows of a file, separators included: joined they are the file."""
    need = PIECE + len(separator) + MAX_BREAKS + 1  # as far as the rule looks
    rest = b""
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            rest += block
            at = 0
            while len(rest) - at >= need:
                size = first_piece(rest, at, separator)
                yield rest[at : at + size]
                at += size
            rest = rest[at:]
    yield from pieces(rest, separator)


def pieces(data: bytes, separator: bytes) -> Iterator[bytes]:
    """The raw rows of bytes that end where a row ends."""
    at = 0
    while at < len(data):
        size = first_piece(data, at, separator)
        yield data[at : at + size]
        at += size


def first_piece(data: bytes, at: int, separator: bytes) -> int:
    """Length of the row that begins at `at`, looking no further than the longest row can reach."""
    if separator:
        found = data.find(separator, at, at + PIECE + len(separator))
        if found >= 0:
            end = found + len(separator)
            stop = min(end + MAX_BREAKS, len(data))
            while end < stop and data[end] in b"\r\n":
                end += 1
            return end - at
    if len(data) - at <= PIECE:
        return len(data) - at
    for mark in (b"\n", b" "):
        found = data.rfind(mark, at + PIECE // 2, at + PIECE)
        if found >= 0:
            return found + 1 - at
    end = at + PIECE
    while end > at + PIECE - 4 and data[end] & 0xC0 == 0x80:  # never inside a character
        end -= 1
    return end - at
