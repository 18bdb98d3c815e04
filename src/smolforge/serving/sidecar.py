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
    began, ended = time.time(), threading.Event()

    def locked() -> bool:
        """Whether the training of this process has locked the run: it writes the lock's file as it does so."""
        try:
            return run.checkpoints_path.is_dir() and run.lock_path.stat().st_mtime >= began - 1
        except OSError:
            return False

    def serve() -> None:
        while not locked():
            if ended.wait(LOOK_SECONDS):
                return
        process = subprocess.Popen([sys.executable, "-m", "smolforge", "serve", str(run.path), "--port", str(port)])
        ended.wait()
        process.terminate()  # it lets running requests finish
        try:
            process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    server = threading.Thread(target=serve, name="sidecar", daemon=True)
    server.start()
    try:
        yield
    finally:
        ended.set()
        server.join()
