"""The cache on disk: fetched ranges and whole plain files, bounded in bytes, the least recently used dropped first.

Everything is named by a hash, so nothing outside decides a path here. Each file is written beside and renamed,
and a range begins with a hash of itself, so what a crash or another process left torn is fetched again. With the
cache turned off (`data.cache=0`) ranges are not kept, and whole files go to a temporary folder of this process.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
import threading
from collections.abc import Iterable
from pathlib import Path

from smolforge.errors import DataError, RunFailed

SCRATCH_LIMIT = 16 << 30  # for whole files while the cache is off
TRIM_EVERY = 64 << 20  # bytes written between two looks at the whole folder


def default_directory() -> Path:
    """`$SMOLFORGE_CACHE`, or smolforge's folder in the user's cache."""
    named = os.environ.get("SMOLFORGE_CACHE")
    if named:
        return Path(named)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "smolforge"


class Cache:
    """A bounded folder of bytes.

    Args:
        directory: where it lies; made when first written to.
        limit: bytes it may hold; 0 turns it off.
    """

    def __init__(self, directory: Path | None, limit: int) -> None:
        self.directory = (directory or default_directory()) / "data"
        self.limit = limit
        self._scratch: tempfile.TemporaryDirectory[str] | None = None
        self._pinned: set[Path] = set()
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
        if hashlib.blake2b(data[16:], digest_size=16).digest() != data[:16]:
            path.unlink(missing_ok=True)
            return None
        with contextlib.suppress(OSError):
            os.utime(path)
        return data[16:]

    def keep_range(self, key: str, data: bytes) -> None:
        """Keep bytes under `key`; a disk that is full is no reason to stop."""
        if not self.limit or len(data) + 16 > self.limit:
            return
        with contextlib.suppress(OSError):
            self._write(self._path(key, "range"), [hashlib.blake2b(data, digest_size=16).digest(), data], None, "")
            self._trim(len(data))

    def drop_range(self, key: str) -> None:
        """Forget the bytes under `key`."""
        with contextlib.suppress(OSError):
            self._path(key, "range").unlink(missing_ok=True)

    def file(self, key: str, blocks: Iterable[bytes], *, what: str) -> Path:
        """A plain file with the content of `blocks`, which are asked for only when it is not there yet.

        Raises:
            DataError: it would be larger than the cache may be.
            RunFailed: there is no room on the disk.
        """
        path = self._path(key, "file")
        with self._lock:
            self._pinned.add(path)
        if path.exists():
            with contextlib.suppress(OSError):
                os.utime(path)
            return path
        bound = self.limit or SCRATCH_LIMIT
        try:
            size = self._write(path, blocks, bound, what)
            self._trim(size)
        except OSError as error:
            raise RunFailed(
                f"cannot write {what} to {path.parent}: {error.strerror}",
                hint="Make room, or set SMOLFORGE_CACHE to a folder with room.",
            ) from None
        return path

    def holds(self, key: str) -> bool:
        """Whether `file` would answer without asking for blocks."""
        return self._path(key, "file").exists()

    def close(self) -> None:
        """Remove what was only for this process."""
        if self._scratch is not None:
            self._scratch.cleanup()
            self._scratch = None

    def _path(self, key: str, ending: str) -> Path:
        name = hashlib.blake2b(key.encode("utf-8", "backslashreplace"), digest_size=20).hexdigest()
        if self.limit:
            return self.directory / f"{name}.{ending}"
        with self._lock:
            if self._scratch is None:
                self._scratch = tempfile.TemporaryDirectory(prefix="smolforge-data-")
            return Path(self._scratch.name) / f"{name}.{ending}"

    def _write(self, path: Path, blocks: Iterable[bytes], bound: int | None, what: str) -> int:
        path.parent.mkdir(parents=True, exist_ok=True)
        size = 0
        handle, name = tempfile.mkstemp(dir=path.parent, suffix=".partial")
        try:
            with os.fdopen(handle, "wb") as file:
                for block in blocks:
                    size += len(block)
                    if bound is not None and size > bound:
                        raise DataError(
                            f"{what} is larger than the cache may be ({bound:,} bytes)",
                            field="data.cache",
                            hint="Raise data.cache, or convert the source to parquet, which is read in parts.",
                        )
                    file.write(block)
            Path(name).replace(path)
        except BaseException:
            with contextlib.suppress(OSError):
                Path(name).unlink()
            raise
        return size

    def trim(self) -> None:
        """Remove the least recently used files until the folder is within its bound."""
        with contextlib.suppress(OSError):
            self._trim(TRIM_EVERY)

    def _trim(self, written: int) -> None:
        """The same, now and then: after every so many bytes written."""
        if not self.limit:
            return
        with self._lock:
            self._since_trim += written
            if self._since_trim < min(TRIM_EVERY, self.limit // 8 + 1):
                return
            self._since_trim = 0
            pinned = set(self._pinned)
        known = []
        for entry in os.scandir(self.directory):
            with contextlib.suppress(OSError):
                stat = entry.stat()
                known.append((stat.st_mtime_ns, stat.st_size, Path(entry.path)))
        total = sum(size for _, size, _ in known)
        for _, size, path in sorted(known):
            if total <= self.limit:
                break
            if path not in pinned:
                with contextlib.suppress(OSError):
                    path.unlink()
                    total -= size
