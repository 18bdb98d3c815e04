"""What a request must pass before a route sees it: host, origin, API key, body limits; and the login of the page.

`SecurityMiddleware` checks the head of a request and sets security headers. `BodyMiddleware` reads the body within a
size and a time, counts the request, and cancels the route of a client that disconnected.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import html
import string
import time
from importlib import resources
from typing import TYPE_CHECKING
from urllib.parse import parse_qs, urlsplit

from fastapi import APIRouter, Request
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import HTTPConnection
from starlette.responses import HTMLResponse, RedirectResponse, Response

from smolforge.serving.errors import ApiError
from smolforge.serving.settings import ServeSettings

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from smolforge.serving.state import Metrics

COOKIE = "smolforge_session"
COOKIE_SECONDS = 30 * 86400
WRONG_KEY_SECONDS = 0.5  # slows guessing down; other requests are not delayed
OPEN_PATHS = ("/health", "/login")  # need no key, like the files below OPEN_FILES
OPEN_FILES = "/page/static/"
# Sent by the page. A script of another web page cannot send it without being asked for by CORS first.
OWN_HEADER = "x-requested-with"
DRAIN_BYTES = 8 << 20  # of a body that is too large, read so that the client can read the answer
CLIENT_GONE = 499  # nginx's status for a client that disconnected before the answer
HEADERS = {
    "x-content-type-options": "nosniff",
    "x-frame-options": "SAMEORIGIN",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    # A browser asks whether its copy is still right, so an update never mixes old and new files of the page.
    "cache-control": "no-cache",
    "content-security-policy": (
        "default-src 'self'; img-src 'self' data:; frame-ancestors 'self'; base-uri 'none'; form-action 'self'; "
        "object-src 'none'"
    ),
}


class Keys:
    """The API keys, and the session cookie that the page gets for each. Comparisons take constant time."""

    def __init__(self, *keys: str) -> None:
        self._keys = [key.encode() for key in keys]
        # Derived from the key: a restart with the same key keeps sessions, and the cookie does not reveal the key.
        self.sessions = [hmac.new(key, b"smolforge page session", hashlib.sha256).hexdigest() for key in self._keys]

    @property
    def needed(self) -> bool:
        """Whether a request needs a key."""
        return bool(self._keys)

    def find(self, given: bytes) -> int | None:
        """The number of the key that `given` is, or None."""
        return _position(given, self._keys)

    def of(self, request: HTTPConnection) -> int | None:
        """The number of the key that the request carries, itself or as the page's session; else None."""
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        # Headers are bytes; starlette decodes them as Latin-1.
        found = self.find(given.strip(" \t").encode("latin-1")) if scheme.lower() == "bearer" else None
        if found is None:
            session = request.cookies.get(COOKIE, "").encode("utf-8", "replace")
            found = _position(session, [session.encode() for session in self.sessions])
        return found

    def allows(self, request: HTTPConnection) -> bool:
        """Whether the request carries a key or a session, or needs none."""
        return not self.needed or self.of(request) is not None


def _position(given: bytes, known: list[bytes]) -> int | None:
    """Which of the `known` is `given`; all are compared, so the time does not tell which."""
    return max((i for i, one in enumerate(known) if hmac.compare_digest(given, one)), default=None)


class SecurityMiddleware:
    """Checks host, origin and key of a request, and sets the security headers of its response.

    Starlette's TrustedHostMiddleware is not used: it answers in plain text and misreads IPv6 hosts with a port.
    """

    def __init__(self, app: ASGIApp, settings: ServeSettings, keys: Keys, metrics: Metrics) -> None:
        self.app, self.settings, self.keys, self.metrics = app, settings, keys, metrics
        self.hosts: set[str] | None = None
        if settings.loopback and not keys.needed:
            # Against DNS rebinding: a foreign name that points at 127.0.0.1.
            self.hosts = {"localhost", "127.0.0.1", "::1", settings.host}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        root, path = scope.get("root_path", ""), scope["path"]
        if path != root and not path.startswith(f"{root}/"):
            scope = {**scope, "path": root + path}  # a reverse proxy took the prefix off; routes expect it
        head_only = scope["method"] == "HEAD"
        if head_only:  # answered as a GET without its body
            scope = {**scope, "method": "GET"}

        async def secured(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
            elif head_only and message["type"] == "http.response.body":
                message = {**message, "body": b""}
            await send(message)

        try:
            self._check_origin(scope)
            answer = self._check_key(scope)
        except ApiError as error:
            self.metrics.requests.labels("refused", str(error.status)).inc()
            answer = error.response()
        await (answer or self.app)(scope, receive, secured)

    def _check_origin(self, scope: Scope) -> None:
        """Refuse foreign host names and web pages. Behind a reverse proxy `host` can be another than the browser's."""
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        if self.hosts is not None and _hostname(host) not in self.hosts:
            raise ApiError(403, "this server only answers under its own address; serve it with a key for others")
        origin, allowed = headers.get("origin"), self.settings.cors_origins
        if origin is None or origin.partition("://")[2] == host or origin in allowed or "*" in allowed:
            return
        harmless = _path(scope) == "/login" or _path(scope).startswith(OPEN_FILES)  # Chrome names an origin for modules
        if not harmless and headers.get("sec-fetch-site") != "same-origin" and OWN_HEADER not in headers:
            raise ApiError(403, "requests from other web pages are not allowed; see --cors-origin")

    def _check_key(self, scope: Scope) -> Response | None:
        """None for a request that is allowed; a redirect to the login for a visitor of the page."""
        request, path = HTTPConnection(scope), _path(scope)
        if not path:  # the prefix of a reverse proxy; the page's addresses are relative to what lies below it
            return RedirectResponse(scope["path"] + "/", 307)
        if path in OPEN_PATHS or path.startswith(OPEN_FILES) or self.keys.allows(request):
            return None
        if path == "/" and scope["method"] == "GET":
            return RedirectResponse("login", 303)
        problem = "wrong API key" if request.headers.get("authorization") else "no API key"
        text = f"{problem}: send it as 'Authorization: Bearer KEY'"
        raise ApiError(401, text, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})


