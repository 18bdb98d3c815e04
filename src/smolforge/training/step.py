"""One step: the gradients of a batch in micro-batches, summed over the ranks, then one update."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import record_function

from smolforge.config import RunConfig
from smolforge.data import Batch
from smolforge.devices import to_device
from smolforge.distributed import DistributedContext, is_lost
from smolforge.model.architecture import CausalLM
from smolforge.model.documents import Documents
from smolforge.model.dropout import sequence_keys
from smolforge.model.loss import IGNORE
from smolforge.training.optim import optimizer_step
from smolforge.training.plan import Plan
from smolforge.training.recorded import RecordedPasses

# (model, rows of the batch, inputs (B, T), targets (B, T), document ids (B, T) or None) -> the loss to differentiate,
# which adds up over micro-batches and ranks, and the sum of losses to report.
Objective = Callable[[CausalLM, slice, Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor]]


class _Forward(nn.Module):
    """Calls a function of the model: DDP wants the whole way from the parameters to the loss in one `forward`."""

    def __init__(self, model: CausalLM) -> None:
        super().__init__()
        self.model = model

    def forward(self, compute: Callable[[CausalLM], Any]) -> Any:
        return compute(self.model)


class _Sums:
    """DDP's sums of gradients over the ranks in a step: bucket by bucket, in the same order on all of them.

    Attributes:
        buckets: the gradients of each bucket, in the order of the sums.
        started: how many of them have been summed in this step.
    """

    def __init__(self) -> None:
        self.buckets: list[Tensor] = []
        self.started = 0

    def complete(self) -> None:
        """Take part in the sums that are left, with whatever the buckets hold."""
        for gradients in self.buckets[self.started :]:
            dist.all_reduce(gradients)
        self.started = len(self.buckets)


def _sum(sums, bucket):
    """DDP's hook for the gradients of a bucket; without annotations, because DDP would compare their text with types.

    By itself DDP divides by the number of ranks. Here the loss is scaled by the tokens of the global batch.
    """
    index = bucket.index()
    sums.buckets[index : index + 1] = [bucket.buffer()]
    if bucket.is_last():  # DDP may have made fewer of them than in its first pass
        del sums.buckets[index + 1 :]
    work: Any = dist.all_reduce(bucket.buffer(), async_op=True)
    sums.started = index + 1
    return work.get_future().then(lambda done: done.value()[0])


class Replica(DistributedDataParallel):
    """Calls functions of a model so that gradients are summed over ranks in the backward pass."""

    def __init__(self, model: CausalLM) -> None:
        super().__init__(_Forward(model), gradient_as_bucket_view=True)
        self.sums = _Sums()
        self.register_comm_hook(self.sums, _sum)

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """One step's passes, of which the last sums. Where they fail on this rank alone, no other waits for it."""
        self.sums.started = 0
        try:
            yield
        except Exception as error:
            if not is_lost(error):
                self.sums.complete()
            raise


def _any_loss(model: CausalLM) -> Tensor:
    """Something with a gradient for each parameter that learns, the last one's first."""
    return torch.stack([parameter.flatten()[0] for parameter in model.parameters() if parameter.requires_grad]).sum()


def replicate(model: CausalLM, ranks: DistributedContext, *, compiled: bool = False) -> Replica | None:
    """The `Replica` of a model; None for a single rank.

    After its first backward pass DDP lays the gradients out in the order in which they came. From three ranks on, the
    last bits of a sum depend on the layout, so that happens here, always in the same way: the first step of a resumed
    run sums as the same step of the uninterrupted one.
    """
    if ranks.world_size == 1:
        return None
    if compiled:  # block by block, so DDP need not cut what is compiled to sum early
        torch._dynamo.config.optimize_ddp = False
    replica = Replica(model)
    for _ in range(2):
        replica(_any_loss).backward()
        model.zero_grad(set_to_none=False)  # they stay in DDP's buckets, and micro-batches are summed there
    return replica


def dropout_keys(config: RunConfig, batch: Batch, device: torch.device) -> Tensor | None:
    """(B,) keys of a rank's sequences, from the run's seed and their places in its stream; None without dropout."""
    if not config.training.dropout:
        return None
    numbers = torch.tensor([number for number, _ in batch.digests])
    return to_device(sequence_keys(config.training.seed, batch.step * config.sequences_per_step, numbers), device)


def _sums_in_last(model: CausalLM, plan: Plan, replica: Replica | None, is_last: bool) -> AbstractContextManager[Any]:
    """The context of a pass, in which gradients are summed among copies only if it is the last one of the step."""
    if plan.parallel == "hsdp":
        model.set_requires_all_reduce(is_last)  # pyright: ignore[reportCallIssue]
    return contextlib.nullcontext() if replica is None or is_last else replica.no_sync()


