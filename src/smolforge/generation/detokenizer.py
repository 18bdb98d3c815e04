"""Tokens become text that may be shown: whole characters only, and never a part of a stop string.

What could still turn out to be the beginning of a stop string is held back, and given out as soon as it
cannot; so the pieces joined are the whole text before the stop string, or all of it where none came.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class Decoder(Protocol):
    """What `smolforge.tokenizer` gives for a stream."""

    def push(self, token_id: int) -> str: ...

    def flush(self) -> str: ...


class TextStream:
    """The text of one continuation as it grows.

    Attributes:
        stopped: a stop string was met; nothing comes out any more.
    """

    def __init__(self, decoder: Decoder, stops: Sequence[str] = ()) -> None:
        self._decoder = decoder
        self._stops = tuple(stops)
        self._held = ""
        self.stopped = False

    def push(self, token_id: int) -> str:
        """The text that may be shown now that this token came."""
        return self._release(self._decoder.push(token_id))

    def flush(self) -> str:
        """The rest, at the end of the continuation."""
        text = self._release(self._decoder.flush())
        rest, self._held = self._held, ""
        return text + rest

    def _release(self, text: str) -> str:
        if self.stopped:
            return ""
        self._held += text
        found = [at for at in (self._held.find(stop) for stop in self._stops) if at >= 0]
        if found:
            shown, self._held, self.stopped = self._held[: min(found)], "", True
            return shown
        border = len(self._held) - self._open_prefix()
        shown, self._held = self._held[:border], self._held[border:]
        return shown

    def _open_prefix(self) -> int:
        """Length of the longest end of the held text that begins a stop string."""
        longest = 0
        for stop in self._stops:
            for size in range(min(len(stop) - 1, len(self._held)), longest, -1):
                if self._held.endswith(stop[:size]):
                    longest = size
                    break
        return longest
