"""Read jsonl, txt and other plain text, in row groups of about a megabyte of consecutive bytes.

jsonl has a JSON object per line; blank lines are passed over. A txt file is a document, or several, split at the
separator. A document longer than 64 KiB becomes several rows, cut where a line ends: a book in one file can so be
shared by lanes, shuffled, and held out in part. Only the last of its rows is followed by EOS. The rule looks at nothing
before a row, so a row group may start with any of them.

A compressed shard is decompressed once into the cache, within the cache's bound. Files are opened for each row group: a
corpus may have more files than a process may have open.
"""

from __future__ import annotations

import codecs
import functools
import itertools
import json
from abc import abstractmethod
from collections.abc import Callable, Iterator
from itertools import accumulate, islice
from pathlib import Path
from typing import Any

from smolforge.data.cache import decompress
from smolforge.data.readers import SKIP_HINT, BadRow, Reader, Row, Rows
from smolforge.data.readers.conversation import conversation_text, has_conversation
from smolforge.data.sources import COMPRESSIONS, Context, Shard, damaged
from smolforge.data.sources.local import read_file
from smolforge.errors import DataError, SourceChanged
from smolforge.formatting import replace_lone_surrogates

GROUP_BYTES = 1 << 20
BLOCK = 1 << 20
MAX_LINE = 256 << 20
PIECE = 64 << 10  # longest row of a txt file
MAX_BREAKS = 64  # line ends after a separator that belong to it


