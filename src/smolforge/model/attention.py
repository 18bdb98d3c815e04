"""Exact causal attention, several ways: one signature, the rest of the code cannot tell which one runs.

`attend(q, k, v, mask) -> y` with q (B, H, T, d), k and v (B, K, S, d), y (B, H, T, d). Query i of T sees the keys up
to S - T + i; where `mask` (B or 1, 1, T, S) is given it replaces that rule.

`sdpa` is torch's own. `blocked` is for training on a CPU, where torch's backward pass is slow: the G = H / K query
heads that share a key head stand as rows of one matrix, blocks of queries meet only the columns they may see, and the
backward pass computes the scores of a block again. Nothing of size T x T is ever kept, so memory grows with T only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]

# Rows of one block's matrix products: enough to run at full speed, few enough that the scores stay in the cache and
# that little above the diagonal is computed (measured in docs/performance.md).
BLOCK_ROWS = 192


def positions_in_documents(document_ids: Tensor) -> Tensor:
    """Positions that start anew with each document, (B, T)."""
    place = torch.arange(document_ids.shape[1], device=document_ids.device).expand_as(document_ids)
    starts = torch.ones_like(document_ids, dtype=torch.bool)
    starts[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    return place - torch.where(starts, place, 0).cummax(dim=1).values


def causal_mask(document_ids: Tensor) -> Tensor:
    """True where a query may look: not later, and in the same document. (B, T) → (B, 1, T, T)."""
    length = document_ids.shape[1]
    earlier = torch.ones(length, length, dtype=torch.bool, device=document_ids.device).tril()
    same = document_ids[:, :, None] == document_ids[:, None, :]
    return (earlier & same)[:, None]


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """torch's scaled_dot_product_attention: flash or cuDNN on CUDA, the flash kernel of ATen on a CPU."""
    t, s = q.shape[2], k.shape[2]
    if mask is None and t not in (1, s):
        mask = torch.ones(t, s, dtype=torch.bool, device=q.device).tril(s - t)
    causal = mask is None and t > 1
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1]
    )


