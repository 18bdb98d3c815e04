"""Sending a generation: as one JSON object, or as server-sent events."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncIterator, Iterator
from typing import TYPE_CHECKING, Any

from starlette.responses import Response

from smolforge.errors import SmolforgeError
from smolforge.serving.errors import ApiError, of_smolforge

if TYPE_CHECKING:
    from starlette.types import Receive, Scope, Send

    from smolforge.serving.engine_thread import EngineThread
    from smolforge.serving.server_request import ServerRequest

log = logging.getLogger("smolforge.serving")
DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": waiting\n\n"
KEEP_ALIVE_SECONDS = 15.0
# What a route that can stream says of its answer in the OpenAPI document.
EITHER: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "One object, or with stream: true its pieces as server-sent events.",
        "content": {
            "application/json": {"schema": {"type": "object"}},
            "text/event-stream": {},  # OpenAPI 3.1 has no word for the form of one event
        },
    }
}


@contextlib.contextmanager
def cancel_on_exit(worker: EngineThread, generation: ServerRequest, seconds: float) -> Iterator[ServerRequest]:
    """A generation that is freed at the end of the block, however it ends, and ended after `seconds`."""

    def late() -> None:
        generation.fail(ApiError(504, f"the request took longer than {seconds:g} seconds", code="timeout"))

    timer = asyncio.get_running_loop().call_later(seconds, late)
    try:
        yield generation
    finally:
        timer.cancel()
        worker.cancel(generation)


def event(value: Any) -> bytes:
    """One server-sent event."""
    return b"data: " + json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode() + b"\n\n"


def as_api_error(error: Exception) -> ApiError:
    """What the client is told of `error`; the details of our own mistakes only go to the log."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, SmolforgeError):
        return of_smolforge(error, 400 if error.exit_code == 2 else 500)
    log.error("a request failed", exc_info=error)
    return ApiError(500, "the server made a mistake; its log says more")


class EventStream(Response):
    """Server-sent events from an iterator of ready-made bytes. An error becomes the last event.

    Args:
        events: the bytes.
        hold: entered while they are sent: frees what they are made from.

    Whoever disconnects is noticed by `guard.BodyMiddleware`, which cancels the task that runs this.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[bytes], hold: contextlib.AbstractContextManager[Any]) -> None:
        self.status_code = 200
        self.background = None
        self.events, self.hold = events, hold
        self.init_headers({"cache-control": "no-store", "x-accel-buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self.hold:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            try:
                async for data in with_keep_alive(self.events):
                    await send({"type": "http.response.body", "body": data, "more_body": True})
            except Exception as error:  # the headers are out: the error can only be the last event
                told = event(as_api_error(error).body())
                await send({"type": "http.response.body", "body": told, "more_body": True})
        await send({"type": "http.response.body", "body": b""})


async def with_keep_alive(events: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The same events, and a comment wherever nothing came for a while, so that proxies keep the line open."""
    iterator = events.__aiter__()
    pending: asyncio.Future[bytes] | None = None
    try:
        while True:
            pending = pending or asyncio.ensure_future(anext(iterator))
            done, _ = await asyncio.wait({pending}, timeout=KEEP_ALIVE_SECONDS)
            if not done:
                yield KEEP_ALIVE
                continue
            finished, pending = pending, None
            try:
                yield finished.result()
            except StopAsyncIteration:
                return
    finally:
        if pending is not None:
            pending.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await pending
        close = getattr(events, "aclose", None)
        if close is not None:
            await close()
