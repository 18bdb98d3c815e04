"""Read parquet: the footer for the index, and of a row group only the text column's chunk, as one ranged read.

The footer tells where the column's chunk is; that range is fetched at once and handed to pyarrow through a file that
holds it and asks the shard for the rest. A chunk too large to hold is streamed instead. What a footer claims is checked
first, and what is unpacked is counted while it is unpacked.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from smolforge.data.cache import LRUCache
from smolforge.data.readers import SKIP_HINT, BadRow, Reader, Row, Rows
from smolforge.data.readers.conversation import has_conversation
from smolforge.data.sources import Context, Shard, damaged
from smolforge.errors import DataError, SmolforgeError

if TYPE_CHECKING:
    import pyarrow as pa

T = TypeVar("T")

TAIL = 64 << 10  # first guess at the footer
MAX_FOOTER = 256 << 20
MAX_ROWS = 2**32
MAX_HELD_CHUNK = 64 << 20  # larger column chunks are streamed
STREAM = 4 << 20
MAX_UNPACKED = 512 << 20  # text of one slice, after decompression
BATCH_ROWS = 64
FOOTERS = LRUCache(64 << 20)  # parsed footers, shared: a corpus of a thousand shards must not hold them all
GROUPS = LRUCache(128 << 20)  # decoded row groups that several lanes take slices of
SHARED_GROUP = 32 << 20


class ParquetReader(Reader):
    """A parquet file read by row group and column."""

    def __init__(self, shard: Shard, context: Context) -> None:
        super().__init__(shard, context)
        self._key = object()  # of this reader in the shared stores

    def scan(self) -> list[list[int]]:
        """[rows, bytes unpacked, first byte, bytes packed] of the text column in each row group."""
        tail = self._tail()
        meta = self._metadata(lambda: tail)
        leaf = self._find_column(meta)
        try:
            chunks = column_chunks(tail[:-8], leaf, len(meta.schema))
        except BadFooter as error:
            self._damaged(f"its footer makes no sense: {error}")
        if len(chunks) != meta.num_row_groups:
            self._damaged("its footer contradicts itself")
        for g, (rows, unpacked, start, length) in enumerate(chunks):
            if rows < 0 or unpacked < 0:
                self._damaged(f"row group {g} claims {rows} rows and {unpacked} bytes")
            end = start + length
            if rows and (start < 4 or length <= 0 or end > self.shard.size - 8):
                self._damaged(f"row group {g} claims bytes {start:,} to {end:,} of {self.shard.size:,}")
        if (total := sum(rows for rows, *_ in chunks)) > MAX_ROWS:
            self._damaged(f"it claims {total:,} rows")
        return chunks

    def _tail(self) -> bytes:
        """The footer, its length and the magic bytes."""
        size = self.shard.size
        if size < 12:
            self._damaged("it is too short for a parquet file")
        tail = self.shard.read(max(size - TAIL, 0), min(TAIL, size))
        if tail[-4:] != b"PAR1":
            self._damaged(f"it does not end in PAR1 but in {tail[-4:]!r}; perhaps it was cut short")
        length = int.from_bytes(tail[-8:-4], "little")
        if not 0 < length <= min(size - 12, MAX_FOOTER):
            self._damaged(f"its footer claims {length:,} bytes of a file of {size:,}")
        if length + 8 > len(tail):
            tail = self.shard.read(size - length - 8, length + 8 - len(tail)) + tail
        return tail[-(length + 8) :]

    def _metadata(self, tail: Callable[[], bytes]) -> Any:
        """The footer as pyarrow parses it. Its row groups must not be accessed: see the end of this file."""

        def parse() -> Any:
            import pyarrow.parquet as pq

            # The footer alone is a parquet file without its row groups' bytes, as far as this reader looks.
            content = b"PAR1" + tail()
            return self._trusting(lambda: pq.read_metadata(io.BytesIO(content)))

        return FOOTERS.get((self._key, "footer"), parse, lambda meta: 8 * meta.serialized_size)

    def _find_column(self, meta: Any) -> int:
        """Number of the text column among the leaves of the schema, which columns with children have several of."""
        import pyarrow.types as types

        wanted, name = self.context.column, self.shard.name
        schema = self._trusting(meta.schema.to_arrow_schema)
        place = schema.get_field_index(wanted)  # -1 unless exactly one column has this name
        if place < 0:
            count = schema.names.count(wanted)
            problem = f"{name} has {count} columns {wanted!r}" if count else f"{name} has no column {wanted!r}"
            if has_conversation(dict.fromkeys(schema.names, "")):
                problem += ": it is chat data, which `smolforge finetune` learns from"
        else:
            kind = schema.field(place).type
            kind = kind.value_type if types.is_dictionary(kind) else kind
            if types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind):
                leaf = sum(_leaves(field.type) for field in list(schema)[:place])
                if leaf >= len(meta.schema) or meta.schema.column(leaf).path != wanted:
                    self._damaged("its schemas contradict each other")
                return leaf
            problem = f"column {wanted!r} of {name} is not text but {kind}"
        names = ", ".join(map(repr, schema.names[:50]))
        raise DataError(problem, field="data.text_column", hint=f"It has: {names}.")

    def rows(self, group: int, start: int, count: int) -> Rows:
        rows, size, *_ = self.groups[group]
        if count < rows and size <= SHARED_GROUP:
            start = 0
            column = GROUPS.get((self._key, group), lambda: self._decode(group, 0, rows), lambda array: array.nbytes)
            self.context.read_ahead.drop((self._key, group))
        else:
            column = self._decode(group, start, count)

        def row(number: int) -> Row:
            try:
                return Row(column[number - start].as_py() or "")
            except UnicodeDecodeError as error:
                place = f"{self.shard.name}, row group {group}, row {number}"
                problem = f"{place} is not UTF-8: {error.reason} at byte {error.start:,}"
                raise BadRow(problem, field="data.sources", hint=SKIP_HINT) from None

        return row

    def _decode(self, group: int, start: int, count: int) -> pa.ChunkedArray:
        try:
            return self._decode_once(group, start, count)
        except DataError:
            if not self.shard.remote:
                raise
            # The bytes may have been hurt on their way or in the cache: once more, from the source itself.
            self.shard.forget()
            return self._decode_once(group, start, count)

    def _decode_once(self, group: int, start: int, count: int) -> pa.ChunkedArray:
        meta = self._metadata(self._tail)
        if group >= meta.num_row_groups:
            self._damaged(f"it has no row group {group}, which was indexed")
        _, _, at, length = self.groups[group]
        held = b""
        if length <= MAX_HELD_CHUNK:
            held = self.context.read_ahead.take((self._key, group)) or b""
            held = held if len(held) == length else self.shard.read(at, length)
        file = RangedFile(self.shard, at, held)
        return self._trusting(lambda: self._unpack(file, meta, group, start, count))

    def _unpack(self, file: RangedFile, meta: Any, group: int, start: int, count: int) -> pa.ChunkedArray:
        import pyarrow as pa
        import pyarrow.parquet as pq

        streamed = 0 if file.held else STREAM
        reader = pq.ParquetFile(pa.PythonFile(file, mode="r"), metadata=meta, buffer_size=streamed, pre_buffer=False)
        batches, seen, size, name = [], 0, 0, self.context.column
        for batch in reader.iter_batches(BATCH_ROWS, row_groups=[group], columns=[name], use_threads=False):
            a, b = max(start - seen, 0), min(start + count - seen, len(batch))
            if a < b:
                array = batch.column(name).slice(a, b - a)
                size += array.nbytes
                if size > MAX_UNPACKED:
                    rows = f"rows {start:,} to {start + count:,} of row group {group}"
                    self._damaged(f"{rows} unpack to over {MAX_UNPACKED >> 20} MiB")
                batches.append(array)
            seen += len(batch)
            if seen >= start + count:
                break
        if seen < start + count:
            self._damaged(f"row group {group} ends after {seen:,} of {self.groups[group][0]:,} rows")
        return pa.chunked_array([pa.concat_arrays(batches)] if size < STREAM else batches)

    def read_ahead(self, group: int) -> None:
        _, _, at, length = self.groups[group]
        if self.shard.remote and length <= MAX_HELD_CHUNK and (self._key, group) not in GROUPS:
            self.context.read_ahead.start((self._key, group), length, lambda: self.shard.read(at, length))

    def close(self) -> None:
        FOOTERS.drop(self._key)
        GROUPS.drop(self._key)

    def _damaged(self, problem: str) -> NoReturn:
        raise damaged(self.shard.name, problem)

    def _trusting(self, action: Callable[[], T]) -> T:
        """Run pyarrow on bytes from outside: whatever it raises about them is damage, not a bug of ours."""
        try:
            return action()
        except SmolforgeError:
            raise
        except MemoryError:
            self._damaged("it asks for more memory than there is")
        except Exception as error:
            self._damaged(str(error))


class RangedFile(io.RawIOBase):
    """A read-only file over a shard: the bytes `held` from `start` on are in memory, the rest is read when asked."""

    def __init__(self, shard: Shard, start: int, held: bytes) -> None:
        super().__init__()
        self.shard, self.held, self._start, self._at = shard, held, start, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self.shard.size}[whence]
        self._at = max(base + offset, 0)
        return self._at

    def read(self, size: int = -1) -> bytes:
        left = max(self.shard.size - self._at, 0)
        size = left if size is None or size < 0 else min(size, left)
        begin, self._at = self._at - self._start, self._at + size
        if begin >= 0 and begin + size <= len(self.held):
            return self.held[begin : begin + size]
        return self.shard.read(self._at - size, size) if size else b""


def _leaves(kind: Any) -> int:
    """Number of columns that a field of this Arrow type takes in parquet."""
    return sum(_leaves(kind.field(i).type) for i in range(kind.num_fields)) if kind.num_fields else 1


# pyarrow's accessors to a row group's columns abort the process when a footer is inconsistent: the chunks of the text
# column are found here. A footer is a Thrift structure in the compact protocol (thrift-compact-protocol.md), its fields
# numbered in parquet-format's parquet.thrift. Every size is bounded by the bytes that are there.

MAX_DEPTH = 16
TRUE, FALSE, BYTE, I16, I32, I64, DOUBLE, BINARY, LIST, SET, MAP, STRUCT = range(1, 13)
# Of a column chunk: its metadata, with bytes unpacked and packed, first data page and dictionary page.
CHUNK_FIELDS = {3: {6: {}, 7: {}, 9: {}, 11: {}}}


class BadFooter(ValueError):
    """The bytes are not a footer, or one that contradicts itself."""


class CompactDecoder:
    """Decodes Thrift compact bytes into dicts by field number; what is not wanted is passed over."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def value(self, kind: int, want: Any = None, depth: int = 0) -> Any:
        """A value of this type, or None.

        What is wanted of a struct are fields, as {number: want}; of a list the same of each element, or (i, want) for
        element i alone, which gives (number of elements, element i).
        """
        if depth > MAX_DEPTH:
            raise BadFooter("it is nested too deeply")
        if kind in (I16, I32, I64):
            number = self._varint()
            return (number >> 1) ^ -(number & 1)
        if kind == BINARY:
            return self._bytes(self._varint())
        if kind == STRUCT:
            return self._struct(want or {}, depth + 1)
        if kind in (LIST, SET):
            return self._list(want, depth + 1)
        if kind in (TRUE, FALSE, BYTE):
            self._byte()
        elif kind == DOUBLE:
            self._bytes(8)
        else:  # parquet.thrift has no maps
            raise BadFooter(f"a value of unknown type {kind}")
        return None

    def _struct(self, want: dict[int, Any], depth: int) -> dict[int, Any]:
        found, number = {}, 0
        while kind := (header := self._byte()) & 15:
            number = number + (header >> 4) if header >> 4 else self.value(I32)
            # A boolean field has its value in its type.
            value = None if kind in (TRUE, FALSE) else self.value(kind, want.get(number), depth)
            if number in want:
                found[number] = value
        return found

    def _list(self, want: Any, depth: int) -> Any:
        header = self._byte()
        size, kind = self._count(header >> 4 if header >> 4 < 15 else self._varint()), header & 15
        only, each = want if isinstance(want, tuple) else (None, want)
        kept = []
        for i in range(size):
            wanted = each if only is None or i == only else None
            value = self.value(kind, wanted, depth)
            if wanted is not None:
                kept.append(value)
        return kept if only is None else (size, *kept)

    def _byte(self) -> int:
        if self.at >= len(self.data):
            raise BadFooter("it ends in the middle")
        self.at += 1
        return self.data[self.at - 1]

    def _varint(self) -> int:
        number = shift = 0
        while shift < 64:
            byte = self._byte()
            number |= (byte & 127) << shift
            if byte < 128:
                return number & (2**64 - 1)
            shift += 7
        raise BadFooter("a number of more than 64 bits")

    def _count(self, size: int) -> int:
        if size > len(self.data) - self.at:  # each element takes a byte at least
            raise BadFooter(f"{size:,} elements where {len(self.data) - self.at:,} bytes are left")
        return size

    def _bytes(self, length: int) -> bytes:
        self.at += self._count(length)
        return self.data[self.at - length : self.at]


def column_chunks(footer: bytes, leaf: int, leaves: int) -> list[list[int]]:
    """[rows, bytes unpacked, first byte, bytes packed] of column `leaf` of `leaves` in each row group.

    Args:
        footer: the serialized FileMetaData alone.

    Raises:
        BadFooter: it is damaged.
    """
    chunks = []
    try:
        for group in CompactDecoder(footer).value(STRUCT, {4: {1: (leaf, CHUNK_FIELDS), 3: {}}})[4]:
            count, *found = group[1]
            if count != leaves:
                raise BadFooter(f"a row group has {count} columns, the schema {leaves}")
            meta = found[0][3]
            data, dictionary = meta[9], meta.get(11, 0)
            start = dictionary if 0 < dictionary < data else data
            chunks.append([group[3], meta[6], start, meta[7]])
            if not all(isinstance(number, int) for number in chunks[-1]):
                raise TypeError(str(chunks[-1]))
    except (TypeError, LookupError, ValueError, AttributeError) as error:
        raise BadFooter(str(error) if isinstance(error, BadFooter) else f"a field is wrong: {error!r}") from None
    return chunks
