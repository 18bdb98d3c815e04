"""Continuous batching: which sequences run in the next step, first come first served.

Every running sequence that only needs its next token gets one row in every step; next to them prompts are read in
chunks, as many as fit a fixed number of rows, so a long prompt never delays the other streams for long. Sequences join
when there is a slot and memory for their prompt, and leave as soon as they end. Memory is counted as texts grow; where
none is left, the youngest sequence waits again, and its text is read like a prompt once there is room. So the oldest
always continues, and what is written stays the same.

Chunks are cut at fixed places of a prompt, whatever else runs: a runner whose arithmetic depends on the shape of its
input then still computes each prompt in the same way every time.
"""

from __future__ import annotations

from collections import deque

from smolforge.generation.kv_cache import CachePool, KVCache, common_prefix
from smolforge.generation.sequence import Request, ScheduledChunk, Sequence, Work

CHUNK = 256  # maximum number of a prompt's tokens in one chunk
ROWS = 512  # maximum number of rows of prompts in one step
GROWTH = 64  # positions for which memory is counted ahead of a text
HEADROOM = 256  # positions that must be free for each running sequence before another one joins
MOST_DRAFTED = 8  # maximum number of drafted tokens in one step, which are in the cache before they are accepted


class Scheduler:
    """Queue, running sequences (at most `max_batch`) and their memory.

    `reuse_prefixes` copies positions of finished caches; only where the runner's rows do not depend on their batch.
    """

    def __init__(self, pool: CachePool, max_batch: int, *, reuse_prefixes: bool) -> None:
        self.pool, self.max_batch, self.reuse_prefixes = pool, max_batch, reuse_prefixes
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []

    def add(self, request: Request) -> None:
        """Queue all sequences of a request."""
        self.waiting.extend(request.sequences)

    def remove(self, sequence: Sequence) -> None:
        """Remove a sequence, wherever it is, and free its memory at once."""
        if sequence in self.running:
            self.running.remove(sequence)
            tokens = sequence.tokens[: sequence.computed] if self.reuse_prefixes else ()
            self.pool.free(sequence.cache, tokens)
            sequence.cache = None
        elif sequence in self.waiting:
            self.waiting.remove(sequence)

    def schedule(self) -> Work:
        """Admit sequences, and cut the chunks of the next step."""
        for sequence in list(self.running):
            while sequence.cache is not None and not self._grow(sequence):
                self._pause(self.running[-1])
        self._admit()
        work, prompts, rows = [], [], 0
        for sequence in self.running:
            if sequence.pending == 1:
                work.append((sequence, self._next_chunk(sequence)))
            else:
                prompts.append(sequence)
        for sequence in prompts:
            chunk = self._next_chunk(sequence)
            if rows and rows + len(chunk.tokens) > ROWS:
                break
            rows += len(chunk.tokens)
            work.append((sequence, chunk))
        return work

    def _admit(self) -> None:
        while self.waiting and len(self.running) < self.max_batch:
            sequence = self.waiting[0]
            first = sequence.request.sequences[0]
            unread = first.finish_reason is None and first.computed < len(sequence.request.prompt)
            if first is not sequence and not sequence.written and unread:
                return  # the prompt is being read for the first sequence; its positions are copied then
            wanted = min(len(sequence.tokens) + GROWTH, sequence.limit)
            if not self.pool.has_room(wanted + sum(min(HEADROOM, s.limit - s.counted) for s in self.running)):
                return
            self.waiting.popleft()
            source, length = (None, 0) if sequence.wants_prompt_logits else self._prefix(sequence)
            sequence.cache, sequence.counted = self.pool.allocate(sequence.limit, wanted), wanted
            if source is not None:
                sequence.cache.copy_prefix(source, length)
                sequence.computed = length
            self.running.append(sequence)

    def _prefix(self, sequence: Sequence) -> tuple[KVCache | None, int]:
        """Positions that can be copied; the last token always runs, for its logits."""
        most = len(sequence.tokens) - 1
        first = sequence.request.sequences[0]
        if first is not sequence and not sequence.written and first.cache is not None and first.computed >= most:
            return first.cache, most
        if not self.reuse_prefixes:
            return None, 0
        running = [(other.tokens[: other.computed], other.cache) for other in self.running]
        found = [(common_prefix(tokens, sequence.tokens), cache) for tokens, cache in (*self.pool.old, *running)]
        length, source = max(found, key=lambda one: one[0], default=(0, None))
        return source, min(length, most)

    def _grow(self, sequence: Sequence) -> bool:
        """Count the memory of the tokens that may follow; False where there is none."""
        if sequence.counted >= min(len(sequence.tokens) + MOST_DRAFTED, sequence.limit):
            return True
        wanted = min(len(sequence.tokens) + GROWTH, sequence.limit)
        if not self.pool.grow(sequence.cache, wanted):
            return False
        sequence.counted = wanted
        return True

    def _pause(self, sequence: Sequence) -> None:
        """Free the memory of a running sequence, which is read again when it is admitted again."""
        self.running.remove(sequence)
        self.pool.free(sequence.cache, ())
        sequence.cache, sequence.computed = None, 0
        self.waiting.appendleft(sequence)

    def _next_chunk(self, sequence: Sequence) -> ScheduledChunk:
        start, prompt = sequence.computed, len(sequence.request.prompt)
        end = min(len(sequence.tokens), (start // CHUNK + 1) * CHUNK)
        if not self.reuse_prefixes:  # what is read again must be computed as it was when it was written
            end = min(end, max(prompt, start + 1))
        tokens = sequence.tokens[start:end]
        if sequence.wants_prompt_logits and start < prompt:
            logits = len(tokens)
        else:
            logits = 1 if end == len(sequence.tokens) else 0
        return ScheduledChunk(sequence.cache, tokens, start, logits)