class TextReader(Reader):
    """Row groups are consecutive runs of bytes, [rows, bytes]; the formats differ in what a row is."""

    @abstractmethod
    def raw_rows(self, path: Path) -> Iterator[tuple[bytes, int]]:
        """The file's bytes in pieces, with the number of rows (0 or 1) that each is; joined they are the file."""

    @abstractmethod
    def split(self, data: bytes) -> list[bytes]:
        """The rows in the bytes of a row group."""

    @abstractmethod
    def text(self, raw: bytes) -> str:
        """The text of a row; UnicodeDecodeError or BadRow, which does not say where the row is."""

    @abstractmethod
    def row(self, group: int, number: int, raw: bytes, *, last: bool) -> Row:
        """A row from its bytes; `last` is true for the last row of the file."""

    def place(self, number: int) -> str:
        """What errors call the `number`-th of the raw rows, from 1."""
        return self.shard.name

    def checked(self, raw: bytes, place: Callable[[], str], offset: int = 0) -> str:
        """The text of a row; BadRow names the `place`, or the byte after `offset`, that is wrong."""
        try:
            return self.text(raw)
        except UnicodeDecodeError as error:
            raise not_utf8(place(), error, offset) from None
        except BadRow as error:
            hint = f"{error.hint or ''} {SKIP_HINT}".strip()
            raise BadRow(f"{place()} {error.message}", field=error.field, hint=hint) from None

    def scan(self) -> list[list[int]]:
        groups: list[list[int]] = []
        rows = size = offset = total = documents = text = 0
        ends = True
        try:
            for number, (raw, count) in enumerate(self.raw_rows(self._plain()), 1):
                if count:
                    text += self._look(raw, number, offset)
                    ends = self.ends_document(raw)
                    documents += ends
                rows, size, offset, total = rows + count, size + len(raw), offset + len(raw), total + count
                if size >= GROUP_BYTES:
                    groups.append([rows, size])
                    rows = size = 0
        except OSError as error:
            raise DataError(f"cannot read {self.shard.name}: {error.strerror}") from None
        self.counted = {"documents": documents + (not ends), "text_bytes": text}
        if self.first_bad and self.bad_rows == total:
            hint = (self.first_bad.hint or "").removesuffix(SKIP_HINT).strip() or None
            raise DataError(self.first_bad.message, field=self.first_bad.field, hint=hint)
        return [*groups, [rows, size]] if size else groups

    def _look(self, raw: bytes, number: int, offset: int) -> int:
        """The bytes of a row's text, while the index is made; a row that cannot be used is an error, or counted."""
        try:
            return len(self.checked(raw, lambda: self.place(number), offset).encode("utf-8", "replace"))
        except BadRow as error:
            if self.context.on_error == "fail":
                raise
            self.bad_rows += 1
            self.first_bad = self.first_bad or error
            return 0

    def ends_document(self, raw: bytes) -> bool:
        """Whether the document of a row ends with it, wherever the row is."""
        return True

    def use(self, groups: list[list[int]]) -> None:
        super().use(groups)
        self._starts = list(accumulate((size for _, size in groups), initial=0))

    def rows(self, group: int, start: int, count: int) -> Rows:
        raws = self.split(self._read(self._starts[group], self.groups[group][1]))
        if len(raws) != self.groups[group][0]:
            raise DataError(f"{self.shard.name} is not the file that was indexed: row group {group} differs")
        last = len(raws) - 1 if group == len(self.groups) - 1 else -1
        return lambda number: self.row(group, number, raws[number], last=number == last)

    def _read(self, start: int, size: int) -> bytes:
        try:
            data = read_file(self._plain(), start, size)
        except DataError:  # another process may have trimmed the cache; decompress or fetch it again
            data = read_file(self._plain(), start, size)
        if len(data) != size:
            raise SourceChanged(f"{self.shard.name} ends at byte {start + len(data):,}, inside an indexed row group")
        return data

    @functools.cached_property
    def _compression(self) -> str | None:
        return COMPRESSIONS.get(Path(self.shard.name.lower()).suffix)

    def blocks(self) -> Iterator[bytes]:
        """The bytes of the file without compression, and in UTF-8 where its mark says UTF-16 or UTF-32."""
        path = self.shard.whole()
        try:
            blocks = decompress(path, self._compression) if self._compression else _blocks_of(path)
            yield from _in_utf8(blocks, self.shard.name)
        except EOFError as error:
            raise damaged(self.shard.name, error) from None

    def is_copied(self) -> bool:
        """Whether the file is read from a copy in the cache: decompressed, converted, or in UTF-8."""
        return self._compression is not None or self._marked

    @functools.cached_property
    def _marked(self) -> bool:
        return encoding_of(read_file(self.shard.whole(), 0, 4)) is not None

    def convert(self, blocks: Iterator[bytes]) -> Iterator[bytes]:
        """What the copy holds."""
        return blocks

    def _plain(self) -> Path:
        """The local file, or the copy of it that is read."""
        shard = self.shard
        if not self.is_copied():
            return shard.whole()
        key = f"plain {shard.name} {shard.size} {sorted(shard.identity().items())}"
        return self.context.cache.file(key, self.convert(self.blocks()), what=f"{shard.name} (as plain text)")


class JsonLinesReader(TextReader):
    """Lines that are JSON objects with the text column."""

    def raw_rows(self, path: Path) -> Iterator[tuple[bytes, int]]:
        with path.open("rb") as file:
            while line := file.readline(MAX_LINE + 1):
                if len(line) > MAX_LINE:
                    where = f"at offset {file.tell() - len(line):,}"
                    raise DataError(f"{self.shard.name} has a line longer than {MAX_LINE >> 20} MiB {where}")
                yield line, int(bool(line.strip()))

    def split(self, data: bytes) -> list[bytes]:
        return [line for line in data.split(b"\n") if line.strip()]

    def row(self, group: int, number: int, raw: bytes, *, last: bool) -> Row:
        return Row(self.checked(raw, lambda: self.place(self._line(group, number))))

    def place(self, number: int) -> str:
        return f"{self.shard.name}, {'first line' if number == 1 else f'line {number}'}"

    def _line(self, group: int, number: int) -> int:
        """The number of the line, from 1, that a row is; counted only for an error."""
        before = self._read(0, self._starts[group]).count(b"\n")
        lines = self._read(self._starts[group], self.groups[group][1]).split(b"\n")
        filled = (i for i, line in enumerate(lines, 1) if line.strip())
        return before + next(islice(filled, number, None))

    def text(self, raw: bytes) -> str:
        column = self.context.column
        raw.decode("utf-8")
        try:
            value: Any = json.loads(raw)
        except (ValueError, RecursionError) as error:
            raise BadRow(f"is not valid JSON: {error}", field="data.sources") from None
        if not isinstance(value, dict):
            kind, hint = type(value).__name__, f'It must look like {{"{column}": "..."}}.'
            raise BadRow(f"is not a JSON object but {kind}", field="data.sources", hint=hint)
        if self.context.format != "text":
            return conversation_text(value, pair=self.context.format == "preferences")
        if column not in value:
            hint = f"It has: {', '.join(map(repr, list(value)[:20])) or 'nothing'}."
            if has_conversation(value):
                hint += " This is chat data, which `smolforge finetune` learns from."
            raise BadRow(f"has no column {column!r}", field="data.text_column", hint=hint)
        text = value[column] if value[column] is not None else ""
        if not isinstance(text, str):
            raise BadRow(f"has in column {column!r} not text but {type(text).__name__}", field="data.text_column")
        return replace_lone_surrogates(text)


