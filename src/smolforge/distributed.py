"""DistributedContext: who we are, and the few collectives that a run needs.

Started by `torchrun` (or any launcher that sets RANK and WORLD_SIZE) a process joins the others; started alone it is
rank 0 of 1 and every collective is a no-op, so the rest of the code never asks. Control messages (stop flags,
cursors, digests) travel over gloo on the CPU even where gradients travel over NCCL: they never wait for a GPU.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# Longer than any save or evaluation, shorter than a scheduler's patience with a dead rank.
HEARTBEAT = timedelta(minutes=20)
# Gradients are summed in flat pieces: large enough to fill a link, small enough not to double the memory.
BUCKET_BYTES = 32 << 20


@dataclass(frozen=True)
class DistributedContext:
    """This process among the others.

    Attributes:
        rank: 0 .. world - 1.
        world: number of processes.
        local_rank: index of the GPU on this machine.
        control: process group for messages between CPUs, None when alone.
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    control: Any = None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def any(self, flag: bool) -> bool:
        """Whether the flag is up on any rank; the same answer everywhere."""
        return self.max(int(flag)) > 0

    def max(self, value: int) -> int:
        """The largest of all ranks' integers."""
        if self.world == 1:
            return value
        import torch
        import torch.distributed as dist

        box = torch.tensor(value, dtype=torch.int64)
        dist.all_reduce(box, op=dist.ReduceOp.MAX, group=self.control)
        return int(box)

    def gather(self, value: Any) -> list[Any]:
        """The values of all ranks, in their order, on every rank."""
        if self.world == 1:
            return [value]
        import torch.distributed as dist

        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value, group=self.control)
        return values

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value on every rank."""
        if self.world == 1:
            return value
        import torch.distributed as dist

        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.control)
        return box[0]

    def barrier(self) -> None:
        if self.world > 1:
            self.max(0)

    def sum_(self, tensors: Iterable[Tensor]) -> None:
        """Sum each tensor over the ranks in place, in flat buckets of equal precision."""
        if self.world == 1:
            return
        import torch
        import torch.distributed as dist

        for bucket in _buckets(tensors):
            flat = torch.cat([t.reshape(-1) for t in bucket])
            dist.all_reduce(flat)
            for t, part in zip(bucket, flat.split([t.numel() for t in bucket]), strict=True):
                t.copy_(part.view_as(t))

    def close(self) -> None:
        if self.world > 1:
            import torch.distributed as dist

            dist.destroy_process_group()


def init_distributed(device: torch.device) -> DistributedContext:
    """Meet the other ranks, as the launcher's environment describes them (RANK, WORLD_SIZE, LOCAL_RANK)."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        return DistributedContext()
    import torch.distributed as dist

    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=HEARTBEAT)
    control = dist.group.WORLD if backend == "gloo" else dist.new_group(backend="gloo", timeout=HEARTBEAT)
    return DistributedContext(dist.get_rank(), world, local_rank(), control)


def local_rank() -> int:
    """Index of this process on its machine, as the launcher says."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def _buckets(tensors: Iterable[Tensor]) -> Iterable[list[Tensor]]:
    bucket: list[Tensor] = []
    size = 0
    for tensor in tensors:
        if bucket and (size >= BUCKET_BYTES or bucket[0].dtype != tensor.dtype):
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += tensor.numel() * tensor.element_size()
    if bucket:
        yield bucket
