"""The loss of the next token, without storing the logits as a whole.

Tokens go through the head in chunks, and the gradients of hidden states and head are made in the forward pass of each
chunk. So no logits are kept and nothing is computed twice: three matrix products, as many as plain cross-entropy needs.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from smolforge import kernels
from smolforge.devices import sum_type
from smolforge.errors import BadInput, unknown

# As `torch_chunk_loss`.
ChunkLoss = Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]
LossFunction = Callable[..., tuple[Tensor, Tensor]]
# Tokens whose logits exist at a time: on a CPU few enough for its cache, on a GPU enough to fill it.
CHUNK, GPU_CHUNK = 1024, 8192
PIECE = 2048  # rows of the head that are summed at a time
ROWS = 128  # `without_ignored` keeps a multiple of this: with few sizes, freed memory fits what is allocated next
IGNORE = -100  # targets of this value take no part, as in torch's cross_entropy


def torch_chunk_loss(logits: Tensor, targets: Tensor, scale: Tensor, z_weight: float) -> tuple[Tensor, Tensor]:
    """Sum of cross-entropies and weighted sum of z-losses of one chunk, both () in at least fp32.

    Args:
        logits: (n, V), any precision; the gradient by them takes their place.
        targets: (n,), `IGNORE` where a position does not count.
        scale: () or (n,), factor of the gradient.
        z_weight: weight of the squared log normaliser (z-loss; Chowdhery et al. 2022, arXiv:2204.02311).
    """
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    log_p = torch.log_softmax(wide, -1)
    counts = (targets != IGNORE)[:, None]
    index = targets.clamp(min=0)[:, None]
    log_p_target = log_p.gather(1, index)
    log_z = wide.gather(1, index) - log_p_target  # (n, 1)
    cross_entropy = -torch.where(counts, log_p_target, 0.0).sum()
    z_loss = z_weight * torch.where(counts, log_z.square(), 0.0).sum()
    # d/dlogits of log_z - logit[target] + w log_z^2 is p (1 + 2 w log_z) - [column = target]. In place, for each pass
    # through (n, V) counts outside of torch.compile; inside, a scatter would prevent the fusion of these passes.
    factor = torch.where(counts, scale if scale.dim() == 0 else scale[:, None], 0.0)
    gradient = log_p.exp_().mul_(factor * (1 + 2 * z_weight * log_z))
    if torch.compiler.is_compiling():
        columns = torch.arange(logits.shape[1], device=logits.device)
        gradient = gradient - torch.where(columns == index, factor, 0.0)
    else:
        gradient.scatter_add_(1, index, -factor)
    logits.copy_(gradient)
    return cross_entropy, z_loss


def native_chunk_loss(logits: Tensor, targets: Tensor, scale: Tensor, z_weight: float) -> tuple[Tensor, Tensor]:
    """As `torch_chunk_loss`, in C++ for fp32 and bf16 on a CPU: the logits are read from memory twice, not six times.

    Raises:
        IndexError: a target is not a column of the logits.
    """
    kinds = (torch.float32, torch.bfloat16)
    if logits.device.type != "cpu" or logits.dtype not in kinds or not logits.is_contiguous():
        return torch_chunk_loss(logits, targets, scale, z_weight)
    targets = targets.to(torch.int64).contiguous()
    count, words = logits.shape
    if count and not bool(((targets == IGNORE) | ((targets >= 0) & (targets < words))).all()):
        raise IndexError(f"a target is outside of the {words:,} columns")
    cross_entropy, z_loss = torch.empty(2, count, dtype=torch.float64)
    scales = scale.float().expand(count).contiguous()
    kernels.library().smolforge_loss(
        ctypes.c_int64(count), ctypes.c_int64(words), ctypes.c_void_p(logits.data_ptr()),
        int(logits.dtype == torch.bfloat16), ctypes.c_void_p(targets.data_ptr()), ctypes.c_int64(IGNORE),
        ctypes.c_void_p(scales.data_ptr()), ctypes.c_float(z_weight), ctypes.c_void_p(cross_entropy.data_ptr()),
        ctypes.c_void_p(z_loss.data_ptr()), torch.get_num_threads(),
    )  # fmt: skip
    return cross_entropy.sum().float(), z_loss.sum().float()


def chunk_of(device: torch.device) -> int:
    """Tokens whose logits exist at a time on a device."""
    return GPU_CHUNK if device.type == "cuda" else CHUNK


def _add_product(total: Tensor, gradient: Tensor, rows: Tensor, first: bool) -> None:
    """Add gradientᵀ rows, (V, D), to `total`, which holds nothing yet where it is the first."""
    if total.dtype == gradient.dtype:
        total.addmm_(gradient.t(), rows, beta=0 if first else 1)
    elif total.device.type == "cuda":
        # The product leaves the GPU's registers in fp32: nothing is rounded between two chunks.
        product = torch.mm(gradient.t(), rows, out_dtype=total.dtype)
        total.copy_(product) if first else total.add_(product)
    else:
        # torch widens an operand before it adds it: in pieces, what was widened stays in the cache.
        for part, piece in zip(total.split(PIECE), (gradient.t() @ rows).split(PIECE), strict=True):
            part.copy_(piece) if first else part.add_(piece)


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, scale: float, chunk: int, z_weight: float,
        chunk_loss: ChunkLoss, factors: Tensor | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        count = hidden.shape[0]
        # Once per micro-batch; a weight in the precision of the hidden states is used as it is.
        used = weight.to(hidden.dtype)
        wide = torch.promote_types(hidden.dtype, torch.float32)
        hidden_gradient = torch.empty_like(hidden)
        # Summed over chunks in fp32, whatever the weight is stored in.
        summed = torch.promote_types(weight.dtype, torch.float32)
        weight_gradient = None
        if ctx.needs_input_grad[1]:  # beside an adapter the head stays as it is
            weight_gradient = (torch.empty_like if count else torch.zeros_like)(weight, dtype=summed)
        loss, extra = torch.zeros(2, dtype=wide, device=hidden.device)
        # 1 / tokens is below what fp16 holds: there the gradients are made unscaled, and scaled in the backward pass,
        # together with the gradient scaler's factor.
        made_with = 1.0 if hidden.dtype == torch.float16 else scale
        factor = torch.full((), made_with, dtype=wide, device=hidden.device)
        if factors is not None:
            factor = factors.to(wide) * factor
        # One buffer for all chunks: fresh memory of this size costs as much as a pass through it.
        buffer = hidden.new_empty(min(count, chunk), weight.shape[0])
        for start in range(0, count, chunk):
            rows = hidden[start : start + chunk]
            gradient = torch.mm(rows, used.t(), out=buffer[: rows.shape[0]])
            part = factor if factors is None else factor[start : start + chunk]
            cross_entropy, z_loss = chunk_loss(gradient, targets[start : start + chunk], part, z_weight)
            loss, extra = loss + cross_entropy, extra + z_loss
            torch.mm(gradient, used, out=hidden_gradient[start : start + chunk])
            if weight_gradient is not None:
                _add_product(weight_gradient, gradient, rows, first=start == 0)
        if weight_gradient is not None:
            weight_gradient = weight_gradient.to(weight.dtype)
        ctx.gradients, ctx.rest = (hidden_gradient, weight_gradient), scale / made_with
        ctx.mark_non_differentiable(loss)
        return (loss + extra) * scale, loss

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if ctx.gradients is None:
            raise RuntimeError("backward through the chunked loss a second time needs retain_graph=True")
        made = [each for each in ctx.gradients if each is not None]  # none of a head that does not learn
        if ctx.rest == 1:
            factors = [gradient.to(each.dtype) for each in made]
        else:
            # With a dimension, torch multiplies in fp32 and rounds once.
            factors = [(gradient * ctx.rest).reshape(1)] * len(made)
        if torch._C._autograd._get_current_graph_task_keep_graph():  # pyright: ignore[reportAttributeAccessIssue]
            scaled = [(each * factor).to(each.dtype) for each, factor in zip(made, factors, strict=True)]
        else:
            # The gradient of the head is as large as the head: scaled in place, and not kept.
            ctx.gradients = None
            scaled = [each.mul_(factor) for each, factor in zip(made, factors, strict=True)]
        return scaled[0], scaled[1] if len(scaled) > 1 else None, None, None, None, None, None, None


def chunked_loss(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, scale: float, chunk: int | None = None, z_weight: float = 0.0,
    factors: Tensor | None = None, chunk_loss: ChunkLoss = torch_chunk_loss,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`scale` times the sum of cross-entropies and z-losses, (), and the sum of cross-entropies in nats, ().

    Args:
        hidden: (N, D) hidden states; the logits have their precision.
        weight: (V, D) of the head, in any precision.
        targets: (N,), `IGNORE` where a position does not count.
        scale: see `CausalLM.loss`.
        chunk: tokens whose logits exist at a time; `chunk_of` the device unless given.
        z_weight: weight of the z-loss.
        factors: (N,) of the gradient of each token; 1 unless given.
        chunk_loss: as `torch_chunk_loss`.
    """
    chunk = chunk or chunk_of(hidden.device)
    return _ChunkedLoss.apply(hidden, weight, targets, scale, chunk, z_weight, chunk_loss, factors)  # type: ignore[return-value]


