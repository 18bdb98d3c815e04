"""A small model that drafts what a large one will write (Leviathan et al. 2022; Chen et al. 2023).

It draws from its own logits with the sampler's own arithmetic and the uniform number of that very position. So where
the two models predict the same distribution, they draw the same token, at any temperature. The text stays that of the
large model, token for token. The price: where the distributions are flat, a small difference moves the draw to a
neighbour, so fewer drafts are accepted than by the papers' acceptance by chance, which would change the text.

The caches of a model and of its draft are allocated, copied, kept and freed together: the pool and the scheduler see
one runner, `PairedRunner`, and need not know of drafts.
"""

from __future__ import annotations

import collections.abc
import math
import time

from torch import Tensor

from smolforge.errors import RunFailed
from smolforge.generation.kv_cache import KVCache, common_prefix
from smolforge.generation.runners import Runner
from smolforge.generation.scheduler import CHUNK, ROWS
from smolforge.generation.sequence import ScheduledChunk, Sequence

TIMED_TOKENS = 2  # of the chunks of a step that is timed: the last token, and the draft before it that did not run


class DraftModel:
    """Drafts for all sequences of a step together. The sequences' caches are `PairedCache`s.

    `bytes_ratio` is the bytes of its weights over those of the model.
    """

    def __init__(self, runner: Runner, bytes_ratio: float) -> None:
        self.runner, self.bytes_ratio = runner, bytes_ratio
        self.context = runner.config.max_position_embeddings
        self.timings: list[tuple[int, float]] = []  # (rows, seconds) of the last steps that only decoded

    def room(self, sequence: Sequence) -> int:
        """Maximum number of drafts in the draft model's context; below 0 where the text itself does not fit."""
        return self.context - len(sequence.tokens) + 1 if len(sequence.tokens) <= self.context else -1

    def propose(self, asked: list[tuple[Sequence, int]]) -> dict[Sequence, list[int]]:
        """Read on in each text, and draft its next tokens where it has been read to its end.

        Args:
            asked: sequences with the maximum number of drafts of each; 0 only reads.

        Raises:
            RunFailed: the logits are NaN.
        """
        chunks, drawing = self._read(asked)
        drafts: dict[Sequence, list[int]] = {sequence: [] for sequence, _ in drawing}
        samplers = {sequence: sequence.sampler.fork() for sequence, _ in drawing}
        self.timings = []
        while chunks:
            began, rows = time.perf_counter(), sum(len(chunk.tokens) for chunk in chunks)
            timed = bool(drawing) and all(len(chunk.tokens) <= TIMED_TOKENS for chunk in chunks)
            logits = self.runner.forward(chunks)
            if len(logits) and math.isnan(logits.max()):
                raise RunFailed("the draft model's logits are NaN", hint="Run without --draft.")
            chunks, drawn, drawing = [], drawing, []
            for row, (sequence, count) in enumerate(drawn):
                found, sampler, cache = drafts[sequence], samplers[sequence], _paired(sequence)
                token_id = sampler.sample_id(logits[row], sequence.written + len(found))
                found.append(token_id)
                if len(found) < count and token_id not in sequence.stop_token_ids:
                    sampler.observe(token_id)
                    chunks.append(ScheduledChunk(cache.draft, [token_id], len(sequence.tokens) + len(found) - 1, 1))
                    drawing.append((sequence, count))
                    cache.drafted.append(token_id)
            if timed:
                self.timings.append((rows, time.perf_counter() - began))
        return drafts

    def _read(self, asked: list[tuple[Sequence, int]]) -> tuple[list[ScheduledChunk], list[tuple[Sequence, int]]]:
        """The chunks that bring the draft's caches up to date, as many rows as a step has; what draws from them."""
        chunks, drawing, rows = [], [], 0
        for sequence, count in asked:
            cache = _paired(sequence)
            cache.accept(sequence.tokens)
            tokens = sequence.tokens[cache.read : cache.read + CHUNK]
            if rows and rows + len(tokens) > ROWS:
                break
            draws = count > 0 and cache.read + len(tokens) == len(sequence.tokens)
            chunks.append(ScheduledChunk(cache.draft, tokens, cache.read, int(draws)))
            if draws:
                drawing.append((sequence, count))
            cache.read += len(tokens)
            rows += len(tokens)
        return chunks, drawing


class PairedCache:
    """The cache of one sequence, and that of its draft model, which may be behind or ahead."""

    def __init__(self, model: KVCache, draft: KVCache) -> None:
        self.model, self.draft = model, draft
        self.capacity, self.used = model.capacity, 0
        self.read = 0  # positions of the text that the draft's cache holds
        self.drafted: list[int] = []  # tokens after `read` that it holds too, if they become the text's

    def accept(self, tokens: list[int]) -> None:
        """Keep the positions of drafts that became the text's tokens. The last token always runs again."""
        self.read += common_prefix(self.drafted, tokens[self.read : self.read + len(self.drafted)])
        self.read, self.drafted = min(self.read, len(tokens) - 1), []

    def copy_prefix(self, other: KVCache, length: int) -> None:
        """Copy the first `length` positions; of the draft's, those that it holds."""
        assert isinstance(other, PairedCache)
        self.model.copy_prefix(other.model, length)
        self.read, self.drafted = min(length, other.read), []
        self.draft.copy_prefix(other.draft, self.read)


class PairedRunner:
    """Runs the model; its caches have memory for the draft model too, whose context may be shorter."""

    def __init__(self, model: Runner, draft: Runner) -> None:
        self.model, self.draft = model, draft
        self.name, self.config, self.batch_invariant = model.name, model.config, model.batch_invariant
        self.weight_bytes = model.weight_bytes + draft.weight_bytes

    def cache_bytes(self, capacity: int) -> int:
        """Bytes of a cache for `capacity` positions, the draft's share included."""
        return self.model.cache_bytes(capacity) + self.draft.cache_bytes(self._draft_capacity(capacity))

    def new_cache(self, capacity: int) -> PairedCache:
        """An empty cache."""
        return PairedCache(self.model.new_cache(capacity), self.draft.new_cache(self._draft_capacity(capacity)))

    def forward(self, chunks: collections.abc.Sequence[ScheduledChunk]) -> Tensor:
        """Run the chunks through the model."""
        return self.model.forward([chunk._replace(cache=chunk.cache.model) for chunk in chunks])

    def _draft_capacity(self, capacity: int) -> int:
        return min(capacity, self.draft.config.max_position_embeddings)


def _paired(sequence: Sequence) -> PairedCache:
    assert isinstance(sequence.cache, PairedCache)
    return sequence.cache
