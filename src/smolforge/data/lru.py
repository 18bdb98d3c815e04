"""A bounded store of things that are dear to make: each made once, the least recently used dropped first."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from typing import Generic, TypeVar

T = TypeVar("T")


class LRUCache(Generic[T]):
    """Thread-safe; threads that ask for the same thing at once wait for one of them to make it.

    Args:
        limit: sum of the sizes that stay. Something larger than the limit is given out but not kept.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._lock = threading.Lock()
        self._made: OrderedDict[Hashable, tuple[Future[T], int]] = OrderedDict()
        self._total = 0

    def get(self, key: Hashable, make: Callable[[], T], size: Callable[[T], int]) -> T:
        """The thing under `key`, made by `make` if it is not there; `size` tells its bytes.

        Raises:
            whatever `make` raises, in every thread that waits for it; the next one to ask tries again.
        """
        with self._lock:
            entry = self._made.get(key)
            mine = entry is None
            if entry is None:
                entry = self._made[key] = (Future(), 0)
            self._made.move_to_end(key)
        future = entry[0]
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

    def holds(self, key: Hashable) -> bool:
        """Whether `get` would answer without making."""
        with self._lock:
            return key in self._made

    def drop(self, owner: object) -> None:
        """Forget what was made under keys that begin with `owner`."""
        with self._lock:
            for key in [k for k, (f, _) in self._made.items() if isinstance(k, tuple) and k[0] is owner and f.done()]:
                self._total -= self._made.pop(key)[1]