def without_ignored(hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The positions that count, of hidden states (N, D) and targets (N,), in their order, and less than `ROWS` others.

    In a conversation only the answers count: this spares the head, a fifth of SmolLM2's products, the rest.
    """
    ignored = targets == IGNORE
    kept = -(-int((~ignored).sum()) // ROWS) * ROWS
    if kept >= len(targets):
        return hidden, targets
    order = ignored.int().argsort(stable=True)[:kept]
    return hidden[order], targets[order]


def full_loss(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, scale: float, z_weight: float = 0.0
) -> tuple[Tensor, Tensor]:
    """As `chunked_loss`, with all logits at once and autograd's own backward pass."""
    logits = hidden @ weight.to(hidden.dtype).t()
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    total = F.cross_entropy(wide, targets, ignore_index=IGNORE, reduction="sum")
    loss = total * scale
    if z_weight:
        log_z = torch.where(targets != IGNORE, wide.logsumexp(-1), 0.0)
        loss = loss + scale * z_weight * log_z.square().sum()
    return loss, total.detach()


def linear_loss(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, scale: float, z_weight: float = 0.0
) -> tuple[Tensor, Tensor]:
    """As `chunked_loss`, by torch's own `linear_cross_entropy`; raises BadInput before torch 2.13, and for a z-loss."""
    function, options = getattr(F, "linear_cross_entropy", None), getattr(torch.nn, "LinearCrossEntropyOptions", None)
    if function is None or options is None:
        missing = f"torch {torch.__version__} has no linear_cross_entropy"
        raise BadInput(missing, field="training.loss", hint="Use chunked.")
    if z_weight:
        raise BadInput("linear has no z-loss", field="training.loss", hint="Use chunked, or training.z_loss=0.")
    total = function(hidden, weight.to(hidden.dtype), targets, reduction="sum", ignore_index=IGNORE, options=options())
    # Under 16 bits its sum comes back in 16 bits.
    return total.to(torch.promote_types(total.dtype, torch.float32)) * scale, total.detach()


@torch.no_grad()
def evaluation_loss(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, scale: float = 1.0, z_weight: float = 0.0
) -> tuple[Tensor, Tensor]:
    """As `chunked_loss`, without gradients; sums of chunks are added in fp64 where the device has it."""
    used = weight.to(hidden.dtype)
    loss, nats = torch.zeros(2, dtype=sum_type(hidden.device), device=hidden.device)
    chunk = chunk_of(hidden.device)
    for rows, words in zip(hidden.split(chunk), targets.split(chunk), strict=True):
        part, part_nats = full_loss(rows, used, words, scale=1.0, z_weight=z_weight)
        loss, nats = loss + part, nats + part_nats
    return loss * scale, nats


@torch.no_grad()
def token_losses(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of each token in nats, fp32 (N,), 0 where a target is `IGNORE`; arguments as of `chunked_loss`."""
    used, losses = weight.to(hidden.dtype), []
    chunk = chunk_of(hidden.device) // 4  # fp32 logits, and twice more of them
    for rows, words in zip(hidden.split(chunk), targets.split(chunk), strict=True):
        losses.append(F.cross_entropy((rows @ used.t()).float(), words, ignore_index=IGNORE, reduction="none"))
    return torch.cat(losses)


LOSSES: dict[str, LossFunction] = {
    "chunked": chunked_loss,
    "native": functools.partial(chunked_loss, chunk_loss=native_chunk_loss),
    "linear": linear_loss,
    "full": full_loss,
}


@functools.cache
def choose_loss(name: str, *, compiled: bool = False) -> LossFunction:
    """The loss of a name, as `chunked_loss`; `compiled` compiles its chunk where it has one in Python.

    Raises:
        BadInput: there is no such loss.
    """
    if name not in LOSSES:
        raise unknown("loss", name, LOSSES, field="training.loss")
    if name == "chunked" and compiled:
        return functools.partial(chunked_loss, chunk_loss=torch.compile(torch_chunk_loss, dynamic=False))
    return LOSSES[name]
