"""The process: binds the port, runs the app, ends in order.

SIGTERM and SIGINT: stop accepting, let what runs finish for `drain_seconds`, end the rest with an error that says
so, exit 0. A second signal ends at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
from collections.abc import Iterator
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from smolforge.errors import BadInput
from smolforge.serving.app import create_app
from smolforge.serving.errors import ApiError
from smolforge.serving.settings import ServeSettings
from smolforge.serving.state import Service

log = logging.getLogger("smolforge.serving")
HEAD_SECONDS = 20.0  # for the head of a request; a slower client is shut out
SWITCH_SECONDS = 0.0005  # how long the engine's thread may keep the interpreter while a request waits for it


class PatientProtocol(H11Protocol):
    """h11 with a limit on how long the head of a request may take, which uvicorn does not have."""

    def connection_made(self, transport: Any) -> None:
        """Start the clock with the connection."""
        super().connection_made(transport)
        self._clock = self.loop.call_later(HEAD_SECONDS, self._late)

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the clock."""
        self._clock.cancel()
        super().connection_lost(exc)

    def _late(self) -> None:
        # A request that is being answered has limits of its own; only the time until its head is whole counts here.
        first = self.cycle is None
        if first or (self.cycle.response_complete and self.conn.trailing_data[0]):
            self.transport.close()
        else:
            self._clock = self.loop.call_later(HEAD_SECONDS, self._late)


class Server(uvicorn.Server):
    """uvicorn with a shutdown that drains, says why it ends the rest, and exits 0."""

    service: Service
    signals = 0

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """As of uvicorn, but a signal is not raised again at the end: ending in order is success."""
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: Any) -> None:
        """First signal: drain. Second: end at once."""
        self.signals += 1
        self.should_exit = True
        if self.signals > 1:
            self.force_exit = True

    async def on_tick(self, counter: int) -> bool:
        """Also ends where the model cannot be loaded."""
        return await super().on_tick(counter) or self.service.failure is not None

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Drain, then abort, then what uvicorn does."""
        service = self.service
        service.worker.draining = True
        service.stopping.set()
        live = len(service.worker.live)
        if live:
            log.info("shutting down: %d requests may finish within %g s", live, service.settings.drain_seconds)
        ending = asyncio.create_task(self._abort_later())
        try:
            await super().shutdown(sockets)
        finally:
            ending.cancel()

    async def _abort_later(self) -> None:
        for _ in range(max(1, int(self.service.settings.drain_seconds * 20))):
            await asyncio.sleep(0.05)
            if self.force_exit:
                break
        while True:  # requests that were still sending their body may come in late
            self.service.worker.abort(ApiError(503, "the server is shutting down", code="shutting_down"))
            await asyncio.sleep(0.1)


def bind(host: str, port: int) -> socket.socket:
    """A listening socket.

    Raises:
        BadInput: the port is taken or may not be used, or the host is none of this machine.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        found = socket.socket(family, socket.SOCK_STREAM)
        try:
            found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            found.bind((host, port))
            found.listen(1024)
        except OSError:
            found.close()
            raise
    except OSError as error:
        taken = error.errno in (98, 48)  # EADDRINUSE on Linux and macOS
        raise BadInput(
            f"port {port} of {host} is in use by another program" if taken else f"cannot use {host}:{port}: {error}",
            field="port" if taken else "host",
            hint="Stop it, or give another port with --port (0 takes a free one).",
        ) from None
    found.setblocking(False)
    return found


def serve(settings: ServeSettings) -> int:
    """Serve until a signal; the exit code.

    Raises:
        SmolforgeError: the port or the model cannot be used.
    """
    # Before torch is imported: threads that spin while they wait starve everything else on a small machine.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr)
    for chatty in ("httpx", "httpcore", "asyncio", "uvicorn.error"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    listener = bind(settings.host, settings.port)
    with listener:
        app = create_app(settings)
        sys.setswitchinterval(SWITCH_SECONDS)
        config = uvicorn.Config(
            app, http=PatientProtocol, ws="none", lifespan="on", log_config=None, access_log=False, server_header=False,
            timeout_keep_alive=30, timeout_graceful_shutdown=int(settings.drain_seconds) + 10,
            proxy_headers=False, h11_max_incomplete_event_size=32 << 10,
        )  # fmt: skip
        server = Server(config)
        server.service = service = app.state.service
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        port = listener.getsockname()[1]
        print(f"smolforge serves {service.source.name} on http://{host}:{port}", file=sys.stderr, flush=True)
        if not settings.loopback and settings.api_key is None:
            log.warning("%s is public and has no key: everyone who reaches it can use it", settings.host)
        server.run([listener])
    if service.failure is not None:
        raise service.failure
    return 0
