"""Fetch exact ranges of remote files, and retry with patience what may pass.

Everything that uses the network runs through `Network.attempt`. A fault that may pass is a `Trouble`; the waits between
tries double up to a minute, with jitter, unless the server names a time (Retry-After). Bytes that arrive before a
connection breaks are kept, and the patience starts anew.

Over HTTP, and so for the Hub, a file is an `HttpFile` on httpx: fsspec's HTTP filesystem takes any body for the range,
loses what came before a connection broke, and follows redirects anew for each range. Other protocols of fsspec are read
in sources/url.py.
"""

from __future__ import annotations

import contextlib
import email.utils
import logging
import random
import re
import tempfile
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from smolforge.errors import DataError, SmolforgeError, SourceChanged, SourceUnavailable

if TYPE_CHECKING:
    import httpx

T = TypeVar("T")
logger = logging.getLogger(__name__)

FIRST_WAIT, LONGEST_WAIT = 0.5, 60.0  # seconds
REPEAT_WARNING = 600.0  # seconds between two warnings about the same trouble
PASSING = {408, 425, 429}  # and all 5xx
BLOCK = 8 << 20  # of a file fetched whole
SLOWEST = 32 << 10  # bytes per second; a slower body is abandoned and requested again
GRACE = 60.0  # seconds before that
FRESH_REFUSALS = 5  # how often a redirect may lead to a refusal at once
_CONTENT_RANGE = re.compile(r"^bytes (\d+)-(\d+)/(\d+)$")
_EXPIRED = {400, 401, 403, 404, 410}


def changed(message: str) -> SourceChanged:
    """The error for a source that differs from the one a run started with."""
    hint = "Restore it, start a new run, or continue with the changed data: --accept-changed-data."
    return SourceChanged(message, field="data.sources", hint=hint)


@dataclass(eq=False)
class Trouble(Exception):
    """A fault that may pass: what it is, the seconds the server asks for, whether bytes came since the last try."""

    what: str
    wait: float | None = None
    progress: bool = False


class Network:
    """Retries for `patience` seconds while nothing comes, and the HTTP client. Thread-safe.

    A connection or one read may take `timeout` seconds. `sleep`, `clock` and `jitter` are replaced in tests.
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
        self.patience, self.timeout, self.clock, self.jitter = patience, timeout, clock, jitter
        self._closed = threading.Event()
        self._sleep = sleep or self._closed.wait
        self._lock = threading.Lock()
        self._warned: dict[tuple[str, str], float] = {}
        self._client: httpx.Client | None = None

    def attempt(
        self, place: str, what: str, action: Callable[[], T], explain: Callable[[Exception], Exception] = lambda e: e
    ) -> T:
        """Run `action` until it raises no `Trouble`; messages name the host `place` and the file or question `what`.

        Args:
            explain: from an error of a library to the one to raise: a `Trouble` where it may pass.

        Raises:
            SourceUnavailable: it raised nothing but `Trouble` for longer than the patience.
        """
        tries, since = 0, 0.0
        while True:
            try:
                return action()
            except (SmolforgeError, NoRanges):
                raise
            except Exception as error:
                trouble = error if isinstance(error, Trouble) else explain(error)
                if not isinstance(trouble, Trouble):
                    raise trouble from None
            now = self.clock()
            if trouble.progress or not tries:
                tries, since = 0, now
            left = since + self.patience - now
            wait = min(FIRST_WAIT * 2**tries, LONGEST_WAIT) * (0.5 + 0.5 * self.jitter())
            wait = max(wait, trouble.wait) if trouble.wait is not None else wait
            if left <= 0 or (trouble.wait or 0) > left:
                asked = f" and asks to wait {trouble.wait:.0f} s" if trouble.wait else ""
                problem = f"could not reach {place} for {now - since:.0f} s while reading {what}: {trouble.what}{asked}"
                hint = f"Run the same command again later; data.patience is {self.patience:.0f} s."
                raise SourceUnavailable(problem, field="data.sources", hint=hint)
            self._warn(place, what, trouble.what, min(wait, left))
            self._sleep(min(wait, left))
            if self._closed.is_set():
                raise SourceUnavailable(f"stopped while {place} did not answer about {what}")
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
        """End all waiting and close the connections."""
        self._closed.set()
        with self._lock:
            if self._client is not None:
                self._client.close()
                self._client = None

    def _warn(self, place: str, what: str, trouble: str, wait: float) -> None:
        now = self.clock()
        with self._lock:
            if now - self._warned.get((place, trouble), -REPEAT_WARNING) < REPEAT_WARNING:
                return
            self._warned[(place, trouble)] = now
        logger.warning("%s: %s while reading %s; trying again in %.1f s", place, trouble, what, wait)


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that a Retry-After header asks for (a number or a date, RFC 9110 10.2.3), or None."""
    value = headers.get("retry-after", "").strip()
    with contextlib.suppress(ValueError):
        return max(float(value), 0.0)
    with contextlib.suppress(ValueError, TypeError, OverflowError):
        return max(email.utils.parsedate_to_datetime(value).timestamp() - time.time(), 0.0)
    return None


