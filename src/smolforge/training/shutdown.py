"""Graceful shutdown: signals and a time limit, polled between pieces of work.

The first SIGTERM, SIGINT or SIGUSR1 sets a flag; the run saves and ends at the next poll. A second one ends the process
at once: the previous checkpoint stays complete, because saving never touches it. Under a launcher a second signal
counts only after three seconds.
"""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import sys
import threading
import time
from types import FrameType

logger = logging.getLogger(__name__)

# A launcher passes a signal on that a scheduler has sent to each process already: that is still the first one.
REPEATED_SECONDS = 3.0
PR_SET_PDEATHSIG = 1  # of Linux's prctl
EXIT_CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}
if hasattr(signal, "SIGUSR1"):  # Schedulers send it as a warning that SIGTERM will follow; Windows has none.
    EXIT_CODES[signal.SIGUSR1] = 143


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
        self._first = 0.0  # when the first signal came
        self._previous: dict[int, object] = {}

    def __enter__(self) -> GracefulShutdown:
        if threading.current_thread() is threading.main_thread():
            for number in EXIT_CODES:
                self._previous[number] = signal.signal(number, self._on_signal)
            if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
                # torchrun dies of SIGUSR1, among others: its workers then save and end, instead of training on.
                ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def requested(self, margin: float = 0.0) -> bool:
        """Whether to save and stop now; the time limit counts as reached `margin` seconds earlier."""
        if not self.exit_code and self.deadline is not None and time.monotonic() + margin >= self.deadline:
            self.exit_code, self.reason = 143, "the time limit is near"
        return bool(self.exit_code)

    def follow(self) -> None:
        """Stop because another process of the run was asked to."""
        if not self.exit_code:
            self.exit_code, self.reason = 143, "another process was asked to stop"

    def poll(self) -> None:
        """Raise StopRequested if a stop was requested."""
        if self.requested():
            raise StopRequested

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        received = signal.Signals(number)
        if self.signal and "WORLD_SIZE" in os.environ and time.monotonic() - self._first < REPEATED_SECONDS:
            return
        if self.exit_code:
            os._exit(EXIT_CODES[received])
        self._first = time.monotonic()
        self.signal, self.exit_code, self.reason = received, EXIT_CODES[received], f"{received.name} received"
        if self.immediate:
            raise StopRequested
        logger.info(f"{self.reason}: saving, then stopping. A second signal stops at once.")
