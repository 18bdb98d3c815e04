"""Making things ahead in threads: several queues, each filled by one thread at a time, in its own order."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Generic, TypeVar

T = TypeVar("T")


class Prefetch(Generic[T]):
    """Keeps up to `depth` results of each maker ready.

    Args:
        makers: for each queue the function whose successive results fill it; called by one thread at a time.
        threads: how many make at once.
        depth: results that wait in each queue.
        order: the queues in the order in which they are wanted first.
    """

    def __init__(
        self, makers: Mapping[int, Callable[[], T]], *, threads: int, depth: int, order: Sequence[int]
    ) -> None:
        self._makers, self._depth = dict(makers), depth
        self._ready: dict[int, deque[T | BaseException]] = {key: deque() for key in order}
        self._rank = {key: i for i, key in enumerate(order)}
        self._given = dict.fromkeys(order, 0)
        self._idle, self._wanted = set(order), dict.fromkeys(order, 0)
        self._changed = threading.Condition()
        self._closed = False
        self._threads = [
            threading.Thread(target=self._work, name=f"smolforge-data-{i}", daemon=True) for i in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    def take(self, key: int) -> T:
        """The next result of a queue, waited for.

        Raises:
            whatever its maker raised; that queue stays at its error.
        """
        with self._changed:
            self._wanted[key] = max(self._wanted[key], 1)
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._ready[key] or self._closed)
            if not self._ready[key]:
                raise RuntimeError("the loader is closed")
            result = self._ready[key][0]
            if isinstance(result, BaseException):
                raise result
            self._ready[key].popleft()
            self._given[key] += 1
            self._wanted[key] = max(self._wanted[key] - 1, 0)
            self._changed.notify_all()
            return result

    def wait(self, needed: Mapping[int, int], timeout: float) -> bool:
        """Wait until each queue holds as many results as named (or an error), or for `timeout` seconds."""

        def ready() -> bool:
            return self._closed or all(
                len(self._ready[key]) >= count or self._failed(key) for key, count in needed.items()
            )

        with self._changed:
            for key, count in needed.items():
                self._wanted[key] = max(self._wanted[key], count)
            self._changed.notify_all()
            return self._changed.wait_for(ready, timeout)

    def failed(self, keys: Iterable[int]) -> bool:
        """Whether one of the queues has come to an error."""
        with self._changed:
            return any(self._failed(key) for key in keys)

    def close(self, timeout: float = 2.0) -> None:
        """Stop; threads in the middle of something get `timeout` seconds to finish and are left behind after it."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        end = time.monotonic() + timeout
        for thread in self._threads:
            thread.join(max(end - time.monotonic(), 0))

    def _failed(self, key: int) -> bool:
        return bool(self._ready[key]) and isinstance(self._ready[key][-1], BaseException)

    def _next(self) -> int | None:
        """The idle queue that will run dry first."""
        hungry = [
            key
            for key in self._idle
            if len(self._ready[key]) < max(self._depth, self._wanted[key]) and not self._failed(key)
        ]
        return min(hungry, key=lambda key: (self._given[key] + len(self._ready[key]), self._rank[key]), default=None)

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._next() is not None)
                if self._closed:
                    return
                key = self._next()
                assert key is not None
                self._idle.discard(key)
            result: T | BaseException
            try:
                result = self._makers[key]()
            except BaseException as error:
                result = error
            with self._changed:
                self._ready[key].append(result)
                self._idle.add(key)
                self._changed.notify_all()
