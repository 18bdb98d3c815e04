"""Who may enter. Everything a request must pass before a route sees it, as two layers of plain ASGI.

`SecurityMiddleware` looks at the head: known path and method, host, origin, key; it also sets security headers.
`BodyMiddleware` reads the body within a size and a time, counts the request, and cancels a route whose client has left.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import re
import time
from collections.abc import Callable, Iterable
from http.cookies import CookieError, SimpleCookie
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from smolforge.serving.errors import ApiError
from smolforge.serving.metrics import Metrics
from smolforge.serving.settings import ServeSettings

COOKIE = "smolforge_session"
# What of Gradio the page needs. The rest of its routes (files, uploads, proxies, editing) does not exist here.
GRADIO = re.compile(
    r"^/(?:$|config/?$|theme\.css$|favicon\.ico$|manifest\.json$|robots\.txt$|assets/|static/|svelte/"
    r"|gradio_api/(?:info/?$|app_id/?$|startup-events$|theme\.css$|heartbeat/|queue/(?:join|data|status)$|call/|reset/?$|cancel$))"
)
OPEN = re.compile(
    r"^/(?:health$|login$|theme\.css$|favicon\.ico$|manifest\.json$|robots\.txt$|assets/|static/|svelte/|page/static/)"
)
DRAIN = 8 << 20  # of a body that is too large, read so that the client can read the answer
GONE = 499  # nginx's word for a client that left before the answer
HEADERS = {
    "x-content-type-options": "nosniff",
    "x-frame-options": "SAMEORIGIN",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    # Gradio compiles the small functions of its events, which needs unsafe-eval; nothing is loaded from elsewhere.
    "content-security-policy": (
        "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
        "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self'; worker-src 'self' blob:; "
        "frame-ancestors 'self'; base-uri 'self'; form-action 'self'; object-src 'none'"
    ),
}


class Keys:
    """The key, and the session that the page gets for it. Comparisons take the same time for any guess."""

    def __init__(self, key: str | None) -> None:
        self._key = key.encode() if key else None
        # Derived, so that a restart with the same key keeps the page logged in, and the cookie is not the key.
        self.session = hmac.new(self._key, b"smolforge page session", hashlib.sha256).hexdigest() if self._key else ""

    @property
    def needed(self) -> bool:
        """Whether there is a key at all."""
        return self._key is not None

    def fits(self, given: bytes) -> bool:
        """Whether this is the key."""
        return self._key is None or hmac.compare_digest(given, self._key)

    def admits(self, headers: Headers) -> bool:
        """Whether the request shows the key or a session."""
        if self._key is None:
            return True
        scheme, _, given = headers.get("authorization", "").partition(" ")
        # Headers are bytes; starlette shows them as Latin-1.
        if scheme.lower() == "bearer" and self.fits(given.strip().encode("latin-1")):
            return True
        try:
            cookie = SimpleCookie(headers.get("cookie", "")).get(COOKIE)
        except CookieError:
            return False
        return cookie is not None and hmac.compare_digest(
            cookie.value.encode("utf-8", "replace"), self.session.encode()
        )


class SecurityMiddleware:
    """The head of a request.

    Args:
        methods: methods of each path of the API; a path that ends in "/" stands for all below it.
        metrics: where refusals are counted.
    """

    def __init__(
        self, app: ASGIApp, settings: ServeSettings, keys: Keys, methods: dict[str, set[str]], metrics: Metrics
    ) -> None:
        self.app, self.settings, self.keys, self.methods, self.metrics = app, settings, keys, methods, metrics
        self.headers = dict(HEADERS)
        if settings.frame_origins:
            # X-Frame-Options cannot name origins; browsers that know frame-ancestors do not read it.
            del self.headers["x-frame-options"]
            allowed = " ".join(("frame-ancestors 'self'", *settings.frame_origins))
            policy = self.headers["content-security-policy"]
            self.headers["content-security-policy"] = policy.replace("frame-ancestors 'self'", allowed)
        self.hosts: set[str] | None = None
        if settings.loopback and not keys.needed:
            # A name that a foreign page points at 127.0.0.1 must not open the door.
            self.hosts = {"localhost", "127.0.0.1", "::1", settings.host}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        head_only = scope["method"] == "HEAD"
        if head_only:
            scope = {**scope, "method": "GET"}

        async def secured(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in self.headers.items():
                    headers.setdefault(name, value)
            elif head_only and message["type"] == "http.response.body":
                message = {**message, "body": b""}
            await send(message)

        answer = self._check(scope)
        await (answer or self.app)(scope, receive, secured)

    def _check(self, scope: Scope) -> Response | None:
        """The refusal, or None for a request that may go on."""
        headers, path, method = Headers(scope=scope), scope["path"], scope["method"]
        try:
            self._check_host(headers)
            allowed = self._methods_of(path)
            if allowed is not None and method not in allowed:
                listed = ", ".join(sorted({*allowed, "OPTIONS"}))
                if method == "OPTIONS":
                    return Response(status_code=204, headers={"Allow": listed})
                raise ApiError(405, f"{path} does not take {method}; it takes {listed}", headers={"Allow": listed})
            if OPEN.match(path) is None and not self.keys.admits(headers):
                if path == "/" and method == "GET":
                    return RedirectResponse("/login", 303)
                what = "wrong API key" if headers.get("authorization") else "no API key"
                raise ApiError(
                    401,
                    f"{what}: send it as 'Authorization: Bearer KEY'",
                    code="invalid_api_key",
                    headers={"WWW-Authenticate": "Bearer"},
                )
            if allowed is None and (GRADIO.match(path) is None or not self.settings.page):
                raise ApiError(404, f"there is nothing at {path[:200]}", code="not_found")
        except ApiError as error:
            self.metrics.requests.labels(path if path in self.methods else "other", str(error.status)).inc()
            return error.response()
        return None

    def _check_host(self, headers: Headers) -> None:
        host = headers.get("host", "")
        if self.hosts is not None and _hostname(host) not in self.hosts:
            raise ApiError(403, "this server only answers under its own address; serve it with a key for others")
        origin = headers.get("origin")
        own = self.settings.cors_origins
        if origin is not None and urlsplit(origin).netloc != host and origin not in own and "*" not in own:
            raise ApiError(403, "requests from other web pages are not allowed; see --cors-origin")

    def _methods_of(self, path: str) -> set[str] | None:
        found = self.methods.get(path)
        if found is None:
            prefixes = (p for p in self.methods if p.endswith("/") and p != "/" and path.startswith(p))
            found = self.methods.get(next(prefixes, ""))
        return found


def _hostname(host: str) -> str | None:
    try:
        return urlsplit(f"//{host}").hostname
    except ValueError:
        return None


class BodyMiddleware:
    """The body of a request, its count, and its client's leaving.

    Args:
        label: the route that a path is counted under.
        ours: whether a path is ours; Gradio ends its own streams.
    """

    def __init__(
        self,
        app: ASGIApp,
        settings: ServeSettings,
        metrics: Metrics,
        stopping: asyncio.Event,
        label: Callable[[str], str],
        ours: Callable[[str], bool],
    ) -> None:
        self.app, self.settings, self.metrics, self.stopping = app, settings, metrics, stopping
        self.label, self.ours = label, ours

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, status = time.monotonic(), GONE

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        gone = asyncio.Event()
        try:
            try:
                body = await self._read(scope, receive)
            except ApiError as error:
                await error.response()(scope, receive, counted)
                return
            if body is not None:
                await self._run(scope, receive, counted, body, gone)
        finally:
            route = self.label(scope["path"])
            self.metrics.requests.labels(route, str(GONE if gone.is_set() else status)).inc()
            self.metrics.request_seconds.labels(route).observe(time.monotonic() - began)

    async def _read(self, scope: Scope, receive: Receive) -> bytes | None:
        """The whole body, or None from a client that left.

        Raises:
            ApiError: 413 too large, 408 too slow.
        """
        most = self.settings.max_body
        body, size = bytearray(), 0
        deadline = time.monotonic() + self.settings.body_seconds
        while True:
            try:
                message = await asyncio.wait_for(receive(), max(0.0, deadline - time.monotonic()))
            except asyncio.TimeoutError:
                raise ApiError(
                    408, f"the body did not arrive within {self.settings.body_seconds:g} seconds",
                    headers={"Connection": "close"},
                ) from None  # fmt: skip
            if message["type"] == "http.disconnect":
                return None
            chunk = message.get("body", b"")
            size += len(chunk)
            if size <= most:
                body += chunk
            more = message.get("more_body", False)
            if size > most and (not more or size > most + DRAIN):
                raise ApiError(
                    413, f"the body is larger than {most:,} bytes, the most this server takes",
                    code="body_too_large", headers={"Connection": "close"},
                )  # fmt: skip
            if not more:
                return bytes(body)

    async def _run(self, scope: Scope, receive: Receive, send: Send, body: bytes, gone: asyncio.Event) -> None:
        messages: Iterable[Message] = iter([{"type": "http.request", "body": body, "more_body": False}])
        ours = self.ours(scope["path"])
        left = asyncio.Event()

        async def replay() -> Message:
            for message in messages:
                return message
            await left.wait()
            return {"type": "http.disconnect"}

        async def watch() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            gone.set()

        route = asyncio.ensure_future(self.app(scope, replay, send))
        watching: list[asyncio.Future[Any]] = [asyncio.ensure_future(watch())]
        if not ours:  # Gradio's streams would outlive the server
            watching.append(asyncio.ensure_future(self.stopping.wait()))
        try:
            await asyncio.wait({route, *watching}, return_when=asyncio.FIRST_COMPLETED)
            answered = route.done()
            if not answered:
                left.set()
                if ours or self.stopping.is_set():
                    route.cancel()
                await asyncio.wait({route})
            else:
                gone.clear()
            if not route.cancelled():
                route.result()
        finally:
            for task in watching:
                task.cancel()
            if not route.done():
                route.cancel()
                await asyncio.wait({route})
