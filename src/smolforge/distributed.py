"""The processes of one run: which one this is, and the collectives that a run needs.

Started by `--nproc`, `torchrun` or any launcher that sets RANK and WORLD_SIZE, or by Slurm's `srun`, a process joins
the others. Started alone it is rank 0 of 1 and every collective returns at once. Control messages use gloo on the CPU
even where gradients use NCCL, so they never wait for a GPU. All ranks must call the same collectives in the same order:
what one rank does alone, and may fail in, is done `together`. A rank that may wait for long (for data, for the disk)
tells the others so, several times per timeout.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import queue
import socket
import struct
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from smolforge.errors import BadInput, OtherProcessFailed, RunFailed, SmolforgeError, in_one_line

# How long a rank may be silent: at the start, where rank 0 may try for `data.patience` seconds to reach a source while
# the others wait, and after the first step.
START_TIMEOUT, STEP_TIMEOUT = timedelta(minutes=20), timedelta(minutes=3)
STORE_SECONDS = 10.0  # until a store that does not answer counts as gone
SIOCGIFADDR = 0x8915  # of Linux: the address of an interface


@dataclass(frozen=True)
class DistributedContext:
    """This process among the others."""

    rank: int = 0
    world_size: int = 1
    local_size: int = 1
    """How many ranks each machine has; 1 where machines differ."""
    control: Any = None
    """Process group for messages between CPUs; None for a single process."""
    agreed: list[Exception] = field(default_factory=list)
    """Errors with which all ranks left the same piece of work, so that they can still act together."""
    store: Any = None
    """What the ranks found each other by; here it says what was reported."""

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

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Work without collectives, or with those that each rank makes in any case: an error of one ends it on all.

        Raises:
            The rank's own error, or OtherProcessFailed; it is one of `agreed`.
        """
        if self.world_size == 1:
            yield
            return
        error: Exception | None = None
        try:
            yield
        except Exception as caught:
            if is_lost(caught):
                raise
            error = caught
        if self.max(int(error is not None)):
            raise self.agree(error)

    def agree(self, error: Exception | None) -> Exception:
        """The error to raise where a rank failed and all of them know it: this rank's own, or OtherProcessFailed."""
        self.agreed.append(error or OtherProcessFailed("another process failed; its own message says why"))
        return self.agreed[-1]

    def barrier(self) -> None:
        """Wait until all ranks have called this."""
        self.max(0)

    def sum_(self, tensor: Tensor) -> None:
        """Sum a tensor over the ranks in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor)

    def expect_steps(self, *, long: bool = False) -> None:
        """The first step is done: from now on no rank is silent for long, unless rank 0 writes within a step."""
        if self.world_size > 1 and not long:
            for group in dist.distributed_c10d._world.pg_map:
                dist.distributed_c10d._set_pg_timeout(STEP_TIMEOUT, group)

    @contextlib.contextmanager
    def one_error(self) -> Iterator[None]:
        """Mark an error that another rank reports already; where another rank ended or is silent, raise a RunFailed."""
        try:
            yield
        except SmolforgeError as error:
            error.is_reported = error.is_reported or not self.is_first("error", str(error))
            self.is_first("error", "")
            raise
        except RuntimeError as error:
            if self.world_size == 1 or not is_lost(error):
                raise
            failure = RunFailed(
                "another process ended or was silent for too long",
                hint="Its own message says why. The same command continues the run from its last checkpoint.",
            )
            failure.is_reported = not self.is_first("error", "")  # by the process whose error it is
            raise failure from error

    def is_first(self, kind: str, message: str) -> bool:
        """Whether no rank has asked this before about the same message; True where the others are gone."""
        if self.world_size == 1:
            return True
        answers: queue.SimpleQueue[bool] = queue.SimpleQueue()

        def ask() -> None:
            with contextlib.suppress(RuntimeError):
                answers.put(self.store.add(f"{kind} {hashlib.sha256(message.encode()).hexdigest()}", 1) == 1)
                return
            answers.put(True)

        # Over a link that is cut, the store would wait for an answer until the system gives the connection up.
        threading.Thread(target=ask, daemon=True).start()
        with contextlib.suppress(queue.Empty):
            return answers.get(timeout=STORE_SECONDS)
        return True

    def close(self) -> None:
        """Leave the process group."""
        if self.world_size > 1:
            dist.destroy_process_group()


def is_lost(error: Exception) -> bool:
    """Whether an error of a collective says that another rank ended, or was silent for too long."""
    return isinstance(error, RuntimeError) and (isinstance(error, dist.DistError) or "gloo" in str(error))


def init_distributed(device: torch.device) -> DistributedContext:
    """Join the other ranks that the launcher's environment describes (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT).

    What all ranks report is shown once from then on.

    Raises:
        BadInput: the environment says that there are others, but not where.
        RunFailed: the others could not be reached.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        return DistributedContext()
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        if name not in os.environ:
            hint = "Start with --nproc or torchrun."
            raise BadInput(f"WORLD_SIZE is {world}, but {name} is not set", field=name, hint=hint)
    rank, host, port = int(os.environ["RANK"]), os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    if "GLOO_SOCKET_IFNAME" not in os.environ and (name := interface_to(host)):
        # By itself gloo binds what this machine's name resolves to, which is often 127.0.0.1.
        os.environ["GLOO_SOCKET_IFNAME"] = name
    backend = "nccl" if device.type == "cuda" else "gloo"
    is_hosted = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # by torchrun
    # torchrun keeps one store for all attempts, and an attempt must not read the addresses of the one before.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    try:
        store = dist.TCPStore(  # pyright: ignore[reportPrivateImportUsage]
            host, port, world, is_master=rank == 0 and not is_hosted, timeout=START_TIMEOUT, multi_tenant=True
        )
        store = dist.PrefixStore(f"attempt-{attempt}", store)  # pyright: ignore[reportPrivateImportUsage]
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=START_TIMEOUT)
    except (RuntimeError, ValueError) as error:
        where = f"process {rank} of {world} could not join the others at {host}:{port}"
        raise RunFailed(f"{where} ({in_one_line(error)})") from None
    control = dist.group.WORLD if backend == "gloo" else dist.new_group(backend="gloo", timeout=START_TIMEOUT)
    ranks = DistributedContext(rank, world, control=control, store=store)
    sizes = set(ranks.all_gather(int(os.environ.get("LOCAL_WORLD_SIZE", world))))
    ranks = replace(ranks, local_size=sizes.pop() if len(sizes) == 1 else 1)
    if rank > 0:  # what every rank decides alike is reported once
        logging.getLogger("smolforge").setLevel(logging.WARNING)
    for handler in logging.getLogger("smolforge").handlers:
        handler.addFilter(_ReportOnce(ranks))
    return ranks