def _loss_of_nothing(model: CausalLM, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """As `CausalLM.loss`, of a pass in which nothing is learned."""
    model.options.dropout.keys = None
    return model.loss(tokens[:1, :-1].contiguous(), torch.full_like(tokens[:1, 1:], IGNORE))


def _replay(
    passes: RecordedPasses, model: CausalLM, plan: Plan, config: RunConfig, rows: slice,
    tokens: Tensor, document_ids: Tensor | None, keys: Tensor | None,
) -> Tensor:  # fmt: skip
    """Add the gradients of some rows, and return the sum of their losses in nats, (); arguments as of `train_step`."""

    def run(
        inputs: Tensor, targets: Tensor, keys: Tensor | None, positions: Tensor | None, mask: Tensor | None
    ) -> Tensor:
        model.options.dropout.keys = keys
        documents = None if positions is None or mask is None else Documents(positions, mask)
        scale, z_weight = 1 / config.tokens_per_step, config.training.z_loss
        with plan.precision.context(inputs.device):
            loss, nats = model.loss(inputs, targets, document_ids=documents, scale=scale, z_weight=z_weight)
        loss.backward()
        return nats

    positions, mask = None, None
    if document_ids is not None:
        ids = document_ids[rows, :-1].contiguous()
        documents = Documents.of(plan.attention, ids, tokens.device, plan.precision.products)
        positions, mask = documents.positions, documents.mask
    inputs, targets = tokens[rows, :-1].contiguous(), tokens[rows, 1:].contiguous()
    return passes(run, inputs, targets, None if keys is None else keys[rows], positions, mask)


def train_step(
    model: CausalLM, optimizer: torch.optim.Optimizer, plan: Plan, config: RunConfig,
    tokens: Tensor, document_ids: Tensor | None, *,
    lr: float, ranks: DistributedContext, scaler: Any = None, targets: Tensor | None = None, count: int | None = None,
    replica: Replica | None = None, keys: Tensor | None = None, passes: RecordedPasses | None = None,
    span: Callable[[str], AbstractContextManager[Any]] = record_function, objective: Objective | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of the global batch in micro-batches, then one update.

    Args:
        tokens: (B, T + 1), this rank's share of the batch.
        document_ids: (B, T + 1) on the host where attention stops at document borders, else None.
        targets: (B, T) of the next tokens, `IGNORE` where one is not learned; all of `tokens` unless given.
        count: targets that are learned, in the global batch; all unless given.
        replica: of several ranks, as `replicate` made it of the model.
        keys: (B,) of dropout, as `dropout_keys` makes them; without, nothing is dropped.
        passes: of the model, to record those of one rank, of which all tokens are learned, and repeat them.
        span: the context of each part ("forward" and "backward", or "replay", and "update"), for profiles and timings.
        objective: what is learned instead of the next token.

    Returns:
        Sum of the losses in nats over all ranks (), norm of the gradient before clipping (), and whether the update was
        skipped because one of them is not finite (); all on the device.
    """

    def compute(model: CausalLM, rows: slice) -> tuple[Tensor, Tensor]:
        if rows.start >= len(tokens):  # the other ranks of a sharded model have a sequence more
            return _loss_of_nothing(model, tokens)
        model.options.dropout.keys = None if keys is None else keys[rows]
        ids = None if document_ids is None else document_ids[rows, :-1].contiguous()
        inputs = tokens[rows, :-1].contiguous()
        wanted = tokens[rows, 1:].contiguous() if targets is None else targets[rows]
        if objective is not None:
            return objective(model, rows, inputs, wanted, ids)
        scale = 1 / (count or config.tokens_per_step)
        return model.loss(inputs, wanted, document_ids=ids, scale=scale, z_weight=config.training.z_loss)

    nats = torch.zeros((), dtype=torch.float32, device=tokens.device)
    # Each pass of a sharded model is a collective: all ranks make as many, and none can fail alone.
    count_all = plan.sequences if plan.shards > 1 else len(tokens)
    together = contextlib.nullcontext() if plan.shards > 1 else ranks.together()
    with together, replica.step() if replica else contextlib.nullcontext():
        for rows in [slice(start, start + plan.micro_batch) for start in range(0, count_all, plan.micro_batch)]:
            if passes:
                with span("replay"):
                    nats += _replay(passes, model, plan, config, rows, tokens, document_ids, keys)
                continue
            with _sums_in_last(model, plan, replica, is_last=rows.stop >= count_all):
                with span("forward"), plan.precision.context(tokens.device):
                    loss, part = replica(partial(compute, rows=rows)) if replica else compute(model, rows)
                with span("backward"):
                    (scaler.scale(loss) if scaler else loss).backward()
            nats += part.float()
    model.options.dropout.keys = None  # not in evaluation and samples
    with span("update"):
        norm, skipped = optimizer_step(
            model, optimizer, nats, lr=lr, clip=config.training.grad_clip, ranks=ranks, scaler=scaler
        )
    optimizer.zero_grad(set_to_none=not (replica or passes))
    return nats, norm, skipped