def may_pass(status: int) -> bool:
    """Whether an HTTP status is worth another try."""
    return status in PASSING or status >= 500


class NoRanges(Exception):
    """The server sends the whole file whatever range is asked."""


class RemoteFile(ABC):
    """One remote file, which messages call `name` on `host`. Thread-safe."""

    ranges = True  # until the server has shown that it sends whole files only

    def __init__(self, network: Network, url: str, name: str, host: str, size: int | None) -> None:
        self.network, self.url, self.name, self.host = network, url, name, host
        self.size = size  # bytes; None until `look`

    def look(self) -> dict[str, Any]:
        """Learn the size; return what identifies the content (`etag`, `modified`), as far as the store tells."""
        return self.network.attempt(self.host, self.name, self._look, self._explain)

    @abstractmethod
    def _look(self) -> dict[str, Any]:
        """One try to look."""

    @abstractmethod
    def _read(self, start: int, length: int, got: bytearray) -> None:
        """One try to extend `got` to the bytes [start, start + length); raises `Trouble` for what may pass."""

    def _explain(self, error: Exception) -> Exception:
        return error

    def read(self, start: int, length: int) -> bytes:
        """Exactly `length` bytes from `start`.

        Raises:
            NoRanges: the server supports no ranges; `blocks` still works.
            SourceChanged: the file is not the one that was looked at.
        """
        got = bytearray()

        def rest() -> None:
            before = len(got)
            try:
                self._read(start, length, got)
            except Trouble as trouble:
                if len(got) == length:
                    return  # the whole range had come before the connection broke
                trouble.progress = trouble.progress or len(got) > before
                raise

        self.network.attempt(self.host, self.name, rest, self._explain)
        return bytes(got)

    def blocks(self) -> Iterator[bytes]:
        """The whole file in blocks; raises as `read`."""
        at, size = 0, self.size or 0
        try:
            while at < size:
                block = self.read(at, min(BLOCK, size - at))
                yield block
                at += len(block)
        except NoRanges:
            if at:
                raise DataError(f"{self.host} stopped answering ranges of {self.name}") from None
            yield from self._whole()

    def _whole(self) -> Iterator[bytes]:
        raise NotImplementedError  # only a file that raises NoRanges has to

    def _changed(self, what: str, was: str, now: str) -> SourceChanged:
        return changed(f"{self.name} changed on {self.host}: its {what} was {was} and is {now}")


