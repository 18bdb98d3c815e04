"""gz and zst files, unpacked once into the cache as a stream, within the cache's bound."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path

from smolforge.data.cache import Cache
from smolforge.data.shard import Shard
from smolforge.errors import DataError

BLOCK = 1 << 20
WINDOW = 128 << 20  # largest zstd window we allocate for


def unpacked(shard: Shard, ending: str, cache: Cache) -> Path:
    """Local path of the shard's plain bytes.

    Raises:
        DataError: the file is damaged or cut short, or unpacks to more than the cache may hold.
    """
    key = f"plain {shard.name} {shard.size} {sorted(shard.identity().items())}"

    def blocks() -> Iterator[bytes]:
        path = shard.whole()
        try:
            with path.open("rb") as file:
                yield from _gunzip(file) if ending == ".gz" else _unzstd(file)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise DataError(
                f"{shard.name} is damaged: {error}",
                field="data.sources",
                hint="Fetch or write the file again.",
            ) from None

    return cache.file(key, blocks(), what=f"{shard.name} (unpacked)")


def _gunzip(file: BufferedReader) -> Iterator[bytes]:
    with gzip.GzipFile(fileobj=file) as plain:
        while block := plain.read(BLOCK):
            yield block


def _unzstd(file: BufferedReader) -> Iterator[bytes]:
    import zstandard

    unpacker = zstandard.ZstdDecompressor(max_window_size=WINDOW)
    try:
        while file.peek(1):  # frames one after another, each to its very end
            frame = unpacker.decompressobj()
            while not frame.eof:
                packed = file.read(BLOCK)
                if not packed:
                    raise EOFError("the file ends inside a zstd frame")
                # A megabyte of input may hold gigabytes; feed it in small spoons.
                for at in range(0, len(packed), 4096):
                    if block := frame.decompress(packed[at : at + 4096]):
                        yield block
                    if frame.eof:
                        rest = len(packed) - at - len(packed[at : at + 4096]) + len(frame.unused_data)
                        file.seek(-rest, 1)
                        break
    except zstandard.ZstdError as error:
        raise EOFError(str(error)) from None
