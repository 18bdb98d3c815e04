"""Exact causal attention, several ways: one signature, and the rest of the code cannot tell which one runs.

`attend(q, k, v, mask) -> y` with q (B, H, T, d), k and v (B, K, S, d), y (B, H, T, d). Query i of T sees the keys up
to S - T + i; where `mask` (B or 1, 1, T, S) is given it replaces that rule.

    sdpa       torch's own
    sdpa-fp32  the same in fp32, whatever the precision around it
    blocked    for training on a CPU, where torch's backward pass is slow: blocks of queries, the G = H / K heads that
               share a key head as rows of one matrix, meet only the columns they may see, and the backward pass
               computes the scores of a block again. No T x T scores are kept
    native     attention.cpp, in bf16 on a CPU that multiplies bf16: scores stay in the second-level cache
    flex       torch's FlexAttention, for compiled models on CUDA
    expanded   `sdpa` with a key/value head for each query head, for the kernels of a GPU that know no groups
    varlen     torch's varlen_attn: documents of any length end to end, without a mask

`documents.py` makes the mask of a batch of documents in the form that each of them reads.
"""

from __future__ import annotations

import ctypes
import inspect
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from smolforge import kernels
from smolforge.errors import unknown

Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]

# Rows of one block's matrix products: enough for full speed, few enough that the scores stay in the cache and that
# little above the diagonal is computed.
BLOCK_ROWS = 192
VARLEN_HAS_GROUPS = torch.__version__ >= "2.12"


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """torch's scaled_dot_product_attention: flash or cuDNN on CUDA, the flash kernel of ATen on a CPU."""
    t, s = q.shape[2], k.shape[2]
    if mask is None and t not in (1, s):
        mask = torch.ones(t, s, dtype=torch.bool, device=q.device).tril(s - t)
    causal, grouped = mask is None and t > 1, q.shape[1] != k.shape[1]
    if grouped and not causal and q.device.type == "cuda":
        return as_rows(q, k, v, mask)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=grouped)


