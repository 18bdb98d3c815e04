"""Graceful shutdown: signals and a time limit, polled between pieces of work.

The first SIGTERM, SIGINT or SIGUSR1 sets a flag; the run saves and ends at the next poll. A second one ends the process
at once: the previous checkpoint stays complete, because saving never touches it.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from types import FrameType

logger = logging.getLogger(__name__)

# Schedulers send SIGUSR1 as a warning that SIGTERM will follow, hence the same exit code.
EXIT_CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGUSR1: 143}


class StopRequested(BaseException):
    """Ends longer work so that the run can save and end.

    Like KeyboardInterrupt this is not an Exception: it comes out of a signal handler, in the middle of any code, and no
    `except Exception` there may take it for an error of that code.
    """


class GracefulShutdown:
    """Whether the run was asked to stop; a context manager that installs the signal handlers.

    Outside the main thread Python allows no signal handlers; there only the time limit (in seconds) applies.

    Attributes:
        exit_code: 130 or 143 once a stop was requested, else 0.
        immediate: whether a signal raises `StopRequested` where the program is. True at the beginning, while sources
            are opened and nothing can be lost.
    """

    def __init__(self, time_limit: float | None = None) -> None:
        self.deadline = None if time_limit is None else time.monotonic() + time_limit
        self.exit_code, self.reason, self.immediate = 0, "", True
        self.signal: signal.Signals | None = None
        self._previous: dict[int, object] = {}

    def __enter__(self) -> GracefulShutdown:
        if threading.current_thread() is threading.main_thread():
            for number in EXIT_CODES:
                self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def requested(self, margin: float = 0.0) -> bool:
        """Whether to save and stop now; the time limit counts as reached `margin` seconds earlier."""
        if not self.exit_code and self.deadline is not None and time.monotonic() + margin >= self.deadline:
            self.exit_code, self.reason = 143, "the time limit is near"
        return bool(self.exit_code)

    def poll(self) -> None:
        """Raise StopRequested if a stop was requested."""
        if self.requested():
            raise StopRequested

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        received = signal.Signals(number)
        if self.exit_code:
            os._exit(EXIT_CODES[received])
        self.signal, self.exit_code, self.reason = received, EXIT_CODES[received], f"{received.name} received"
        if self.immediate:
            raise StopRequested
        logger.info(f"{self.reason}: saving, then stopping. A second signal stops at once.")