def _path(scope: Scope) -> str:
    """The path without the prefix of a reverse proxy."""
    return scope["path"].removeprefix(scope.get("root_path", ""))


def _hostname(host: str) -> str | None:
    try:
        return urlsplit(f"//{host}").hostname
    except ValueError:
        return None


class BodyMiddleware:
    """Reads the body within its limits, counts the request, and cancels the route of a client that disconnected."""

    def __init__(self, app: ASGIApp, settings: ServeSettings, metrics: Metrics) -> None:
        self.app, self.settings, self.metrics = app, settings, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, status, whole = time.monotonic(), CLIENT_GONE, False

        async def counted(message: Message) -> None:
            nonlocal status, whole
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)
            # From here on the server says that the client is gone, while a route may still close its file.
            whole = message["type"] == "http.response.body" and not message.get("more_body")

        try:
            try:
                body = await self._read(receive)
            except ApiError as error:
                await error.response()(scope, receive, counted)
                return
            if body is None or not (await self._run(scope, receive, counted, body) or whole):
                status = CLIENT_GONE
        finally:
            route = getattr(scope.get("route"), "path", "other")
            self.metrics.requests.labels(route, str(status)).inc()
            self.metrics.request_seconds.labels(route).observe(time.monotonic() - began)

    async def _read(self, receive: Receive) -> bytes | None:
        """The whole body, or None from a client that disconnected; ApiError 413 too large, 408 too slow."""
        limit, seconds, close = self.settings.max_body, self.settings.body_seconds, {"Connection": "close"}
        body, size, deadline = bytearray(), 0, time.monotonic() + seconds
        while True:
            try:
                message = await asyncio.wait_for(receive(), max(0.0, deadline - time.monotonic()))
            except asyncio.TimeoutError:
                raise ApiError(408, f"the body did not arrive within {seconds:g} seconds", headers=close) from None
            if message["type"] == "http.disconnect":
                return None
            chunk, more = message.get("body", b""), message.get("more_body", False)
            size += len(chunk)
            if size <= limit:
                body += chunk
            if size > limit and (not more or size > limit + DRAIN_BYTES):
                text = f"the body is larger than {limit:,} bytes, the most this server takes"
                raise ApiError(413, text, code="body_too_large", headers=close)
            if not more:
                return bytes(body)

    async def _run(self, scope: Scope, receive: Receive, send: Send, body: bytes) -> bool:
        """Run the route; False where the client disconnected first."""
        messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            return messages.pop() if messages else await asyncio.get_running_loop().create_future()

        async def disconnected() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass

        route = asyncio.ensure_future(self.app(scope, replay, send))
        gone = asyncio.ensure_future(disconnected())
        try:
            await asyncio.wait({route, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not route.done():
                return False
            route.result()
            return True
        finally:
            gone.cancel()
            if not route.done():
                route.cancel()
                await asyncio.wait({route})


def login_router(name: str, keys: Keys) -> APIRouter:
    """The routes of the login: the page exchanges the key for a session cookie. The form needs no script."""
    routes = APIRouter(include_in_schema=False)
    page = string.Template((resources.files("smolforge.serving") / "page" / "login.html").read_text(encoding="utf-8"))

    def form(problem: str, status: int) -> Response:
        text = page.substitute(name=html.escape(name), problem=html.escape(problem))
        return HTMLResponse(text, status, headers={"cache-control": "no-store"})

    @routes.get("/login")
    async def show() -> Response:
        return form("", 200) if keys.needed else RedirectResponse("./", 303)

    @routes.post("/login")
    async def enter(request: Request) -> Response:
        given = parse_qs((await request.body()).decode("utf-8", "replace")).get("key", [""])[0]
        number = keys.find(given.encode("utf-8", "replace"))
        if keys.needed and number is None:
            await asyncio.sleep(WRONG_KEY_SECONDS)
            return form("That is not the key.", 401)
        answer = RedirectResponse("./", 303)
        if number is not None:
            secure = request.url.scheme == "https"
            answer.set_cookie(
                COOKIE, keys.sessions[number], COOKIE_SECONDS, httponly=True, samesite="lax", secure=secure
            )
        return answer

    return routes
