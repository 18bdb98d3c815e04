"""A server next to a training, in a process of its own: `smolforge train --serve`."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

from smolforge.errors import BadInput
from smolforge.run import Run

LOOK_SECONDS = 0.2
END_SECONDS = 30.0


@contextlib.contextmanager
def sidecar(run: Run, port: int) -> Iterator[None]:
    """Serve `run` on 127.0.0.1 for as long as the block lasts.

    The server starts when the training has locked the run, answers 503 until the first checkpoint exists, and then
    follows the newest one. Its key comes from SMOLFORGE_API_KEY.

    Raises:
        BadInput: `port` is not a port, or it is in use.
    """
    if not 0 < port <= 65535:
        raise BadInput(f"{port} is not a port", field="--serve", hint="Ports go from 1 to 65535.")
    try:
        socket.create_server(("127.0.0.1", port)).close()  # an error now, not after the training has begun
    except OSError as error:
        raise BadInput(f"cannot use port {port}: {error.strerror}", field="--serve", hint="Give another.") from None
    server = _Sidecar(run, port)
    server.start()
    try:
        yield
    finally:
        server.end()


class _Sidecar(threading.Thread):
    def __init__(self, run: Run, port: int) -> None:
        super().__init__(name="sidecar", daemon=True)
        self.run_to_serve, self.port = run, port
        self._began = time.time()
        self._ended = threading.Event()

    def run(self) -> None:
        while not self._locked():
            if self._ended.wait(LOOK_SECONDS):
                return
        command = [sys.executable, "-m", "smolforge", "serve", str(self.run_to_serve.path), "--port", str(self.port)]
        process = subprocess.Popen(command)
        self._ended.wait()
        process.terminate()
        try:
            process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def end(self) -> None:
        """Let running requests finish, and end the server."""
        self._ended.set()
        self.join()

    def _locked(self) -> bool:
        """Whether the training of this process has locked the run: it writes the lock's file as it does so."""
        try:
            return (
                self.run_to_serve.checkpoints_path.is_dir()
                and self.run_to_serve.lock_path.stat().st_mtime >= self._began - 1
            )
        except OSError:
            return False
