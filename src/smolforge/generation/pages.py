"""Keys and values on a device in pages: one memory for all sequences, so that one step can read them all.

A sequence's cache is a lease of pages and the table that names them. Pages are all of one size, so what a cache
takes is exactly its pages, and nothing is ever moved to make room. A page comes back when the cache that leased it
is dropped: nobody else needs to know that there are pages.

The memory grows by half when leases want more, and keeps the most that was ever out at once. So it never holds
more than 1.5 times what `cache.CachePool` granted (and FIRST pages). Growing changes addresses: `generation` counts it.

Shapes: P pages, K key/value heads, d head_dim. Page 0 belongs to no sequence: rows that only fill up a batch write
there, and what a table does not cover reads from there.
"""

from __future__ import annotations

import weakref

import numpy as np
import torch
from torch import Tensor

from smolforge.generation.kv_cache import Cache

PAGE = 32  # positions: few enough that a short sequence wastes little, many enough to be read in long runs
FIRST = 64  # pages of the first allocation


class PagedCache:
    """The pages of one sequence.

    Attributes:
        table: numbers of its pages in the order of positions, int64.
    """

    def __init__(self, pool: PagePool, pages: list[int]) -> None:
        self.pool = pool
        self.table = np.array(pages, dtype=np.int64)
        self.capacity = len(pages) * PAGE
        self.nbytes = len(pages) * pool.page_bytes

    def copy_prefix(self, other: Cache, length: int) -> None:
        """Take over the first `length` positions of another cache; whole pages, the surplus is overwritten later."""
        assert isinstance(other, PagedCache) and other.pool is self.pool, "a cache of another runner"
        count = -(-length // PAGE)
        self.pool.copy(other.table[:count], self.table[:count])


class PagePool:
    """Pages of all layers, and which of them are free.

    Attributes:
        layers: one tensor (P * PAGE, 2, K, d) for each layer: a row is a position, its key and its value.
        page_bytes: of one page in all layers.
        generation: how often `layers` was replaced.
    """

    def __init__(self, layers: int, kv_heads: int, dim: int, dtype: torch.dtype, device: torch.device) -> None:
        self._row = (2, kv_heads, dim)
        empty = torch.empty(0, *self._row, dtype=dtype, device=device)
        self.layers: list[Tensor] = [empty] * layers
        self.page_bytes = layers * PAGE * 2 * kv_heads * dim * dtype.itemsize
        self.generation = 0
        self._free: list[int] = []
        self._pages = 0

    @property
    def leased(self) -> int:
        """Pages that belong to a sequence now."""
        return max(self._pages - 1, 0) - len(self._free)

    @property
    def nbytes(self) -> int:
        """Bytes that the pages take, leased or not."""
        return self._pages * self.page_bytes

    def pages_for(self, capacity: int) -> int:
        """Pages that hold so many positions."""
        return -(-capacity // PAGE)

    def lease(self, capacity: int) -> PagedCache:
        """Pages for so many positions; they come back when the cache is dropped."""
        count = self.pages_for(capacity)
        if count > len(self._free):
            self._grow(self.leased + count)
        taken = [self._free.pop() for _ in range(count)]
        # Whoever had them before may have left infinities, which masking would turn into 0 * inf.
        rows = self.rows(np.array(taken, dtype=np.int64))
        for layer in self.layers:
            layer.index_fill_(0, rows, 0)
        cache = PagedCache(self, taken)
        weakref.finalize(cache, self._free.extend, taken).atexit = False
        return cache

    def rows(self, pages: np.ndarray) -> Tensor:
        """Numbers of the positions of some pages, in order, on the device."""
        rows = pages[:, None] * PAGE + np.arange(PAGE)
        return torch.from_numpy(rows.reshape(-1)).to(self.layers[0].device)

    def copy(self, source: np.ndarray, target: np.ndarray) -> None:
        """Copy whole pages."""
        read, write = self.rows(source), self.rows(target)
        for layer in self.layers:
            layer.index_copy_(0, write, layer.index_select(0, read))

    def _grow(self, leased: int) -> None:
        """Make room for so many leased pages; one layer is copied at a time, so both memories never lie there whole."""
        before = self._pages
        self._pages = max(FIRST, 1 + leased, before + before // 2)
        for index, old in enumerate(self.layers):
            new = old.new_zeros(self._pages * PAGE, *self._row)
            new[: old.shape[0]] = old
            self.layers[index] = new
        self._free[:0] = range(self._pages - 1, max(before, 1) - 1, -1)
        self.generation += 1
