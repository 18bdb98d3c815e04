"""Two runners behind one: the caches of a model and of its draft are reserved, copied, kept and freed together.

So the pool's books, its budget and its prefix reuse hold for both, and neither pool nor scheduler knows of drafts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from torch import Tensor

from smolforge.generation.cache import Cache, common_prefix
from smolforge.generation.runner import Runner
from smolforge.generation.scheduler import Piece


class PairedCache:
    """The cache of one sequence, and that of its draft, which may lag behind or run ahead.

    Attributes:
        read: positions whose rows the draft's cache holds for certain.
        guesses: tokens behind `read` whose rows it holds too, if they turn out to be the text's.
    """

    def __init__(self, model: Cache, draft: Cache) -> None:
        self.model, self.draft = model, draft
        self.capacity, self.nbytes = model.capacity, model.nbytes + draft.nbytes
        self.read = 0
        self.guesses: list[int] = []

    def settle(self, tokens: Sequence[int]) -> None:
        """Keep the rows of guesses that became the text's tokens. The last token's row is always run again."""
        self.read += common_prefix(self.guesses, tokens[self.read : self.read + len(self.guesses)])
        self.read, self.guesses = min(self.read, len(tokens) - 1), []

    def copy_prefix(self, other: Cache, length: int) -> None:
        """Take over the first `length` positions; of the draft's, those that are there."""
        assert isinstance(other, PairedCache)
        self.model.copy_prefix(other.model, length)
        self.read, self.guesses = min(length, other.read), []
        self.draft.copy_prefix(other.draft, self.read)


class PairedRunner:
    """Runs the model; its caches have room for the draft beside them.

    Args:
        model: what computes the logits of the text.
        draft: what guesses; its context may be shorter.
    """

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

    def forward(self, pieces: Sequence[Piece]) -> Tensor:
        """Run the pieces through the model."""
        return self.model.forward([_of_the_model(piece) for piece in pieces])

    def _draft_capacity(self, capacity: int) -> int:
        return min(capacity, self.draft.config.max_position_embeddings)


def _of_the_model(piece: Piece) -> Piece:
    assert isinstance(piece.cache, PairedCache)
    return dataclasses.replace(piece, cache=piece.cache.model)
