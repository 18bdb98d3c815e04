"""Messages for people: Python's logging under the name `smolforge`, shown on stderr.

A module says what it decided with `logger = logging.getLogger(__name__)` and `logger.info(...)`. As a library smolforge
shows nothing unless its user configures logging; the command line calls `show`. Progress bars use the same `console`,
so a message scrolls above a live line instead of through it.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Iterator
from typing import Any

ROOT = "smolforge"


@functools.cache
def console() -> Any:
    """The rich console of stderr, shared by messages and progress bars."""
    from rich.console import Console

    # In a notebook rich would make a cell's output of every line, instead of text that is selected as one.
    return Console(stderr=True, highlight=False, soft_wrap=True, force_jupyter=False)


class _ConsoleHandler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        try:
            console().print(self.format(record), markup=False)
        except Exception:  # logging's own rule: a message that cannot be shown never stops the program
            self.handleError(record)


def show(level: int = logging.INFO) -> None:
    """Show smolforge's messages of `level` and above on stderr; a second call changes the level."""
    logger = logging.getLogger(ROOT)
    if not any(isinstance(handler, _ConsoleHandler) for handler in logger.handlers):
        logger.addHandler(_ConsoleHandler())
    logger.setLevel(level)


@contextlib.contextmanager
def quiet(level: int, name: str = ROOT) -> Iterator[None]:
    """Only messages of `level` and above from the logger `name`, for a while."""
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(level)
    try:
        yield
    finally:
        logger.setLevel(before)
