"""Keep bytes: on disk what was fetched or decompressed, in memory what is fetched ahead or costly to make again."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import hashlib
import lzma
import os
import tempfile
import threading
import zlib
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from smolforge.errors import DataError, RunFailed, SmolforgeError
from smolforge.files import user_cache

SCRATCH_LIMIT = 16 << 30  # bytes of whole files while the cache is off
TRIM_EVERY = 64 << 20  # bytes written between two looks at the whole folder
READ_AHEAD_THREADS = 4
BLOCK = 1 << 20


def cache_directory(given: Path | None) -> Path:
    """`$SMOLFORGE_CACHE`, else the `given` folder, else smolforge's folder in the user's cache."""
    return Path(os.environ.get("SMOLFORGE_CACHE") or given or user_cache())


class Cache:
    """A bounded folder of bytes, safe for several threads and processes.

    Files are named by a hash of their key, so nothing outside decides a path, and the least recently used are removed
    first. A range starts with a hash of itself, so what a crash left torn is fetched again. With `limit` (bytes) 0
    ranges are not kept, and whole files go to a temporary folder of this process.
    """

    def __init__(self, directory: Path | None, limit: int) -> None:
        self.directory = cache_directory(directory) / "data"
        self.limit = limit
        self._scratch: tempfile.TemporaryDirectory[str] | None = None
        self._in_use: set[Path] = set()  # whole files that this process reads
        self._lock = threading.Lock()
        self._since_trim = 0

    def range(self, key: str) -> bytes | None:
        """The bytes kept under `key`, or None."""
        if not self.limit:
            return None
        path = self._path(key, "range")
        try:
            data = path.read_bytes()
        except OSError:
            return None
        _mark_used(path)
        if hashlib.blake2b(data[16:], digest_size=16).digest() != data[:16]:
            self.drop_range(key)
            return None
        return data[16:]

    def keep_range(self, key: str, data: bytes) -> None:
        """Keep bytes under `key`; a full disk is ignored."""
        if self.limit and len(data) + 16 <= self.limit:
            with contextlib.suppress(OSError):
                self._write(self._path(key, "range"), [hashlib.blake2b(data, digest_size=16).digest(), data], None, "")
            self.trim(len(data))

    def drop_range(self, key: str) -> None:
        """Forget the bytes under `key`."""
        with contextlib.suppress(OSError):
            self._path(key, "range").unlink(missing_ok=True)

    def file(self, key: str, blocks: Iterable[bytes], *, what: str) -> Path:
        """A file with the content of `blocks`, which are iterated only when it is not there yet.

        Raises:
            DataError: it would be larger than the cache may be.
            RunFailed: there is no room on the disk.
        """
        path = self._path(key, "file")
        with self._lock:
            self._in_use.add(path)
        if os.access(path, os.R_OK):
            _mark_used(path)
            return path
        try:
            self.trim(self._write(path, blocks, self.limit or SCRATCH_LIMIT, what))
        except OSError as error:
            hint = "Make room, or set SMOLFORGE_CACHE to a folder with room."
            raise RunFailed(f"cannot write {what} to {path.parent}: {error.strerror}", hint=hint) from None
        return path

    def holds(self, key: str) -> bool:
        """Whether `file` would answer without iterating blocks."""
        return self._path(key, "file").exists()

    def close(self) -> None:
        """Remove what was only for this process."""
        if self._scratch is not None:
            self._scratch.cleanup()
            self._scratch = None

    def trim(self, written: int = TRIM_EVERY) -> None:
        """Remove the least recently used files until the folder is within its bound; only after so much was written."""
        if not self.limit:
            return
        with self._lock:
            self._since_trim += written
            if self._since_trim < min(TRIM_EVERY, self.limit // 8 + 1):
                return
            self._since_trim = 0
            in_use = set(self._in_use)
        known = []
        with contextlib.suppress(OSError):
            for path in self.directory.iterdir():
                with contextlib.suppress(OSError):
                    stat = path.stat()
                    known.append((stat.st_mtime_ns, stat.st_size, path))
        total = sum(size for _, size, _ in known)
        for _, size, path in sorted(known):
            if total <= self.limit:
                break
            if path not in in_use:
                with contextlib.suppress(OSError):
                    path.unlink()
                    total -= size

    def _path(self, key: str, ending: str) -> Path:
        name = hashlib.blake2b(key.encode("utf-8", "backslashreplace"), digest_size=20).hexdigest()
        if self.limit:
            return self.directory / f"{name}.{ending}"
        with self._lock:
            if self._scratch is None:
                self._scratch = tempfile.TemporaryDirectory(prefix="smolforge-data-")
            return Path(self._scratch.name) / f"{name}.{ending}"

    def _write(self, path: Path, blocks: Iterable[bytes], bound: int | None, what: str) -> int:
        # Not through files.py: what a cache loses in a crash is fetched again, so nothing here waits for the disk.
        path.parent.mkdir(parents=True, exist_ok=True)
        size = 0
        partial = path.with_name(f"{path.name}.{os.urandom(8).hex()}.partial")
        try:
            with partial.open("xb") as file:  # with the mode of the umask, which mkstemp has not
                for block in blocks:
                    size += len(block)
                    if bound is not None and size > bound:
                        hint = "Raise data.cache, or convert the source to parquet, which is read in parts."
                        problem = f"{what} is larger than the cache may be ({bound:,} bytes)"
                        raise DataError(problem, field="data.cache", hint=hint)
                    file.write(block)
            partial.replace(path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        return size


def _mark_used(path: Path) -> None:
    with contextlib.suppress(OSError):  # of another user, who shares the folder
        os.utime(path)


def decompress(path: Path, compression: str) -> Iterator[bytes]:
    """The plain bytes of a file compressed by gzip, bz2, xz or zstd, in blocks.

    Raises:
        EOFError: the file is damaged or cut short.
    """
    try:
        with _OPENERS[compression](path) as plain:
            while block := plain.read(BLOCK):
                yield block
    except (zlib.error, lzma.LZMAError, OSError) as error:
        if isinstance(error, OSError) and error.errno:  # the disk's errors have a number, a wrong header has none
            raise
        raise EOFError(str(error).replace(_ARROW_CUT, "the file ends inside a zstd frame")) from None


def _open_zstd(path: Path) -> Any:
    # Arrow's reader continues with the next frame, and refuses a cut file and windows of over 128 MiB.
    import pyarrow

    return pyarrow.input_stream(path, compression="zstd")


_OPENERS: dict[str, Callable[[Path], Any]] = {"gzip": gzip.open, "bz2": bz2.open, "xz": lzma.open, "zstd": _open_zstd}
_ARROW_CUT = "Truncated compressed stream"


class ReadAhead:
    """Ranges fetched in threads before they are needed: at most `limit` bytes, else they are not started."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._lock = threading.Lock()
        self._started: dict[Hashable, tuple[Future[bytes], int]] = {}
        self._held = 0
        self._pool: ThreadPoolExecutor | None = None

    def start(self, key: Hashable, size: int, fetch: Callable[[], bytes]) -> None:
        """Start to fetch `size` bytes (at most) under `key`, where there is room."""
        with self._lock:
            if key in self._started or self._held + size > self.limit:
                return
            self._pool = self._pool or ThreadPoolExecutor(READ_AHEAD_THREADS, "smolforge-readahead")
            self._held += size
            self._started[key] = (self._pool.submit(fetch), size)

    def take(self, key: Hashable) -> bytes | None:
        """What was fetched, once; None where it was not started, is still queued, or failed."""
        future = self.drop(key)
        if future is None or future.cancelled():
            return None
        try:
            return future.result()
        except SmolforgeError:
            return None  # the caller fetches it itself and meets the error, if it persists

    def drop(self, key: Hashable) -> Future[bytes] | None:
        """Discard what was started under `key`."""
        with self._lock:
            future, size = self._started.pop(key, (None, 0))
            self._held -= size
        if future is not None:
            future.cancel()
        return future

    def close(self) -> None:
        """Start nothing more."""
        with self._lock:
            self.limit = -1
            pool, self._pool = self._pool, None
        if pool is not None:
            pool.shutdown(wait=False, cancel_futures=True)


