"""The lock of a run's directory: a second process cannot write the same run."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import socket
import time
from types import TracebackType

from smolforge.errors import RunLocked
from smolforge.run import Run

logger = logging.getLogger(__name__)


class RunLock:
    """Keeps a second process from writing a run. A context manager.

    Uses `flock` on RUN/lock: the kernel releases it when the holder ends, however it ends, so no lock is ever stale.
    The file stays, since removing it would let two processes lock two files of one name. On a network filesystem the
    lock may hold on one machine only; where locking is not supported at all a warning says so and the run continues.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self._descriptor = -1

    @property
    def held(self) -> bool:
        """Whether this object has the run (or the filesystem cannot lock)."""
        return self._descriptor >= 0

    def acquire(self) -> RunLock:
        """Take the run.

        Raises:
            RunLocked: another process has it; its pid and host are named.
        """
        import fcntl

        self.run.lock_path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.run.lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(descriptor, 4096, 0).decode(errors="replace").strip() or "another process"
            os.close(descriptor)
            raise RunLocked(
                f"{self.run.path} is being written by {holder}",
                field="out",
                hint="Wait for it, stop it, or give another directory with --out.",
            ) from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                os.close(descriptor)
                raise
            logger.warning(f"{self.run.path}: this filesystem has no locks; do not start the run twice")
        self._descriptor = descriptor
        started = time.strftime("%Y-%m-%d %H:%M:%S")
        holder = f"process {os.getpid()} on {socket.gethostname()} since {started}\n"
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, holder.encode(), 0)
        return self

    def release(self) -> None:
        """Let the run go; a second call does nothing."""
        if self.held:
            import fcntl

            # Unlocked by name, not only closed: a forked child may still have a copy of the descriptor.
            with contextlib.suppress(OSError):
                fcntl.flock(self._descriptor, fcntl.LOCK_UN)
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> RunLock:
        return self if self.held else self.acquire()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()
