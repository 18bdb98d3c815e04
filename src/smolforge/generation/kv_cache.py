"""Memory of keys and values: reserved whole when a choice starts, accounted to the byte, given back at its end.

A choice reserves room for its prompt and all it may write, so nothing that runs can run out of memory later.
The operating system hands out pages only when they are written, so what is reserved is not yet resident.

Finished caches are kept while there is room: a new prompt that begins like an old one copies the common rows
(prefix reuse). Kept caches are the first to go when memory is wanted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from smolforge.config import ModelConfig


class Cache(Protocol):
    """What a runner keeps for one sequence; only the runner knows its layout."""

    capacity: int
    nbytes: int

    def copy_prefix(self, other: Cache, length: int) -> None:
        """Take over the first `length` positions of another cache of the same runner."""
        ...


class TensorCache:
    """Keys and values of one sequence in one torch tensor, `memory`: (layers, 2 K, capacity, d), the keys first.

    It is what `model/llama.py` asks of a cache: `update` appends behind `length`. The caller advances `length`
    once all layers have been updated.
    """

    def __init__(self, config: ModelConfig, capacity: int, dtype: torch.dtype, device: torch.device) -> None:
        self._heads = config.num_key_value_heads
        shape = (config.num_hidden_layers, 2 * self._heads, capacity, config.head_dim)
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
        keys, values = self.memory[layer, None, :, :end].split(self._heads, 1)
        keys[:, :, self.length :], values[:, :, self.length :] = k, v
        return keys, values

    def copy_prefix(self, other: Cache, length: int) -> None:
        """Take over the first `length` positions of another cache."""
        assert isinstance(other, TensorCache)
        self.memory[:, :, :length] = other.memory[:, :, :length]


class CachePool:
    """Hands out caches within a budget.

    Args:
        make: the runner's maker of a cache for a number of positions.
        bytes_for: bytes that such a cache takes.
        budget: most bytes of all caches together.
        keep: how many finished caches to keep for prefix reuse.

    Attributes:
        reserved: bytes of all caches handed out and not given back.
        kept: bytes of finished caches kept for reuse; `reserved + kept <= budget` always.
    """

    def __init__(self, make, bytes_for, budget: int, keep: int) -> None:
        self._make, self._bytes_for, self._keep = make, bytes_for, keep
        self.budget = budget
        self.reserved = 0
        self.kept = 0
        self._old: list[tuple[list[int], Cache]] = []  # oldest first: the tokens whose rows the cache holds

    def bytes_for(self, capacity: int) -> int:
        """Bytes of a cache for `capacity` positions."""
        return self._bytes_for(capacity)

    def has_room(self, capacity: int) -> bool:
        """Whether a cache can be taken now, giving up kept ones if need be."""
        return self.reserved + self._bytes_for(capacity) <= self.budget

    def allocate(self, capacity: int) -> Cache:
        """A new cache; `has_room` must have said yes."""
        need = self._bytes_for(capacity)
        assert self.reserved + need <= self.budget, "a cache was taken without room"
        while self._old and self.reserved + self.kept + need > self.budget:
            self._drop(0)
        cache = self._make(capacity)
        assert cache.nbytes == need, "the runner's accounting differs from its caches"
        self.reserved += need
        return cache

    def free(self, cache: Cache, tokens: Sequence[int]) -> None:
        """Return a cache whose first rows belong to `tokens`."""
        self.reserved -= cache.nbytes
        if self._keep and tokens:
            self._old.append((list(tokens), cache))
            self.kept += cache.nbytes
            while len(self._old) > self._keep:
                self._drop(0)

    def prefix_of(self, tokens: Sequence[int]) -> tuple[Cache | None, int]:
        """The kept cache that shares the longest beginning with `tokens`, and how long that is."""
        best, longest = None, 0
        for old, cache in self._old:
            length = common_prefix(old, tokens)
            if length > longest:
                best, longest = cache, length
        return best, longest

    def clear(self) -> None:
        """Forget the kept caches, as when the weights have changed."""
        while self._old:
            self._drop(0)

    def _drop(self, index: int) -> None:
        self.kept -= self._old.pop(index)[1].nbytes


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two sequences share from the start."""
    length = min(len(a), len(b))
    for i in range(length):
        if a[i] != b[i]:
            return i
    return length