class _ReportOnce(logging.Filter):
    """Shows a warning unless another rank has shown it already."""

    def __init__(self, ranks: DistributedContext) -> None:
        super().__init__()
        self.ranks, self.seen = ranks, Counter[str]()

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno < logging.WARNING:
            return True
        message = record.getMessage()
        self.seen[message] += 1  # a rank that repeats itself is heard again
        return self.ranks.is_first(f"warning {self.seen[message]}", message)


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor, of which each rank holds some rows."""
    return hasattr(tensor, "placements")  # so that nobody who has none imports what it takes to have one


def local_rows(tensor: Tensor) -> tuple[Tensor, int]:
    """The rows of a tensor that this rank holds, without gradient, and the number of the first; all unless sharded."""
    if not is_sharded(tensor):
        return tensor.detach(), 0
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    found: Any = tensor.detach()
    _, offset = compute_local_shape_and_global_offset(found.shape, found.device_mesh, found.placements)
    return found.to_local(), offset[0]


def copy_whole(target: Tensor, whole: Tensor) -> None:
    """Copy a whole tensor into `target`, of which this rank may hold some rows only."""
    rows, first = local_rows(target)
    rows.copy_(whole[first : first + len(rows)] if is_sharded(target) else whole)


def interface_to(host: str) -> str | None:
    """The name of the network interface whose address reaches `host` (IPv4, Linux); None where it is not known."""
    with contextlib.suppress(OSError, ImportError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        import fcntl

        probe.connect((host, 9))  # chooses a route and sends nothing
        address = probe.getsockname()[0]
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):  # an interface without an address
                found = fcntl.ioctl(probe, SIOCGIFADDR, struct.pack("256s", name.encode()))
                if socket.inet_ntoa(found[20:24]) == address:
                    return name
    return None
