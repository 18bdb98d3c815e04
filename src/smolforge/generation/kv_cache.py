"""Memory of keys and values: addresses for all that a sequence may write, memory for what it has written.

A cache has addresses for the prompt and all tokens that may follow, and the operating system provides pages when they
are written. So the pool counts the positions in use, and a text without a limit costs no more than its length. Where
the budget is used up, the youngest sequence waits and is read again later (`scheduler.py`).

Finished caches are kept while there is memory: a new prompt that begins like an old one copies the common positions
(prefix reuse). Kept caches are dropped first when memory is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from smolforge.config import ModelConfig


class KVCache(Protocol):
    """Keys and values of one sequence; only the runner that made it knows its layout."""

    capacity: int
    used: int  # bytes that the pool counts for it

    def copy_prefix(self, other: KVCache, length: int) -> None:
        """Copy the first `length` positions of another cache of the same runner."""
        ...


class TensorCache:
    """Keys and values of one sequence in one torch tensor, `memory`: (layers, 2 K, capacity, d), the keys first.

    This is what a `model` asks of a cache: `update` appends behind `length`. The caller advances `length` once all
    layers have been updated.
    """

    mask: Tensor | None = None  # a token may see itself and everything before it
    used = 0

    def __init__(self, config: ModelConfig, capacity: int, dtype: torch.dtype, device: torch.device) -> None:
        shape = (config.num_hidden_layers, 2 * config.num_key_value_heads, capacity, config.head_dim)
        self.memory = torch.empty(shape, dtype=dtype, device=device)
        self.capacity, self.length = capacity, 0

    @staticmethod
    def bytes_for(config: ModelConfig, capacity: int, dtype: torch.dtype) -> int:
        """Bytes of a cache for `capacity` positions, before there is one."""
        return 2 * config.num_hidden_layers * config.num_key_value_heads * capacity * config.head_dim * dtype.itemsize

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append k and v (1, K, T, d); all so far, (1, K, S, d), as views."""
        end = self.length + k.shape[2]
        keys, values = self.memory[layer, None, :, :end].split(k.shape[1], 1)
        keys[:, :, self.length :], values[:, :, self.length :] = k, v
        return keys, values

    def copy_prefix(self, other: KVCache, length: int) -> None:
        """Copy the first `length` positions of another cache."""
        assert isinstance(other, TensorCache)
        self.memory[:, :, :length] = other.memory[:, :, :length]


class CachePool:
    """Allocates caches, and counts their memory within a budget.

    Args:
        new_cache: makes a cache for at most so many positions; `bytes_for` gives the bytes of those in use.
        budget: maximum number of bytes of all caches together.
        keep: maximum number of finished caches kept for prefix reuse.
    """

    def __init__(
        self, new_cache: Callable[[int], KVCache], bytes_for: Callable[[int], int], budget: int, keep: int
    ) -> None:
        self._new_cache, self.bytes_for, self.budget, self._keep = new_cache, bytes_for, budget, keep
        self.reserved = 0  # bytes in use by all caches allocated and not freed
        self.kept = 0  # bytes of finished caches kept for reuse; reserved + kept <= budget always
        self.old: list[tuple[list[int], KVCache]] = []  # those, oldest first, with the tokens whose positions they have

    def has_room(self, positions: int) -> bool:
        """Whether so many positions more can be used now, after dropping kept caches if necessary."""
        return self.reserved + self.bytes_for(positions) <= self.budget

    def grow(self, cache: KVCache, positions: int) -> bool:
        """Count so many positions of a cache as used; False where the budget has no room for them."""
        more = self.bytes_for(positions) - cache.used
        if self.reserved + more > self.budget:
            return False
        while self.old and self.reserved + self.kept + more > self.budget:
            self._drop_oldest()
        cache.used += more
        self.reserved += more
        return True

    def allocate(self, capacity: int, positions: int) -> KVCache:
        """A new cache, of which so many positions are counted as used; `has_room` must be true for them."""
        cache = self._new_cache(capacity)
        assert self.grow(cache, positions), "a cache was allocated without room"
        return cache

    def free(self, cache: KVCache, tokens: Sequence[int]) -> None:
        """Return a cache whose first positions belong to `tokens`; without tokens it is not kept."""
        self.reserved -= cache.used
        if self._keep and tokens:
            self.old.append((list(tokens), cache))
            self.kept += cache.used
            while len(self.old) > self._keep:
                self._drop_oldest()

    def _drop_oldest(self) -> None:
        self.kept -= self.old.pop(0)[1].used


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two sequences share from the start."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
