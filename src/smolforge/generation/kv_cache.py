"""Memory of keys and values: reserved as a whole when a sequence starts, counted in bytes, freed at its end.

A sequence reserves memory for its prompt and all tokens it may write, so nothing that runs can run out of memory later.
The operating system provides pages only when they are written, so reserved memory is not yet resident.

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
    nbytes: int

    def copy_prefix(self, other: KVCache, length: int) -> None:
        """Copy the first `length` positions of another cache of the same runner."""
        ...


class TensorCache:
    """Keys and values of one sequence in one torch tensor, `memory`: (layers, 2 K, capacity, d), the keys first.

    This is what a `model` asks of a cache: `update` appends behind `length`. The caller advances `length` once all
    layers have been updated.
    """

    mask: Tensor | None = None  # a token may see itself and everything before it

    def __init__(self, config: ModelConfig, capacity: int, dtype: torch.dtype, device: torch.device) -> None:
        shape = (config.num_hidden_layers, 2 * config.num_key_value_heads, capacity, config.head_dim)
        self.memory = torch.empty(shape, dtype=dtype, device=device)
        self.capacity, self.length = capacity, 0
        self.nbytes = self.memory.nbytes

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
    """Allocates caches within a budget.

    Args:
        new_cache: makes a cache for a number of positions; `bytes_for` gives its bytes.
        budget: maximum number of bytes of all caches together.
        keep: maximum number of finished caches kept for prefix reuse.

    Attributes:
        reserved: bytes of all caches allocated and not freed.
        kept: bytes of finished caches kept for reuse; `reserved + kept <= budget` always.
        old: these caches, the oldest first, each with the tokens whose positions it has.
    """

    def __init__(
        self, new_cache: Callable[[int], KVCache], bytes_for: Callable[[int], int], budget: int, keep: int
    ) -> None:
        self._new_cache, self.bytes_for, self.budget, self._keep = new_cache, bytes_for, budget, keep
        self.reserved = self.kept = 0
        self.old: list[tuple[list[int], KVCache]] = []

    def has_room(self, capacity: int) -> bool:
        """Whether a cache can be allocated now, after dropping kept ones if necessary."""
        return self.reserved + self.bytes_for(capacity) <= self.budget

    def allocate(self, capacity: int) -> KVCache:
        """A new cache; `has_room` must be true."""
        need = self.bytes_for(capacity)
        assert self.reserved + need <= self.budget, "a cache was allocated without room"
        while self.old and self.reserved + self.kept + need > self.budget:
            self._drop_oldest()
        cache = self._new_cache(capacity)
        assert cache.nbytes == need, "the runner's accounting differs from its caches"
        self.reserved += need
        return cache

    def free(self, cache: KVCache, tokens: Sequence[int]) -> None:
        """Return a cache whose first positions belong to `tokens`."""
        self.reserved -= cache.nbytes
        if self._keep and tokens:
            self.old.append((list(tokens), cache))
            self.kept += cache.nbytes
            while len(self.old) > self._keep:
                self._drop_oldest()

    def _drop_oldest(self) -> None:
        self.kept -= self.old.pop(0)[1].nbytes


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two sequences share from the start."""
    length = min(len(a), len(b))
    for i in range(length):
        if a[i] != b[i]:
            return i
    return length