def sdpa_fp32(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """`sdpa` computed in fp32 whatever the precision around it, which some CPUs do faster than bf16."""
    with torch.autocast(q.device.type, enabled=False):
        return sdpa(q.float(), k.float(), v.float(), mask).to(q.dtype)


def blocked(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Blocks of queries that recompute in the backward pass; what it is not made for goes to `sdpa`."""
    batch, heads, length, width = q.shape
    kv_heads = k.shape[1]
    if mask is not None or length != k.shape[2] or length == 1:
        return sdpa(q, k, v, mask)
    group = heads // kv_heads
    # (B, H, T, d) → (B K, T G, d): the rows of a block of positions lie together, whichever heads they belong to.
    rows = (q * width**-0.5).reshape(batch, kv_heads, group, length, width).transpose(2, 3)
    rows = rows.reshape(batch * kv_heads, length * group, width)
    k, v = (x.reshape(batch * kv_heads, length, width) for x in (k, v))
    out = blocked_rows(rows, k, v, group, max(BLOCK_ROWS // group, 1))
    out = out.view(batch, kv_heads, length, group, width).transpose(2, 3)
    return out.reshape(batch, heads, length, width)


# Opaque to torch.compile on purpose: its blocks would otherwise be unrolled into dozens of kernels, each compiled for
# its own number of columns, which took minutes and ran no faster than these few calls.
@torch.library.custom_op("smolforge::blocked_attention", mutates_args=())
def blocked_rows(q: Tensor, k: Tensor, v: Tensor, group: int, block: int) -> Tensor:
    """softmax(q kᵀ) v, causal, in blocks of `block` positions.

    Args:
        q: (N, T G, d), scaled; row r belongs to position r // G.
        k: (N, T, d).
        v: (N, T, d).
        group: G, query heads for each key/value head.

    Returns:
        (N, T G, d).
    """
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    later = _later(block, group, q.device)
    with torch.autocast(q.device.type, enabled=False):
        for start in range(0, k.shape[1], block):
            end = min(start + block, k.shape[1])
            rows = slice(start * group, end * group)
            weights = _weights(q[:, rows], k[:, :end], later)
            out[:, rows] = torch.bmm(weights, v[:, :end])
    return out


@torch.library.custom_op("smolforge::blocked_attention_backward", mutates_args=())
def _blocked_backward(
    gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, group: int, block: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients by q, k and v; those of k and v are summed over blocks in at least fp32."""
    gradient = gradient.contiguous()
    q_gradient = torch.empty_like(q, memory_format=torch.contiguous_format)
    wide = torch.promote_types(k.dtype, torch.float32)
    k_gradient, v_gradient = (torch.zeros_like(x, dtype=wide, memory_format=torch.contiguous_format) for x in (k, v))
    later = _later(block, group, q.device)
    for start in range(0, k.shape[1], block):
        end = min(start + block, k.shape[1])
        rows = slice(start * group, end * group)
        weights = _weights(q[:, rows], k[:, :end], later)
        v_gradient[:, :end] += torch.bmm(weights.transpose(1, 2), gradient[:, rows])
        by_weights = torch.bmm(gradient[:, rows], v[:, :end].transpose(1, 2))
        # ATen's fused backward of softmax: weights * (by_weights - sum(weights * by_weights)).
        by_scores = torch.ops.aten._softmax_backward_data(by_weights, weights, -1, by_weights.dtype)
        q_gradient[:, rows] = torch.bmm(by_scores, k[:, :end])
        k_gradient[:, :end] += torch.bmm(by_scores.transpose(1, 2), q[:, rows])
    return q_gradient, k_gradient.to(k.dtype), v_gradient.to(v.dtype)


def _later(block: int, group: int, device: torch.device) -> Tensor:
    """True where a column of the diagonal square lies behind the row's position, (block G, block)."""
    position = torch.arange(block, device=device)
    return position[None] > position.repeat_interleave(group)[:, None]


def _weights(q: Tensor, k: Tensor, later: Tensor) -> Tensor:
    """Attention of the last rows of a causal triangle: q (N, n G, d), k (N, e, d) → (N, n G, e)."""
    scores = torch.bmm(q, k.transpose(1, 2))
    rows = q.shape[1]
    columns = rows * later.shape[1] // later.shape[0]
    scores[:, :, -columns:].masked_fill_(later[:rows, :columns], -torch.inf)
    return torch.softmax(scores, -1)


@blocked_rows.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, group: int, block: int) -> Tensor:
    return torch.empty_like(q, memory_format=torch.contiguous_format)


@_blocked_backward.register_fake
def _(gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, group: int, block: int) -> tuple[Tensor, Tensor, Tensor]:
    new = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v)]
    return new[0], new[1], new[2]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    q, k, v, ctx.group, ctx.block = inputs
    ctx.save_for_backward(q, k, v)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    return (*_blocked_backward(gradient, *ctx.saved_tensors, ctx.group, ctx.block), None, None)


blocked_rows.register_autograd(_backward, setup_context=_keep)


def flex(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """torch's FlexAttention; worth its name only where the model around it is compiled, on CUDA."""
    if q.shape[2] == 1:
        return sdpa(q, k, v, mask)
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    t, s = q.shape[2], k.shape[2]

    def may_see(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return mask[b if mask.shape[0] > 1 else 0, 0, i, j] if mask is not None else i + (s - t) >= j

    block_mask = create_block_mask(may_see, None if mask is None else q.shape[0], None, t, s, device=q.device.type)
    out = flex_attention(q, k, v, block_mask=block_mask, enable_gqa=q.shape[1] != k.shape[1])
    assert isinstance(out, Tensor)
    return out


WAYS: dict[str, Attend] = {"sdpa": sdpa, "sdpa-fp32": sdpa_fp32, "blocked": blocked, "flex": flex}
