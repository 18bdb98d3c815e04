"""A file behind a URL: its length and ETag, exact ranges of it, redirects that expire.

A range is taken only when the server says that it is one: status 206, the right first byte, the length and ETag
that the file had when it was looked at. A body that ends early is never the end of the file; what came is kept
and the rest is asked for again.
"""

from __future__ import annotations

import contextlib
import re
import tempfile
from collections.abc import Callable, Iterator
from typing import IO
from urllib.parse import urlsplit

import httpx

from smolforge.data.network import Network, Trouble, passes, retry_after
from smolforge.errors import DataError, SourceChanged

BLOCK = 8 << 20  # of a file fetched whole
SLOWEST = 32 << 10  # bytes per second; a body that drips slower is given up and asked for again
GRACE = 60.0  # seconds before that
FRESH_REFUSALS = 5  # how often a redirect may lead to a refusal at once
_CONTENT_RANGE = re.compile(r"^bytes (\d+)-(\d+)/(\d+)$")
_EXPIRED = {400, 401, 403, 404, 410}


class NoRanges(Exception):
    """The server sends the whole file whatever range is asked."""


class RemoteFile:
    """Thread-safe face of a URL.

    Args:
        network: client and patience.
        url: where the file is.
        name: what messages call it.
        headers: asked for at each request, such as a token; sent to the host of `url` only.
        size: length in bytes, where it is known already.
        etag: where it is known already; None is no promise.
    """

    def __init__(
        self,
        network: Network,
        url: str,
        name: str,
        *,
        headers: Callable[[], dict[str, str]] = dict,
        size: int | None = None,
        etag: str | None = None,
    ) -> None:
        self.network, self.url, self.name, self.headers = network, url, name, headers
        self.size, self.etag, self.modified = size, etag, None
        self.host = urlsplit(url).netloc.rpartition("@")[2]
        self.ranges = True
        self._location: str | None = None  # where the last redirect led
        self._refusals = 0

    def look(self) -> None:
        """Learn size and ETag, from the answer to a request for the first byte.

        Raises:
            DataError: there is no such file, it may not be read, or its length is not told.
            SourceUnavailable: the network stayed away.
        """
        self.network.attempt(self.host, self.name, self._look)

    def read(self, start: int, length: int) -> bytes:
        """Exactly `length` bytes from `start`.

        Raises:
            NoRanges: the server knows no ranges; `blocks` still works.
            SourceChanged: size or ETag are not those known before.
            DataError, SourceUnavailable: as `look`.
        """
        got = bytearray()

        def rest() -> None:
            before = len(got)
            try:
                self._read(start, length, got)
            except Trouble as trouble:
                if len(got) == length:
                    return  # all that the range holds had come before the connection broke
                trouble.progress = trouble.progress or len(got) > before
                raise

        self.network.attempt(self.host, self.name, rest)
        return bytes(got)

    def blocks(self) -> Iterator[bytes]:
        """The whole file in blocks; raises as `read`."""
        if self.size is None:
            self.look()
        assert self.size is not None
        at = 0
        try:
            while at < self.size:
                block = self.read(at, min(BLOCK, self.size - at))
                yield block
                at += len(block)
            return
        except NoRanges:
            if at:
                raise DataError(f"{self.host} stopped answering ranges of {self.name}") from None
        with tempfile.TemporaryFile() as file:
            self.network.attempt(self.host, self.name, lambda: self._read_all(file))
            file.seek(0)
            while block := file.read(BLOCK):
                yield block

    # -- one try each

    def _look(self) -> None:
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
            self.modified = response.headers.get("last-modified")

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
            self._same(response, total)
            if a != first or b > last:
                raise Trouble("another range than the one asked for")
            self._body(response, b - a + 1, got.extend)
        if len(got) < length:
            raise Trouble("a body shorter than announced")

    def _read_all(self, file: IO[bytes]) -> None:
        file.seek(0)
        file.truncate()
        with self._answer({}) as response:
            length = response.headers.get("content-length", "")
            self._same(response, int(length) if length.isdigit() else self.size)
            self._body(response, self.size or 0, file.write)
        if file.tell() != self.size:
            raise Trouble("a body shorter than announced")

    @contextlib.contextmanager
    def _answer(self, headers: dict[str, str]) -> Iterator[httpx.Response]:
        """One GET: the answer if its status is one; faults on the way turned into `Trouble`."""
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
        """Pass on the body, at most `length` bytes; the caller looks whether it was all."""
        if response.headers.get("content-encoding", "identity") != "identity":
            raise DataError(f"{self.host} sends {self.name} re-encoded, which has no byte ranges")
        clock = self.network.clock
        end = clock() + GRACE + length / SLOWEST
        left = length
        for chunk in response.iter_raw():
            if len(chunk) > left:
                raise Trouble("a body longer than announced")
            take(chunk)
            left -= len(chunk)
            if left and clock() > end:
                raise Trouble(f"a body slower than {SLOWEST >> 10} kB/s")

    # -- what an answer must be

    def _content_range(self, response: httpx.Response) -> tuple[int, int, int]:
        match = _CONTENT_RANGE.match(response.headers.get("content-range", ""))
        if not match:
            raise DataError(
                f"{self.host} answers a range of {self.name} with {response.headers.get('content-range')!r}",
                field="data.sources",
            )
        return int(match[1]), int(match[2]), int(match[3])

    def _same(self, response: httpx.Response, total: int | None) -> None:
        if total != self.size:
            raise self._changed("size", f"{self.size:,}", f"{total:,}")
        etag = response.headers.get("etag")
        if self.etag and etag and etag.removeprefix("W/") != self.etag.removeprefix("W/"):
            raise self._changed("ETag", self.etag, etag)

    def _changed(self, what: str, was: str, now: str) -> SourceChanged:
        return SourceChanged(
            f"{self.name} changed on {self.host}: its {what} was {was} and is {now}",
            field="data.sources",
            hint="A run goes on with the data it began with; put it back, or start a new run.",
        )

    def _refused(self, response: httpx.Response, through: str) -> Exception:
        """The error for a status that is no answer."""
        status = response.status_code
        what = f"{status} {response.reason_phrase}".strip()
        if passes(status):
            return Trouble(what, wait=retry_after(response.headers))
        if status in _EXPIRED and (through != self.url or response.history):
            self._location = None
            self._refusals += 1
            if through != self.url or self._refusals <= FRESH_REFUSALS:
                return Trouble(f"an expired redirect ({what})", progress=through != self.url)
        if status == 412:
            return SourceChanged(f"{self.name} changed on {self.host}: it no longer has ETag {self.etag}")
        if status == 416:
            return SourceChanged(f"{self.name} changed on {self.host}: it is shorter than {self.size:,} bytes")
        hint = {401: "It may need HF_TOKEN.", 403: "It may need HF_TOKEN.", 404: "Look at the address."}.get(status)
        return DataError(f"{self.host} refuses {self.name}: {what}", field="data.sources", hint=hint)