class HttpFile(RemoteFile):
    """A file behind an http(s) URL.

    A range is accepted only when the server confirms it: status 206, the right first byte, and the length and ETag that
    the file had when it was looked at. A body that ends early is never the end of the file. `headers` is called for
    each request, such as for a token, and its answer sent to the host of `url` only.
    """

    etag: str | None = None  # without one a change of content is not noticed

    def __init__(
        self, network: Network, url: str, name: str, size: int | None = None, headers: Callable[[], Any] = dict
    ) -> None:
        super().__init__(network, url, name, urlsplit(url).netloc.rpartition("@")[2], size)
        self.headers = headers
        self._location: str | None = None  # where the last redirect led
        self._refusals = 0

    def _look(self) -> dict[str, Any]:
        with self._answer({"Range": "bytes=0-0"}) as response:
            if response.status_code == 206:
                _, _, total = self._content_range(response)
            else:
                self.ranges = False
                length = response.headers.get("content-length", "")
                if not length.isdigit():
                    raise DataError(f"{self.host} does not tell the length of {self.name}", field="data.sources")
                total = int(length)
            if self.size is not None and self.size != total:
                raise self._changed("size", f"{self.size:,}", f"{total:,}")
            self.size = total
            self.etag = self.etag or response.headers.get("etag")
            if self.etag:
                return {"etag": self.etag}
            modified = response.headers.get("last-modified")
            return {"modified": modified} if modified else {}

    def _read(self, start: int, length: int, got: bytearray) -> None:
        first, last = start + len(got), start + length - 1
        asked = {"Range": f"bytes={first}-{last}"}
        if self.etag and not self.etag.startswith("W/"):
            asked["If-Match"] = self.etag
        with self._answer(asked) as response:
            if response.status_code != 206:
                self.ranges = False
                raise NoRanges
            a, b, total = self._content_range(response)
            self._check_same(response, total)
            if a != first or b > last:
                raise Trouble("another range than the one asked for")
            self._body(response, b - a + 1, got.extend)
        if len(got) < length:
            raise Trouble("a body shorter than announced")

    def _whole(self) -> Iterator[bytes]:
        with tempfile.TemporaryFile() as file:
            self.network.attempt(self.host, self.name, lambda: self._read_all(file))
            file.seek(0)
            while block := file.read(BLOCK):
                yield block

    def _read_all(self, file: IO[bytes]) -> None:
        file.seek(0)
        file.truncate()
        with self._answer({}) as response:
            length = response.headers.get("content-length", "")
            self._check_same(response, int(length) if length.isdigit() else self.size)
            self._body(response, self.size or 0, file.write)
        if file.tell() != self.size:
            raise Trouble("a body shorter than announced")

    @contextlib.contextmanager
    def _answer(self, headers: dict[str, str]) -> Iterator[httpx.Response]:
        """One GET with status 200 or 206; faults on the way become `Trouble`."""
        import httpx

        through = self._location or self.url
        base = self.headers()
        if urlsplit(through).netloc != urlsplit(self.url).netloc:  # a token is for its own host alone
            base = {key: value for key, value in base.items() if key.lower() not in ("authorization", "cookie")}
        headers = {**base, "Accept-Encoding": "identity", **headers}
        try:
            with self.network.client().stream("GET", through, headers=headers) as response:
                if response.status_code not in (200, 206):
                    raise self._refused(response, through)
                self._refusals = 0
                if response.history:
                    self._location = str(response.url)
                yield response
        except (httpx.UnsupportedProtocol, httpx.TooManyRedirects, httpx.InvalidURL) as error:
            raise DataError(f"cannot read {self.url}: {error}", field="data.sources") from None
        except httpx.TimeoutException:
            raise Trouble("no answer in time") from None
        except (httpx.TransportError, httpx.StreamError) as error:
            raise Trouble(f"a broken connection ({type(error).__name__})") from None

    def _body(self, response: httpx.Response, length: int, take: Callable[[bytes], object]) -> None:
        """Pass on the body, at most `length` bytes; the caller checks whether it was all."""
        if response.headers.get("content-encoding", "identity") != "identity":
            raise DataError(f"{self.host} sends {self.name} re-encoded, which has no byte ranges")
        end = self.network.clock() + GRACE + length / SLOWEST
        left = length
        for chunk in response.iter_raw():
            if len(chunk) > left:
                raise Trouble("a body longer than announced")
            take(chunk)
            left -= len(chunk)
            if left and self.network.clock() > end:
                raise Trouble(f"a body slower than {SLOWEST >> 10} kB/s")

    def _content_range(self, response: httpx.Response) -> tuple[int, int, int]:
        value = response.headers.get("content-range", "")
        match = _CONTENT_RANGE.match(value)
        if not match:
            raise DataError(f"{self.host} answers a range of {self.name} with {value!r}", field="data.sources")
        return int(match[1]), int(match[2]), int(match[3])

    def _check_same(self, response: httpx.Response, total: int | None) -> None:
        if total != self.size:
            raise self._changed("size", f"{self.size:,}", f"{total:,}")
        etag = response.headers.get("etag")
        if self.etag and etag and etag.removeprefix("W/") != self.etag.removeprefix("W/"):
            raise self._changed("ETag", self.etag, etag)

    def _refused(self, response: httpx.Response, through: str) -> Exception:
        """The error for a status other than 200 and 206."""
        status = response.status_code
        what = f"{status} {response.reason_phrase}".strip()
        if may_pass(status):
            return Trouble(what, wait=retry_after(response.headers))
        if status in _EXPIRED and (through != self.url or response.history):
            self._location = None
            self._refusals += 1
            if through != self.url or self._refusals <= FRESH_REFUSALS:
                return Trouble(f"an expired redirect ({what})", progress=through != self.url)
        if status in (412, 416):
            how = f"no longer has ETag {self.etag}" if status == 412 else f"is shorter than {self.size:,} bytes"
            return changed(f"{self.name} changed on {self.host}: it {how}")
        hint = {401: "It may need HF_TOKEN.", 403: "It may need HF_TOKEN.", 404: "Check the address."}.get(status)
        return DataError(f"{self.host} refuses {self.name}: {what}", field="data.sources", hint=hint)
