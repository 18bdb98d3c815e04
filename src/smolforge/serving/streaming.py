"""From steps of the engine to an answer: the transcript of one choice, and server-sent events."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, Iterator
from typing import TYPE_CHECKING, Any

from starlette.responses import Response

from smolforge.serving.errors import ApiError, as_api_error

if TYPE_CHECKING:
    from starlette.types import Receive, Scope, Send

    from smolforge.generation.sequence import StepOutput
    from smolforge.serving.engine_thread import EngineThread, ServerRequest

DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": waiting\n\n"
KEEP_ALIVE_SECONDS = 15.0
# Many clients split events into lines with Unicode's line breaks, which JSON leaves as they are.
LINE_BREAKS = {0x85: "\\u0085", 0x2028: "\\u2028", 0x2029: "\\u2029"}


@contextlib.contextmanager
def cancel_on_exit(thread: EngineThread, request: ServerRequest, seconds: float) -> Iterator[ServerRequest]:
    """Free `request` at the end of the block, however it ends, and fail it with a 504 after `seconds`."""

    def late() -> None:
        request.fail(ApiError(504, f"the request took longer than {seconds:g} seconds", code="timeout"))

    timer = asyncio.get_running_loop().call_later(seconds, late)
    try:
        yield request
    finally:
        timer.cancel()
        thread.cancel(request)


class Transcript:
    """The text of one choice so far, and the steps whose tokens can be reported.

    Text can lag behind tokens (half characters, possible stop strings). A token is reported with the first text of
    it; a token that only belongs to a stop string, or ends the text, is never reported.
    """

    def __init__(self) -> None:
        self.text = ""
        self.reported: list[StepOutput] = []
        self.finish_reason: str | None = None
        self._pending: list[StepOutput] = []

    def push(self, step: StepOutput) -> list[StepOutput]:
        """Take a step; returns the steps whose tokens can be reported now."""
        if step.token_id is not None:
            self._pending.append(step)
        self.text += step.text
        self.finish_reason = step.finish_reason
        if step.finish_reason == "length":
            ready, self._pending = self._pending, []
        else:
            ready = [one for one in self._pending if one.text_offset < len(self.text)]
            self._pending = self._pending[len(ready) :] if step.finish_reason is None else []
        self.reported += ready
        return ready


def event(value: Any) -> bytes:
    """One server-sent event with `value` as JSON."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    if not text.isascii():
        text = text.translate(LINE_BREAKS)
    return b"data: " + text.encode() + b"\n\n"


class EventStream(Response):
    """A response of server-sent events, sent while `resources` is entered. An error becomes the last event.

    `BodyMiddleware` notices a client that disconnects and cancels the task that sends the events.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes, None], resources: contextlib.AbstractContextManager[Any]) -> None:
        self.status_code = 200
        self.background = None
        self.events, self.resources = events, resources
        self.init_headers({"cache-control": "no-store", "x-accel-buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self.resources:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            keeping = asyncio.create_task(self._keep_alive(send))
            try:
                async with contextlib.aclosing(self.events):
                    async for data in self.events:
                        self._quiet = False
                        await send({"type": "http.response.body", "body": data, "more_body": True})
            except Exception as error:  # the status has been sent, so the error becomes an event
                data = event(as_api_error(error).body())
                await send({"type": "http.response.body", "body": data, "more_body": True})
            finally:
                keeping.cancel()
        await send({"type": "http.response.body", "body": b""})

    async def _keep_alive(self, send: Send) -> None:
        """Send a comment after each `KEEP_ALIVE_SECONDS` without an event, so that proxies keep the connection."""
        while True:
            self._quiet = True
            await asyncio.sleep(KEEP_ALIVE_SECONDS)
            if self._quiet:
                await send({"type": "http.response.body", "body": KEEP_ALIVE, "more_body": True})
