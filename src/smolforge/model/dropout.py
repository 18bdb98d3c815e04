"""Dropout on what each branch adds to the residual stream, in training only (Srivastava et al. 2014, JMLR 15).

Which entries are dropped follows from a key for each sequence, the branch, the position and the column, by a
counter-based generator (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"). So they are the same in a
resumed run, on any number of ranks, in micro-batches of any size, and when activations are computed again.
"""

from __future__ import annotations

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B9  # an odd number near 2**32 / 1.618: its multiples are spread evenly
_WORD = 0xFFFFFFFF


class Dropout:
    """One for all layers of a model, which call it with what a branch computed.

    It does nothing unless `rate` is above 0 and `keys` are set, as `training.step` does for each micro-batch.
    """

    def __init__(self, rate: float = 0.0) -> None:
        self.rate = rate
        self.keys: Tensor | None = None
        """int64 (B,) on the model's device, as `sequence_keys` makes them."""

    def __call__(self, x: Tensor, branches: Tensor, which: int) -> Tensor:
        """x, (B, T, D), with a share `rate` of its entries 0 and the others scaled; `branches` of `branches_of`."""
        if not self.rate or self.keys is None:
            return x
        branch = branches[which]  # not before: a fake or compiled step without dropout knows no such tensor
        return torch.where(kept(self.keys, branch, x.shape[1:], self.rate), x * (1 / (1 - self.rate)), 0.0)


def branches_of(layer: int) -> Tensor:
    """The numbers of a layer's two branches, (2,): a tensor, so that one compiled layer does for all."""
    return torch.tensor([2 * layer, 2 * layer + 1], device="cpu")


def sequence_keys(seed: int, first: int, numbers: Tensor) -> Tensor:
    """Keys of sequences `first + numbers` of a run's stream, int64 (B,)."""
    return _mix(_mix(numbers + first) + _mix(torch.tensor(seed)))


def kept(keys: Tensor, branch: Tensor, shape: torch.Size, rate: float) -> Tensor:
    """Which entries stay: (B, T, D) for keys (B,) and `shape` (T, D), each with probability 1 - rate."""
    positions, columns = (torch.arange(size, device=keys.device) for size in shape)
    rows = _mix(keys[:, None] + positions * _GOLDEN)
    columns = _mix(columns * _GOLDEN + (branch + 1))
    # One more round for each entry, in 32 bits, where products wrap around.
    bits = _signed(rows)[..., None] ^ _signed(columns)
    bits = (bits ^ ((bits >> 15) & 0x1FFFF)) * 0x2C1B3C6D
    return bits >= int(rate * 2**32) - 2**31


def _mix(x: Tensor) -> Tensor:
    """A number below 2**32 for each of x, int64: MurmurHash3's last step (Appleby), in which every bit changes half."""
    x = x & _WORD
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & _WORD
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & _WORD
    return x ^ (x >> 16)


def _signed(x: Tensor) -> Tensor:
    """The same 32 bits as int32."""
    return (x - ((x >> 31) << 32)).to(torch.int32)