def expanded(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """`sdpa` with each key/value head repeated in memory for the query heads that share it.

    Flash is the only kernel of CUDA that knows groups, and it takes neither a mask, nor fp32, nor a GPU before Ampere.
    Without it torch would keep all scores: 302 MB a layer for a sequence of 2,048 tokens.
    """
    group = q.shape[1] // k.shape[1]
    if group > 1:
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    return sdpa(q, k, v, mask)


def varlen_unavailable() -> str | None:
    """The reason why torch has no kernel for `varlen`; None where it has."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return f"torch {torch.__version__} has no varlen_attn"
    if "window_size" in inspect.signature(varlen_attn).parameters:
        return None
    return f"varlen_attn of torch {torch.__version__} has no windows"


def varlen(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Documents end to end, in 16 bits on CUDA: `mask` is of `document_borders`; what has another goes to `sdpa`."""
    if mask is None or mask.dim() != 1:
        return sdpa(q, k, v, mask)
    batch, heads, length, width = q.shape
    q, k, v = (x.transpose(1, 2).reshape(batch * length, -1, width) for x in (q, k, v))  # (B T, heads, d)
    if q.device.type == "cuda":
        from torch.nn.attention.varlen import varlen_attn

        groups: dict[str, Any] = {"enable_gqa": heads != k.shape[1]}
        if not VARLEN_HAS_GROUPS:
            k, v, groups = *(x.repeat_interleave(heads // x.shape[1], 1) for x in (k, v)), {}
        out = varlen_attn(q, k, v, mask, mask, length, length, window_size=(-1, 0), **groups)
    else:
        borders = mask.tolist()
        documents = [slice(a, b) for a, b in itertools.pairwise(borders) if a < b]
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        parts = [sdpa(q[:, :, part], k[:, :, part], v[:, :, part], None) for part in documents]
        out = torch.cat(parts, 2)[0].transpose(0, 1)
    assert isinstance(out, Tensor)
    return out.view(batch, length, heads, width).transpose(1, 2)


def as_rows(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """`sdpa` of one position, or with a mask, with the query heads of a group as rows of one head.

    So kernels that know no groups need not repeat keys and values, and CUDA's memory-efficient one keeps no scores.
    """
    rows = q.reshape(q.shape[0], k.shape[1], -1, q.shape[3])  # (B, K, G T, d)
    if mask is not None:
        mask = mask.repeat(1, 1, q.shape[1] // k.shape[1], 1)
    return F.scaled_dot_product_attention(rows, k, v, attn_mask=mask).reshape(q.shape)


def sdpa_fp32(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """`sdpa` computed in fp32 whatever the precision around it, which some CPUs do faster than bf16."""
    with torch.autocast(q.device.type, enabled=False):
        return sdpa(q.float(), k.float(), v.float(), mask).to(q.dtype)


def blocked(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Blocks of queries that recompute in the backward pass; what it is not made for goes to `sdpa`.

    A mask must let no query look ahead, as `causal_mask` does."""
    batch, heads, length, width = q.shape
    kv_heads = k.shape[1]
    if length != k.shape[2] or length == 1:
        return sdpa(q, k, v, mask)
    group = heads // kv_heads
    # (B, H, T, d) → (B K, T G, d): the rows of a block of positions lie together, whichever heads they belong to.
    rows = (q * width**-0.5).reshape(batch, kv_heads, group, length, width).transpose(2, 3)
    rows = rows.reshape(batch * kv_heads, length * group, width)
    k, v = (x.reshape(batch * kv_heads, length, width) for x in (k, v))
    seen = None if mask is None else mask[:, 0]
    out = blocked_rows(rows, k, v, seen, group, max(BLOCK_ROWS // group, 1))
    out = out.view(batch, kv_heads, length, group, width).transpose(2, 3)
    return out.reshape(batch, heads, length, width)


# Opaque to torch.compile on purpose: it would compile dozens of kernels, one for each number of columns, for minutes.
@torch.library.custom_op("smolforge::blocked_attention", mutates_args=())
def blocked_rows(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, group: int, block: int) -> Tensor:
    """softmax(q kᵀ) v, causal, in blocks of `block` positions, (N, T G, d).

    Args:
        q: (N, T G, d), scaled; row r belongs to position r // G.
        k, v: (N, T, d).
        mask: (M, T, T), true where a position may look; M divides N, and each mask holds for N / M neighbours.
        group: G, query heads for each key/value head.
    """
    out = _empty(q)
    with torch.autocast(q.device.type, enabled=False):
        for rows, columns, hidden in _blocks(k.shape[1], block, group, mask, q.device):
            weights = _weights(q[:, rows], k[:, columns], hidden)
            out[:, rows] = torch.bmm(weights, v[:, columns])
    return out


@torch.library.custom_op("smolforge::blocked_attention_backward", mutates_args=())
def _blocked_backward(
    gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, group: int, block: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients by q, k and v; those of k and v are summed over blocks in at least fp32."""
    gradient, q_gradient = gradient.contiguous(), _empty(q)
    wide = torch.promote_types(k.dtype, torch.float32)
    k_gradient, v_gradient = (torch.zeros_like(x, dtype=wide, memory_format=torch.contiguous_format) for x in (k, v))
    for rows, columns, hidden in _blocks(k.shape[1], block, group, mask, q.device):
        weights = _weights(q[:, rows], k[:, columns], hidden)
        v_gradient[:, columns] += torch.bmm(weights.transpose(1, 2), gradient[:, rows])
        by_weights = torch.bmm(gradient[:, rows], v[:, columns].transpose(1, 2))
        # ATen's fused backward of softmax: weights * (by_weights - sum(weights * by_weights)).
        by_scores = torch.ops.aten._softmax_backward_data(by_weights, weights, -1, by_weights.dtype)
        q_gradient[:, rows] = torch.bmm(by_scores, k[:, columns])
        k_gradient[:, columns] += torch.bmm(by_scores.transpose(1, 2), q[:, rows])
    return q_gradient, k_gradient.to(k.dtype), v_gradient.to(v.dtype)


def _blocks(
    length: int, block: int, group: int, mask: Tensor | None, device: torch.device
) -> Iterator[tuple[slice, slice, Tensor]]:
    """Rows of q that go together, the columns that any of them sees, and which of the last columns are hidden.

    What is hidden is (M or 1, 1, positions, 1, columns); columns before those it covers are seen by all.
    """
    position = torch.arange(block, device=device)
    later = (position[None] > position[:, None])[None, None, :, None]
    # The first column that each position sees, of any of the masks.
    first = None if mask is None else mask.any(0).to(torch.uint8).argmax(-1)
    for start in range(0, length, block):
        end = min(start + block, length)
        rows = slice(start * group, end * group)
        if mask is None or first is None:
            yield rows, slice(0, end), later[:, :, : end - start, :, : end - start]
        else:
            columns = slice(int(first[start:end].min()), end)
            yield rows, columns, ~mask[:, None, start:end, None, columns]


def _weights(q: Tensor, k: Tensor, hidden: Tensor) -> Tensor:
    """softmax(q kᵀ) where the last columns are partly hidden: q (N, n G, d), k (N, e, d) → (N, n G, e)."""
    scores = torch.bmm(q, k.transpose(1, 2))
    masks, positions, covered = hidden.shape[0], hidden.shape[2], hidden.shape[4]
    places = scores.view(masks, -1, positions, scores.shape[1] // positions, scores.shape[2])
    places[..., -covered:].masked_fill_(hidden, -torch.inf)
    return torch.softmax(scores, -1)


def _empty(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    q, k, v, mask, ctx.group, ctx.block = inputs
    ctx.save_for_backward(q, k, v, mask)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    return (*_blocked_backward(gradient, *ctx.saved_tensors, ctx.group, ctx.block), None, None, None)


blocked_rows.register_fake(lambda q, k, v, mask, group, block: _empty(q))
_blocked_backward.register_fake(lambda gradient, q, k, v, mask, group, block: (_empty(q), _empty(k), _empty(v)))
blocked_rows.register_autograd(_backward, setup_context=_keep)


def flex(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """torch's FlexAttention; fast only where the model around it is compiled, on CUDA."""
    if q.shape[2] == 1:
        return sdpa(q, k, v, mask)
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    t, s = q.shape[2], k.shape[2]
    seen = None if mask is None else mask[:, 0].expand(len(q), t, s)

    def may_see(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return i + (s - t) >= j if seen is None else seen[b, i, j]

    block_mask = create_block_mask(may_see, None if mask is None else q.shape[0], None, t, s, device=q.device.type)
    out = flex_attention(q, k, v, block_mask=block_mask, enable_gqa=q.shape[1] != k.shape[1])
    assert isinstance(out, Tensor)
    return out


class _Sizes(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int32) for name in ("sequences", "heads", "kv_heads", "length", "d", "threads")]


class _Tensor(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), *((name, ctypes.c_int64) for name in ("sequence", "head", "position"))]


def native_unavailable() -> str | None:
    """The reason why `native` cannot run on this machine; None where it can."""
    missing = kernels.unavailable()
    if missing or kernels.library().smolforge_attention_available():
        return missing
    return "this processor does not multiply bf16 in 512-bit vectors"


def native(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """attention.cpp, in bf16; other precisions, a cache and widths that are not a multiple of 32 use `blocked`.

    A mask must let no query look ahead, and let each see one unbroken range of keys, as `causal_mask` does."""
    width, length = q.shape[-1], q.shape[2]
    fits = width % 32 == 0 and width <= 256 and length == k.shape[2] > 1  # of attention.cpp
    if not fits or not q.dtype == k.dtype == v.dtype == torch.bfloat16:
        return blocked(q, k, v, mask)
    first = None
    if mask is not None:  # the first key that each query sees, (B, T): what it sees ends at itself
        after = torch.arange(1, length + 1, dtype=torch.int32)
        first = (after - mask[:, 0].sum(-1, dtype=torch.int32)).expand(q.shape[0], -1).contiguous()
    return native_rows(q, k, v, first)[0]


def _rows(x: Tensor) -> Tensor:
    """With d contiguous, as the library reads rows."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _empty_rows(x: Tensor) -> Tensor:
    """(B, heads, T, d) that lies in memory as (B, T, heads, d), which the projection after it reads as it is."""
    batch, heads, length, width = x.shape
    return x.new_empty(batch, length, heads, width).transpose(1, 2)


def _empty_output(q: Tensor) -> tuple[Tensor, Tensor]:
    return _empty_rows(q), q.new_empty(q.shape[:3], dtype=torch.float32)


def _tensor(x: Tensor) -> Any:
    return ctypes.byref(_Tensor(x.data_ptr(), *x.stride()[:3]))


def _call(name: str, q: Tensor, k: Tensor, *arguments: Any) -> None:
    sizes = _Sizes(q.shape[0], q.shape[1], k.shape[1], q.shape[2], q.shape[3], torch.get_num_threads())
    getattr(kernels.library(), name)(ctypes.byref(sizes), *arguments)


def _pointer(x: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if x is None else x.data_ptr())


@torch.library.custom_op("smolforge::native_attention", mutates_args=())
def native_rows(q: Tensor, k: Tensor, v: Tensor, first: Tensor | None) -> tuple[Tensor, Tensor]:
    """Causal attention, (B, H, T, d) in bf16, and the base-2 logarithms of the sums of exponentials, (B, H, T) in fp32.

    q (B, H, T, d), k and v (B, K, T, d); `first` (B, T) int32 is the first key that each query sees, None for 0.
    """
    q, k, v = _rows(q), _rows(k), _rows(v)
    out, log_sums = _empty_output(q)
    _call("smolforge_attention", q, k, *map(_tensor, (q, k, v)), _pointer(first), _tensor(out), _pointer(log_sums))
    return out, log_sums


@torch.library.custom_op("smolforge::native_attention_backward", mutates_args=())
def _native_backward(
    gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, first: Tensor | None, out: Tensor, log_sums: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    gradient, q, k, v, out = map(_rows, (gradient, q, k, v, out))
    made = _empty_rows(q), _empty_rows(k), _empty_rows(v)
    _call(
        "smolforge_attention_backward", q, k, *map(_tensor, (q, k, v)), _pointer(first), _tensor(out),
        _pointer(log_sums), _tensor(gradient), *map(_tensor, made),
    )  # fmt: skip
    return made


def _keep_native(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*inputs, *output)


def _native_gradients(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return (*_native_backward(gradient, *ctx.saved_tensors), None)


native_rows.register_fake(lambda q, k, v, first: _empty_output(q))
_native_backward.register_fake(
    lambda gradient, q, k, v, first, out, log_sums: (_empty_rows(q), _empty_rows(k), _empty_rows(v))
)
native_rows.register_autograd(_native_gradients, setup_context=_keep_native)


ATTENTION: dict[str, Attend] = {
    "sdpa": sdpa, "sdpa-fp32": sdpa_fp32, "blocked": blocked, "native": native, "flex": flex, "expanded": expanded,
    "varlen": varlen,
}  # fmt: skip


def choose_attention(asked: str | Attend) -> Attend:
    """The implementation of a name, or the function itself; raises BadInput where there is none."""
    if not isinstance(asked, str):
        return asked
    if asked not in ATTENTION:
        raise unknown("attention", asked, ATTENTION, field="training.attention")
    return ATTENTION[asked]