class PlainTextReader(TextReader):
    """Text split at the separator of the configuration."""

    def __init__(self, shard: Shard, context: Context) -> None:
        super().__init__(shard, context)
        self.separator = (context.separator or "").encode()

    def raw_rows(self, path: Path) -> Iterator[tuple[bytes, int]]:
        return ((raw, 1) for raw in pieces_of_file(path, self.separator))

    def split(self, data: bytes) -> list[bytes]:
        return list(pieces(data, self.separator))

    def row(self, group: int, number: int, raw: bytes, *, last: bool) -> Row:
        text = self.checked(raw, lambda: f"{self.shard.name}, row group {group}, row {number}")
        return Row(text if group or number else text.removeprefix("\ufeff"), last or self.ends_document(raw))

    def ends_document(self, raw: bytes) -> bool:
        return bool(self.separator and self.separator in raw)

    def text(self, raw: bytes) -> str:
        # A row holds at most one separator, with nothing but line ends after it.
        found = raw.find(self.separator) if self.separator else -1
        return (raw if found < 0 else raw[:found].rstrip(b"\r\n")).decode("utf-8")


def encoding_of(start: bytes) -> str | None:
    """The encoding that the mark at the start of a file says, where it is not UTF-8."""
    return next((encoding for mark, encoding in _MARKS.items() if start.startswith(mark)), None)


# The mark of UTF-32 in little-endian order begins as that of UTF-16, so it is looked for first.
_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16",
}  # fmt: skip


def _blocks_of(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            yield block


def _in_utf8(blocks: Iterator[bytes], name: str) -> Iterator[bytes]:
    first = next(blocks, b"")
    encoding = encoding_of(first)
    if encoding is None:
        yield first
        yield from blocks
        return
    decoder = codecs.getincrementaldecoder(encoding)()
    try:
        for block in itertools.chain([first], blocks):
            yield decoder.decode(block).encode("utf-8", "surrogatepass")
        yield decoder.decode(b"", final=True).encode("utf-8", "surrogatepass")
    except UnicodeError as error:
        problem = f"{name} begins as {encoding.upper()} and is not: {error}"
        raise DataError(problem, field="data.sources", hint="Write it again, as UTF-8.") from None


def not_utf8(label: str, error: UnicodeDecodeError, offset: int) -> BadRow:
    """The error for bytes that are not UTF-8; `offset` is the place of the decoded bytes in the file."""
    problem = f"{label} is not UTF-8: byte 0x{error.object[error.start]:02x} at offset {offset + error.start:,}"
    hint = f"Convert it, for example with `iconv -f latin1 -t utf-8`. {SKIP_HINT}"
    return BadRow(problem, field="data.sources", hint=hint)


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
    """Length of the row that starts at `at`, looking no further than the longest row can reach."""
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
        if (found := data.rfind(mark, at + PIECE // 2, at + PIECE)) >= 0:
            return found + 1 - at
    end = at + PIECE
    while end > at + PIECE - 4 and data[end] & 0xC0 == 0x80:  # never inside a character
        end -= 1
    return end - at
