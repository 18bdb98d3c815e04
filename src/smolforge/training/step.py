"""One step: the gradients of a batch in micro-batches, then one update."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.profiler import record_function

from smolforge.config import RunConfig
from smolforge.distributed import DistributedContext
from smolforge.model.architecture import CausalLM
from smolforge.training.optim import optimizer_step
from smolforge.training.plan import Plan

# (model, rows of the batch, inputs (B, T), targets (B, T), document ids (B, T) or None) -> the loss to differentiate,
# which adds up over micro-batches and ranks, and the sum of losses to report.
Objective = Callable[[CausalLM, slice, Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor]]


def train_step(
    model: CausalLM, optimizer: torch.optim.Optimizer, plan: Plan, config: RunConfig,
    tokens: Tensor, document_ids: Tensor | None, *,
    lr: float, ranks: DistributedContext, scaler: Any = None, targets: Tensor | None = None, count: int | None = None,
    span: Callable[[str], AbstractContextManager[Any]] = record_function, objective: Objective | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of the global batch in micro-batches, then one update.

    Args:
        tokens: (B, T + 1), this rank's share of the batch.
        document_ids: (B, T + 1) on the host where attention stops at document borders, else None.
        targets: (B, T) of the next tokens, `IGNORE` where one is not learned; all of `tokens` unless given.
        count: targets that are learned, in the global batch; all unless given.
        span: the context of each part ("forward", "backward", "update"), for profiles and timings.
        objective: what is learned instead of the next token.

    Returns:
        Sum of the losses in nats over all ranks (), norm of the gradient before clipping (), and whether the update was
        skipped because one of them is not finite (); all on the device.
    """
    nats = torch.zeros((), dtype=torch.float32, device=tokens.device)
    with ranks.together():
        for start in range(0, len(tokens), plan.micro_batch):
            rows = slice(start, start + plan.micro_batch)
            ids = None if document_ids is None else document_ids[rows, :-1].contiguous()
            inputs = tokens[rows, :-1].contiguous()
            wanted = tokens[rows, 1:].contiguous() if targets is None else targets[rows]
            with span("forward"), plan.precision.context(tokens.device):
                if objective is not None:
                    loss, part = objective(model, rows, inputs, wanted, ids)
                else:
                    loss, part = model.loss(
                        inputs, wanted, document_ids=ids,
                        scale=1 / (count or config.tokens_per_step), z_weight=config.training.z_loss,
                    )  # fmt: skip
            with span("backward"):
                (scaler.scale(loss) if scaler else loss).backward()
            nats += part.float()
    with span("update"):
        norm, skipped = optimizer_step(
            model, optimizer, nats, lr=lr, clip=config.training.grad_clip, ranks=ranks, scaler=scaler
        )
    return nats, norm, skipped
