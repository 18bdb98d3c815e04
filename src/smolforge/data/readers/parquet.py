"""parquet: the footer for the index, and of a row group only the text column's chunk, as one ranged read.

The footer says where the column's dictionary and data pages lie; that range is fetched in one go and handed to
pyarrow through a file that knows a few ranges and asks the shard for the rest. A chunk too large to hold is
streamed instead. Nothing a footer claims is believed before it is checked: offsets must lie inside the file, rows
and sizes below bounds, and what is unpacked is counted while it is unpacked.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from smolforge.data.document import Row
from smolforge.data.lru import LRUCache
from smolforge.data.readers.footer import BadFooter, column_chunks
from smolforge.data.shard import Context, Format, Rows, Shard
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
FOOTERS = LRUCache[Any](64 << 20)  # parsed footers, shared: a corpus of a thousand shards must not hold them all
GROUPS = LRUCache[Any](128 << 20)  # decoded row groups that several lanes take slices of
SHARED_GROUP = 32 << 20


class Parquet(Format):
    """A parquet file read by row group and column."""

    def __init__(self, shard: Shard, context: Context) -> None:
        super().__init__(shard, context)
        self._key = object()  # of this reader in the shared stores

    # -- index

    def scan(self) -> list[list[int]]:
        """[rows, bytes unpacked, first byte, bytes packed] of the text column in each row group."""
        tail = self._tail()
        meta = self._metadata(lambda: tail)
        self._check_type(meta)
        try:
            chunks = column_chunks(tail[:-8], self.context.column)
        except BadFooter as error:
            self._damaged(f"its footer makes no sense: {error}")
        if chunks is None or len(chunks) != meta.num_row_groups:
            self._damaged("its footer contradicts itself")
        for g, chunk in enumerate(chunks):
            if chunk.rows < 0 or chunk.unpacked < 0:
                self._damaged(f"row group {g} claims {chunk.rows} rows and {chunk.unpacked} bytes")
            end = chunk.start + chunk.length
            if chunk.rows and (chunk.start < 4 or chunk.length <= 0 or end > self.shard.size - 8):
                self._damaged(f"row group {g} claims bytes {chunk.start:,} to {end:,} of {self.shard.size:,}")
        if sum(chunk.rows for chunk in chunks) > MAX_ROWS:
            self._damaged(f"it claims {sum(chunk.rows for chunk in chunks):,} rows")
        return [list(chunk) for chunk in chunks]

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
        """The footer as pyarrow parses it. Its row groups are not to be looked at: see footer.py."""

        def parse() -> Any:
            import pyarrow.parquet as pq

            # The footer alone is a parquet file without its row groups' bytes, as far as this reader looks.
            content = b"PAR1" + tail()
            return self._trusting(lambda: pq.read_metadata(io.BytesIO(content)))

        return FOOTERS.get((self._key, "footer"), parse, lambda meta: 8 * meta.serialized_size)

    def _check_type(self, meta: Any) -> None:
        import pyarrow.types as types

        wanted = self.context.column
        schema = self._trusting(meta.schema.to_arrow_schema)
        if wanted not in schema.names:
            problem = f"{self.shard.name} has no column {wanted!r}"
        elif schema.names.count(wanted) > 1:
            problem = f"{self.shard.name} has {schema.names.count(wanted)} columns {wanted!r}"
        else:
            kind = schema.field(wanted).type
            kind = kind.value_type if types.is_dictionary(kind) else kind
            if types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind):
                return
            problem = f"column {wanted!r} of {self.shard.name} is no text but {kind}"
        names = ", ".join(map(repr, schema.names[:50]))
        raise DataError(problem, field="data.text_column", hint=f"It has: {names}.")

    # -- rows

    def rows(self, group: int, start: int, count: int) -> Rows:
        rows, size, *_ = self.groups[group]
        if count < rows and size <= SHARED_GROUP:
            whole = GROUPS.get((self._key, group), lambda: self._decode(group, 0, rows), lambda array: array.nbytes)
            self.context.read_ahead.drop((self._key, group))
            return _Column(self, group, whole, 0)
        return _Column(self, group, self._decode(group, start, count), start)

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
        file = RangedFile(self.shard)
        if length <= MAX_HELD_CHUNK:
            file.hold(at, self._fetched(group, at, length))
        return self._trusting(lambda: self._unpack(file, meta, group, start, count))

    def _unpack(self, file: RangedFile, meta: Any, group: int, start: int, count: int) -> pa.ChunkedArray:
        import pyarrow as pa
        import pyarrow.parquet as pq

        streamed = 0 if file.held else STREAM
        reader = pq.ParquetFile(pa.PythonFile(file, mode="r"), metadata=meta, buffer_size=streamed, pre_buffer=False)
        batches, seen, size = [], 0, 0
        for batch in reader.iter_batches(
            BATCH_ROWS, row_groups=[group], columns=[self.context.column], use_threads=False
        ):
            a, b = max(start - seen, 0), min(start + count - seen, len(batch))
            if a < b:
                array = batch.column(0).slice(a, b - a)
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

    # -- fetching

    def ahead(self, group: int) -> None:
        """Begin to fetch the row group's chunk, where the bound on read-ahead leaves room."""
        _, _, at, length = self.groups[group]
        if self.shard.remote and length <= MAX_HELD_CHUNK and not GROUPS.holds((self._key, group)):
            self.context.read_ahead.begin((self._key, group), length, lambda: self.shard.read(at, length))

    def _fetched(self, group: int, at: int, length: int) -> bytes:
        held = self.context.read_ahead.take((self._key, group))
        return held if held is not None and len(held) == length else self.shard.read(at, length)

    def close(self) -> None:
        FOOTERS.drop(self._key)
        GROUPS.drop(self._key)

    # -- errors

    def _damaged(self, problem: str) -> NoReturn:
        raise DataError(
            f"{self.shard.name} is damaged: {problem}",
            field="data.sources",
            hint="Fetch or write the file again.",
        )

    def _trusting(self, action: Callable[[], T]) -> T:
        """Run pyarrow on bytes from outside: whatever it raises about them is damage, not a bug of ours."""
        try:
            return action()
        except SmolforgeError:
            raise
        except MemoryError:
            self._damaged("it asks for more memory than there is")
        except Exception as error:
            self._damaged(" ".join(str(error).split())[:300])


class RangedFile(io.RawIOBase):
    """A read-only file over a shard that holds the range it was given and reads the rest when asked."""

    def __init__(self, shard: Shard) -> None:
        super().__init__()
        self.shard = shard
        self.held: bytes = b""
        self._start = self._at = 0

    def hold(self, start: int, data: bytes) -> None:
        """Answer reads inside this range from memory."""
        self._start, self.held = start, data

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
        begin = self._at - self._start
        if begin >= 0 and begin + size <= len(self.held):
            data = self.held[begin : begin + size]
        else:
            data = self.shard.read(self._at, size) if size else b""
        self._at += size
        return data


class _Column:
    """Rows of a row group as an Arrow column whose first is row `first`."""

    def __init__(self, format: Parquet, group: int, column: pa.ChunkedArray, first: int) -> None:
        self.format, self.group, self.column, self.first = format, group, column, first

    def take(self, rows: Sequence[int]) -> list[Row]:
        return [Row(self._text(row)) for row in rows]

    def _text(self, row: int) -> str:
        try:
            return self.column[row - self.first].as_py() or ""
        except UnicodeDecodeError as error:
            raise DataError(
                f"{self.format.shard.name}, row group {self.group}, row {row} is not UTF-8: {error.reason} at "
                f"byte {error.start:,}",
                field="data.sources",
            ) from None
