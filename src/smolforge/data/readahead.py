"""Reading ahead: bytes fetched before they are asked for, within a bound on what is held."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from concurrent.futures import Future, ThreadPoolExecutor

from smolforge.errors import SmolforgeError

THREADS = 4


class ReadAhead:
    """Thread-safe.

    Args:
        limit: bytes held or on their way at any moment; what does not fit is not begun.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._lock = threading.Lock()
        self._begun: dict[Hashable, tuple[Future[bytes], int]] = {}
        self._held = 0
        self._pool: ThreadPoolExecutor | None = None

    def begin(self, key: Hashable, size: int, fetch: Callable[[], bytes]) -> None:
        """Begin to fetch `size` bytes (at most) under `key`, where there is room."""
        with self._lock:
            if key in self._begun or self._held + size > self.limit:
                return
            self._pool = self._pool or ThreadPoolExecutor(THREADS, "smolforge-ahead")
            self._held += size
            self._begun[key] = (self._pool.submit(fetch), size)

    def take(self, key: Hashable) -> bytes | None:
        """What was fetched, once; None where it was not begun, did not get its turn yet, or failed."""
        with self._lock:
            entry = self._begun.pop(key, None)
            if entry is None:
                return None
        try:
            return None if entry[0].cancel() else entry[0].result()
        except SmolforgeError:
            return None  # the caller asks again itself and meets the error, if it stays
        finally:
            with self._lock:
                self._held -= entry[1]

    def drop(self, key: Hashable) -> None:
        """Give up what was begun under `key`: it came another way."""
        with self._lock:
            entry = self._begun.pop(key, None)
            if entry is not None:
                entry[0].cancel()
                self._held -= entry[1]

    def close(self) -> None:
        """Begin nothing more."""
        with self._lock:
            self.limit = -1
            pool, self._pool = self._pool, None
        if pool is not None:
            pool.shutdown(wait=False, cancel_futures=True)