class LRUCache:
    """Objects in memory, of at most `limit` bytes together; threads that ask for the same key wait for one to make it.

    Something larger than the limit is returned but not kept.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._lock = threading.Lock()
        self._made: OrderedDict[Hashable, tuple[Future[Any], int]] = OrderedDict()
        self._total = 0

    def get(self, key: Hashable, make: Callable[[], Any], size: Callable[[Any], int]) -> Any:
        """The value under `key`, made by `make` if it is not there; `size` gives its bytes.

        What `make` raises is raised in every thread that waits for it; the next call tries again.
        """
        with self._lock:
            mine = key not in self._made
            future, _ = self._made.setdefault(key, (Future(), 0))
            self._made.move_to_end(key)
        if not mine:
            return future.result()
        try:
            value = make()
        except BaseException as error:
            with self._lock:
                self._made.pop(key, None)
            future.set_exception(error)
            raise
        future.set_result(value)
        with self._lock:
            self._made[key] = (future, size(value))
            self._total += self._made[key][1]
            while self._total > self.limit:
                oldest = next((k for k, (f, _) in self._made.items() if f.done()), None)
                if oldest is None:
                    break
                self._total -= self._made.pop(oldest)[1]
        return value

    def __contains__(self, key: Hashable) -> bool:
        with self._lock:
            return key in self._made

    def drop(self, owner: object) -> None:
        """Forget the values under keys that start with `owner`."""
        with self._lock:
            for key in [k for k, (f, _) in self._made.items() if isinstance(k, tuple) and k[0] is owner and f.done()]:
                self._total -= self._made.pop(key)[1]
