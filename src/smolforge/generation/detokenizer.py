"""Tokens become text that may be shown: whole characters only, and never a part of a stop string.

Text that could still become a stop string is held back, and returned as soon as it cannot. So the parts joined are the
whole text before the stop string, or all of it where none came. Each token is decoded once, here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

LONGEST_CHARACTER = 4  # bytes in UTF-8; a token has at least one


class Decoder(Protocol):
    """Incremental decoder of tokens, as `Tokenizer.stream` returns it."""

    def push(self, token_id: int) -> str: ...

    def flush(self) -> str: ...


class Detokenizer:
    """The text of one sequence as it grows.

    Args:
        decoder: a fresh stream decoder.
        stops: strings that end the text.

    Attributes:
        stopped: a stop string was found; no more text comes.
        decoded: characters decoded so far, which is where the text of the next token begins.
    """

    def __init__(self, decoder: Decoder, stops: Sequence[str] = ()) -> None:
        self._decoder = decoder
        self._stops = tuple(stops)
        self._held = ""
        self.stopped = False
        self.decoded = 0

    def skip(self, prompt: Sequence[int]) -> None:
        """Begin after a prompt that is not shown; a character that it leaves unfinished continues."""
        for token_id in prompt[-LONGEST_CHARACTER:]:
            self._decoder.push(token_id)

    def push_prompt(self, token_id: int) -> str:
        """The text of a token of the prompt, in which stop strings have no effect."""
        return self._count(self._decoder.push(token_id))

    def push(self, token_id: int) -> str:
        """The text that may be shown after this token."""
        return self._release(self._count(self._decoder.push(token_id)))

    def flush(self) -> str:
        """The rest, at the end of the sequence."""
        text = self._release(self._count(self._decoder.flush()))
        rest, self._held = self._held, ""
        return text + rest

    def _count(self, text: str) -> str:
        self.decoded += len(text)
        return text

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
