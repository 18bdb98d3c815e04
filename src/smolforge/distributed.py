"""The processes of one run: which one this is, and the collectives that a run needs.

Started by `torchrun` (or any launcher that sets RANK and WORLD_SIZE) a process joins the others. Started alone it is
rank 0 of 1 and every collective returns at once. Control messages use gloo on the CPU even where gradients use NCCL, so
they never wait for a GPU. All ranks must call the same collectives in the same order.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._utils import _flatten_dense_tensors, _take_tensors, _unflatten_dense_tensors

# Longer than any save or evaluation, shorter than a scheduler waits for a dead rank.
TIMEOUT = timedelta(minutes=20)
# Gradients are summed in flat buckets: large enough to use a link fully, small enough not to double the memory.
BUCKET_BYTES = 32 << 20


@dataclass(frozen=True)
class DistributedContext:
    """This process among the others."""

    rank: int = 0
    world_size: int = 1
    control: Any = None
    """Process group for messages between CPUs; None for a single process."""

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes the run's files and messages."""
        return self.rank == 0

    def max(self, value: int) -> int:
        """The largest of all ranks' integers."""
        if self.world_size == 1:
            return value
        box = torch.tensor(value, dtype=torch.int64)
        dist.all_reduce(box, op=dist.ReduceOp.MAX, group=self.control)
        return int(box)

    def all_gather(self, value: Any) -> list[Any]:
        """The values of all ranks in rank order, on every rank."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.control)
        return values

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.control)
        return box[0]

    def barrier(self) -> None:
        """Wait until all ranks have called this."""
        self.max(0)

    def all_reduce_(self, tensors: Iterable[Tensor]) -> None:
        """Sum each tensor over the ranks in place, in flat buckets of equal precision."""
        if self.world_size == 1:
            return
        for bucket in _take_tensors(list(tensors), BUCKET_BYTES):
            flat = _flatten_dense_tensors(bucket)
            dist.all_reduce(flat)
            for tensor, summed in zip(bucket, _unflatten_dense_tensors(flat, bucket), strict=True):
                tensor.copy_(summed)

    def close(self) -> None:
        """Leave the process group."""
        if self.world_size > 1:
            dist.destroy_process_group()


def init_distributed(device: torch.device) -> DistributedContext:
    """Join the other ranks that the launcher's environment describes (RANK, WORLD_SIZE, MASTER_ADDR)."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return DistributedContext()
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=TIMEOUT)
    control = dist.group.WORLD if backend == "gloo" else dist.new_group(backend="gloo", timeout=TIMEOUT)
    if dist.get_rank() > 0:  # what every rank decides alike is reported once
        logging.getLogger("smolforge").setLevel(logging.WARNING)
    return DistributedContext(dist.get_rank(), dist.get_world_size(), control)
