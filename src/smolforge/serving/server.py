"""The process: binds the port, runs the app, and shuts down in order.

SIGTERM and SIGINT: stop accepting, let running requests finish for `drain_seconds`, end the others with an error that
says so, exit 0. A second signal ends the process at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from smolforge.errors import BadInput
from smolforge.logging import ROOT, show
from smolforge.serving.app import create_app
from smolforge.serving.errors import shutting_down
from smolforge.serving.settings import ServeSettings
from smolforge.serving.state import ServerState

logger = logging.getLogger(__name__)
HEAD_SECONDS = 20.0  # for the head of a request; a slower connection is closed
SWITCH_SECONDS = 0.0005  # how long the engine's thread may keep the interpreter while a request waits for it


class HeadTimeoutProtocol(H11Protocol):
    """h11 with a limit on how long the head of a request may take, which uvicorn does not have."""

    def connection_made(self, transport: Any) -> None:
        """Start the timer."""
        super().connection_made(transport)
        self._timer = self.loop.call_later(HEAD_SECONDS, self._late)

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the timer."""
        self._timer.cancel()
        super().connection_lost(exc)

    def _late(self) -> None:
        # A request that is being answered has limits of its own; only the time until its head is complete counts.
        if self.cycle is None or (self.cycle.response_complete and self.conn.trailing_data[0]):
            self.transport.close()
        else:
            self._timer = self.loop.call_later(HEAD_SECONDS, self._late)


class Server(uvicorn.Server):
    """uvicorn with a shutdown that drains, tells the other clients why their requests end, and exits 0."""

    state: ServerState

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """As in uvicorn, but the signal is not raised again at the end, so the process exits with 0."""
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: Any) -> None:
        """First signal: drain. Second: end at once."""
        self.force_exit, self.should_exit = self.should_exit, True

    async def on_tick(self, counter: int) -> bool:
        """As in uvicorn; also ends the server when the model cannot be loaded."""
        return await super().on_tick(counter) or self.state.failure is not None

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Drain, then abort, then what uvicorn does."""
        thread, seconds = self.state.thread, self.state.settings.drain_seconds
        thread.draining = True
        if thread.live:
            logger.info("shutting down: %d requests can finish within %g s", len(thread.live), seconds)
        aborting = asyncio.create_task(self._abort_later())
        try:
            await super().shutdown(sockets)
        finally:
            aborting.cancel()

    async def _abort_later(self) -> None:
        end = time.monotonic() + self.state.settings.drain_seconds
        while not self.force_exit and time.monotonic() < end:
            await asyncio.sleep(0.05)
        while True:  # requests whose body was still arriving can come in late
            self.state.thread.abort(shutting_down())
            await asyncio.sleep(0.1)


def bind(host: str, port: int) -> socket.socket:
    """A listening socket; BadInput where the port is in use or not permitted, or the address is not this machine's."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        both = family == socket.AF_INET6 and socket.has_dualstack_ipv6()  # :: answers IPv4 too
        listener = socket.create_server((host, port), family=family, backlog=1024, dualstack_ipv6=both)
    except OSError as error:
        taken = error.errno == errno.EADDRINUSE
        raise BadInput(
            f"port {port} of {host} is in use by another program" if taken else f"cannot use {host}:{port}: {error}",
            field="port" if taken else "host",
            hint="Stop it, or give another port with --port (0 takes a free one)." if taken else None,
        ) from None
    listener.setblocking(False)
    return listener


def serve(settings: ServeSettings) -> int:
    """Serve until a signal; returns the exit code. SmolforgeError where the port or the model cannot be used."""
    # Before torch is imported: OpenMP threads that spin while they wait starve everything else on a small machine.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    show()
    for handler in logging.getLogger(ROOT).handlers:
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    with bind(settings.host, settings.port) as listener:
        app = create_app(settings)
        sys.setswitchinterval(SWITCH_SECONDS)
        config = uvicorn.Config(
            app, http=HeadTimeoutProtocol, ws="none", lifespan="on", log_config=None, access_log=False,
            server_header=False, timeout_keep_alive=30, timeout_graceful_shutdown=int(settings.drain_seconds) + 10,
            proxy_headers=False, h11_max_incomplete_event_size=32 << 10,
        )  # fmt: skip
        server = Server(config)
        server.state = state = app.state.server
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        port = listener.getsockname()[1]
        print(f"smolforge serves {state.source.name} on http://{host}:{port}", file=sys.stderr, flush=True)
        if not settings.loopback and settings.api_key is None:
            logger.warning("%s is public and has no key: everyone who reaches it can use it", settings.host)
        server.run([listener])
    if state.failure is not None:
        raise state.failure
    return 0
