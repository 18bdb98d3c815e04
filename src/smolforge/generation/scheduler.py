"""Who runs in the next step: continuous batching, first come first served.

Every running choice that only waits for its next token gets one row in every step; beside them prompts are read
in chunks, as many as fit a fixed number of rows, so a long prompt never stalls the streams of others for long.
Choices join when there is a slot and memory for all they may write, and leave the moment they end.

Chunks are cut at fixed places of a prompt, whatever else runs: a runner whose arithmetic depends on the shape
of its input then still computes each prompt in the same way every time.
"""

from __future__ import annotations

import dataclasses
from collections import deque

from smolforge.generation.cache import Cache, Pool, common_prefix
from smolforge.generation.request import Choice, Request

CHUNK = 256  # tokens of a prompt in one piece
ROWS = 512  # rows of prompts in one step


@dataclasses.dataclass(frozen=True)
class Piece:
    """Consecutive tokens of one sequence to run: positions start .. start + len(tokens) - 1.

    Attributes:
        logits: how many of the last rows want logits (0 in the middle of a prompt).
        guessed: how many of the last tokens are guesses that the model is to judge.
    """

    cache: Cache
    tokens: list[int]
    start: int
    logits: int
    guessed: int = 0

    def guess(self, tokens: list[int]) -> Piece:
        """This piece, whose last row wants logits, with guesses of the tokens behind it."""
        count = len(tokens)
        return dataclasses.replace(self, tokens=self.tokens + tokens, logits=1 + count, guessed=count)


class Scheduler:
    """Queue, running choices and their memory.

    Args:
        pool: where caches come from.
        max_batch: most choices that run at once.
        reuse_prefixes: copy rows of finished caches; only where the runner's rows do not depend on their batch.
    """

    def __init__(self, pool: Pool, max_batch: int, *, reuse_prefixes: bool) -> None:
        self.pool, self.max_batch, self.reuse_prefixes = pool, max_batch, reuse_prefixes
        self.waiting: deque[Choice] = deque()
        self.running: list[Choice] = []

    def add(self, request: Request) -> None:
        """Queue all choices of a request."""
        self.waiting.extend(request.choices)

    def remove(self, choice: Choice) -> None:
        """Take a choice out, wherever it is, and free its memory at once."""
        if choice in self.running:
            self.running.remove(choice)
            tokens = choice.tokens[: choice.computed] if self.reuse_prefixes else ()
            self.pool.give_back(choice.cache, tokens)
            choice.cache = None
        elif choice in self.waiting:
            self.waiting.remove(choice)

    def plan(self) -> list[tuple[Choice, Piece]]:
        """Let choices in, and cut the pieces of the next step."""
        self._admit()
        pieces, prompts, rows = [], [], 0
        for choice in self.running:
            if choice.pending == 1:
                pieces.append((choice, _piece(choice)))
            else:
                prompts.append(choice)
        for choice in prompts:
            piece = _piece(choice)
            if rows and rows + len(piece.tokens) > ROWS:
                break
            rows += len(piece.tokens)
            pieces.append((choice, piece))
        return pieces

    def _admit(self) -> None:
        while self.waiting and len(self.running) < self.max_batch:
            choice = self.waiting[0]
            first = choice.request.choices[0]
            if first is not choice and first.finish_reason is None and first.computed < len(choice.request.prompt):
                return  # the prompt is being read for the first choice; its rows are copied then
            if not self.pool.has_room(choice.limit):
                return
            self.waiting.popleft()
            source, length = (None, 0) if choice.wants_prompt_logits else self._prefix(choice)
            choice.cache = self.pool.take(choice.limit)
            if source is not None:
                choice.cache.copy_prefix(source, length)
                choice.computed = length
            self.running.append(choice)

    def _prefix(self, choice: Choice) -> tuple[Cache | None, int]:
        """Rows that can be copied; the last token is always run, for its logits."""
        most = len(choice.tokens) - 1
        first = choice.request.choices[0]
        if first is not choice and first.cache is not None and first.computed >= most:
            return first.cache, most
        if not self.reuse_prefixes:
            return None, 0
        source, length = self.pool.prefix_of(choice.tokens)
        for other in self.running:
            shared = common_prefix(other.tokens[: other.computed], choice.tokens)
            if shared > length:
                source, length = other.cache, shared
        return source, min(length, most)


def _piece(choice: Choice) -> Piece:
    start = choice.computed
    end = min(len(choice.tokens), (start // CHUNK + 1) * CHUNK)
    tokens = choice.tokens[start:end]
    if choice.wants_prompt_logits and start < len(choice.request.prompt):
        logits = len(tokens)
    else:
        logits = 1 if end == len(choice.tokens) else 0
    return Piece(choice.cache, tokens, start, logits)
