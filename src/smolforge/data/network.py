"""Waiting for the network: what passes is tried again with growing waits, for a bounded time, and said once.

Everything that asks the network goes through `Network.attempt`. A fault that may pass is a `Trouble`; the waits
between tries double up to a minute, with jitter so that many ranks do not return at the same instant, unless the
server says itself how long to wait. Bytes that arrive before a connection breaks count as life: they are kept and
the patience begins anew. Sleep, clock and jitter are given by the caller where tests must not wait.
"""

from __future__ import annotations

import email.utils
import logging
import os
import random
import threading
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, TypeVar

from smolforge.errors import SourceUnavailable

if TYPE_CHECKING:
    import httpx

T = TypeVar("T")
logger = logging.getLogger(__name__)

FIRST_WAIT, LONGEST_WAIT = 0.5, 60.0  # seconds
TELL_AGAIN = 600.0  # seconds between two messages about the same kind of trouble
PASSING = {408, 425, 429}  # beside all 5xx


def is_offline() -> bool:
    """Whether the user forbids the network with HF_HUB_OFFLINE, as huggingface_hub reads it."""
    return os.environ.get("HF_HUB_OFFLINE", "").strip().upper() in {"1", "ON", "YES", "TRUE"}


class Trouble(Exception):
    """A fault that may pass.

    Args:
        what: it, in words; equal words are the same kind of trouble.
        wait: seconds that the server asks for.
        progress: whether something was gained since the last try.
    """

    def __init__(self, what: str, *, wait: float | None = None, progress: bool = False) -> None:
        super().__init__(what)
        self.what, self.wait, self.progress = what, wait, progress


class Network:
    """How long to wait for a network, and whom to tell. Thread-safe.

    Args:
        patience: seconds that something silent is tried again.
        timeout: seconds that a connection or one read may take.
        sleep, clock, jitter: time itself, and a number in [0, 1).
    """

    def __init__(
        self,
        *,
        patience: float = 900.0,
        timeout: float = 30.0,
        sleep: Callable[[float], object] | None = None,
        clock: Callable[[], float] = time.monotonic,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self.patience, self.timeout = patience, timeout
        self.clock, self.jitter = clock, jitter
        self._closed = threading.Event()
        self._sleep = sleep or self._closed.wait
        self._lock = threading.Lock()
        self._told: dict[tuple[str, str], float] = {}
        self._client: httpx.Client | None = None

    def attempt(self, place: str, what: str, action: Callable[[], T]) -> T:
        """Run `action` until it raises no `Trouble`.

        Args:
            place: the host, for messages.
            what: the file or question, for messages.
            action: the try; whatever else it raises goes through.

        Raises:
            SourceUnavailable: it raised nothing but `Trouble` for longer than the patience.
        """
        tries, since = 0, 0.0
        while True:
            try:
                return action()
            except Trouble as trouble:
                now = self.clock()
                if trouble.progress or not tries:
                    tries, since = 0, now
                left = since + self.patience - now
                wait = min(FIRST_WAIT * 2**tries, LONGEST_WAIT) * (0.5 + 0.5 * self.jitter())
                wait = max(wait, trouble.wait) if trouble.wait is not None else wait
                if left <= 0 or (trouble.wait or 0) > left:
                    asked = f" and asks to wait {trouble.wait:.0f} s" if trouble.wait else ""
                    raise SourceUnavailable(
                        f"{place} stayed away for {now - since:.0f} s while {what} was read: {trouble.what}{asked}",
                        field="data.sources",
                        hint=f"Go on later with the same command; data.patience is {self.patience:.0f} s.",
                    ) from None
                self._tell(place, what, trouble.what, min(wait, left))
                self._sleep(min(wait, left))
                if self._closed.is_set():
                    raise SourceUnavailable(f"the reading of {what} was stopped while {place} was away") from None
                tries += 1

    def client(self) -> httpx.Client:
        """The one HTTP client; it keeps connections open."""
        with self._lock:
            if self._client is None:
                import httpx

                self._client = httpx.Client(
                    follow_redirects=True,
                    timeout=httpx.Timeout(self.timeout, connect=min(self.timeout, 10.0)),
                    limits=httpx.Limits(max_connections=64, max_keepalive_connections=16),
                )
            return self._client

    def close(self) -> None:
        """End all waiting and let go of connections."""
        self._closed.set()
        with self._lock:
            if self._client is not None:
                self._client.close()
                self._client = None

    def _tell(self, place: str, what: str, trouble: str, wait: float) -> None:
        now = self.clock()
        with self._lock:
            last = self._told.get((place, trouble))
            if last is not None and now - last < TELL_AGAIN:
                return
            self._told[(place, trouble)] = now
        logger.warning("%s: %s while reading %s; trying again in %.1f s", place, trouble, what, wait)


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that a Retry-After header asks for (a number or a date, RFC 9110 10.2.3), or None."""
    value = headers.get("retry-after", "").strip()
    if not value:
        return None
    try:
        return max(float(value), 0.0)
    except ValueError:
        pass
    try:
        return max(email.utils.parsedate_to_datetime(value).timestamp() - time.time(), 0.0)
    except (ValueError, TypeError, OverflowError):
        return None


def passes(status: int) -> bool:
    """Whether an HTTP status is worth another try."""
    return status in PASSING or status >= 500
