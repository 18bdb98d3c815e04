"""Memory for weights that are read from end to end for every token: pages of 2 MiB, one piece behind the other.

With pages of 4 KiB, a read of 135 MB takes 33,000 look-ups of addresses, each of them two-fold in a virtual machine:
a bare loop over SmolLM2's int8 weights ran 1.4 times as fast with large ones (docs/log.md).
"""

from __future__ import annotations

import contextlib
import mmap

import torch
from torch import Tensor

LARGE = 2 << 20  # bytes of a large page on x86-64, and on ARM with small pages of 4 KiB
CHUNK = 32 << 20


class Arena:
    """Hands out pieces of large mappings, aligned to cache lines; all live as long as any piece of theirs."""

    def __init__(self) -> None:
        self._free = torch.empty(0, dtype=torch.uint8)

    def take(self, nbytes: int) -> Tensor:
        """Zeroed memory, (nbytes,) uint8."""
        if nbytes > self._free.numel():
            self._free = _mapped(max(CHUNK, nbytes))
        piece, self._free = self._free[:nbytes], self._free[-(-nbytes // 64) * 64 :]
        return piece

    def keep(self, tensor: Tensor) -> Tensor:
        """A copy of a tensor here."""
        copy = self.take(tensor.nbytes).view(tensor.dtype).view(tensor.shape)
        return copy.copy_(tensor)


def _mapped(nbytes: int) -> Tensor:
    """Zeroed memory, from the first border of a large page on."""
    nbytes = -(-nbytes // LARGE) * LARGE
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.zeros(nbytes, dtype=torch.uint8)
    # Private: Python's own default is shared, which Linux keeps on small pages.
    mapping = mmap.mmap(-1, nbytes + LARGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a wish, which a kernel without large pages does not know
        mapping.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(mapping, dtype=torch.uint8)
    start = -whole.data_ptr() % LARGE
    return whole[start : start + nbytes]
