"""Being asked to stop: signals and a time limit, polled between pieces of work.

The first SIGTERM, SIGINT or SIGUSR1 only raises a flag; the run saves and leaves at the next poll. A second one leaves
at once: the previous checkpoint is whole, for a commit never touches it.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from types import FrameType, TracebackType

# SIGUSR1 is a scheduler's warning that SIGTERM will follow: the same exit code tells it the state was saved.
EXIT_CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGUSR1: 143}


class StopRequested(Exception):
    """Raised by a poll inside longer work, so that the loop can save and leave."""


class GracefulShutdown:
    """The flag, as a context in which the handlers are installed.

    Args:
        time_limit: seconds after which the run should stop by itself, None for never.
        say: told once when a stop is requested.
    """

    def __init__(self, time_limit: float | None = None, say: Callable[[str], None] = lambda text: None) -> None:
        self.deadline = None if time_limit is None else time.monotonic() + time_limit
        self.exit_code = 0
        self.reason = ""
        self.eager = True
        """While nothing can be lost (sources are being opened), a signal ends the work where it stands."""
        self._say = say
        self._before: dict[int, object] = {}

    def __enter__(self) -> GracefulShutdown:
        for number in EXIT_CODES:
            self._before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def requested(self, margin: float = 0.0) -> bool:
        """Whether to save and leave now.

        Args:
            margin: seconds that saving needs; the time limit counts as reached that much earlier.
        """
        if not self.exit_code and self.deadline is not None and time.monotonic() + margin >= self.deadline:
            self.exit_code, self.reason = 143, "the time limit is near"
        return bool(self.exit_code)

    def poll(self) -> None:
        """Raise StopRequested if asked to stop; for evaluation and waiting."""
        if self.requested():
            raise StopRequested

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.exit_code:
            os._exit(EXIT_CODES[signal.Signals(number)])
        self.exit_code = EXIT_CODES[signal.Signals(number)]
        self.reason = f"{signal.Signals(number).name} received"
        if self.eager:
            raise StopRequested
        self._say(f"{self.reason}: saving, then leaving. A second one leaves at once.")
