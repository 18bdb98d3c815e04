"""Attention for training in bf16 on a CPU, from attention.cpp: no score leaves the second-level cache.

`attend(q, k, v, mask)` as of `attention.py`. It runs where the processor multiplies bf16 (AVX-512) and there is a
compiler; `unavailable` says why not. What it is not made for (other precisions, a cache, head widths that are no
multiple of 32) goes to `blocked`.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from smolforge import kernels
from smolforge.model.attention import blocked

WIDEST = 256  # head width


class _Sizes(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int32) for name in ("sequences", "heads", "kv_heads", "length", "d", "threads")]


class _Tensor(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), *((name, ctypes.c_int64) for name in ("sequence", "head", "position"))]


def unavailable() -> str | None:
    """Why there is no native attention on this machine, in words; None where there is."""
    missing = kernels.unavailable()
    if missing or kernels.library().smolforge_attention_available():
        return missing
    return "this processor does not multiply bf16 in 512-bit vectors"


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Attention of q (B, H, T, d) over k and v (B, K, T, d) → (B, H, T, d).

    A mask must let no query look ahead, and let each see one unbroken range of keys, as `causal_mask` does."""
    width, length = q.shape[-1], q.shape[2]
    fits = width % 32 == 0 and width <= WIDEST and length == k.shape[2] > 1
    if not fits or not q.dtype == k.dtype == v.dtype == torch.bfloat16:
        return blocked(q, k, v, mask)
    first = None
    if mask is not None:  # the first key that each query sees, (B, T)
        first = mask[:, 0].to(torch.uint8).argmax(-1).to(torch.int32).expand(q.shape[0], -1).contiguous()
    return native_attention(q, k, v, first)[0]


def _rows(x: Tensor) -> Tensor:
    """With d contiguous, as the library reads rows."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _empty(x: Tensor) -> Tensor:
    """(B, heads, T, d) that lies in memory as (B, T, heads, d), which the projection behind reads as it is."""
    batch, heads, length, width = x.shape
    return x.new_empty(batch, length, heads, width).transpose(1, 2)


def _tensor(x: Tensor) -> Any:
    return ctypes.byref(_Tensor(x.data_ptr(), *x.stride()[:3]))


def _call(name: str, q: Tensor, k: Tensor, *arguments: Any) -> None:
    sizes = _Sizes(q.shape[0], q.shape[1], k.shape[1], q.shape[2], q.shape[3], torch.get_num_threads())
    getattr(kernels.library(), name)(ctypes.byref(sizes), *arguments)


def _pointer(x: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if x is None else x.data_ptr())


@torch.library.custom_op("smolforge::native_attention", mutates_args=())
def native_attention(q: Tensor, k: Tensor, v: Tensor, first: Tensor | None) -> tuple[Tensor, Tensor]:
    """Causal attention in bf16.

    Args:
        q: (B, H, T, d).
        k: (B, K, T, d).
        v: (B, K, T, d).
        first: (B, T) int32, the first key that each query sees; all before it unless given.

    Returns:
        (B, H, T, d) bf16, and the logarithms to base 2 of the sums of exponentials, (B, H, T) fp32.
    """
    q, k, v = _rows(q), _rows(k), _rows(v)
    out, log_sums = _empty(q), q.new_empty(q.shape[:3], dtype=torch.float32)
    _call("smolforge_attention", q, k, *map(_tensor, (q, k, v)), _pointer(first), _tensor(out), _pointer(log_sums))
    return out, log_sums


@torch.library.custom_op("smolforge::native_attention_backward", mutates_args=())
def _native_backward(
    gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, first: Tensor | None, out: Tensor, log_sums: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    gradient, q, k, v, out = map(_rows, (gradient, q, k, v, out))
    made = _empty(q), _empty(k), _empty(v)
    _call(
        "smolforge_attention_backward", q, k, *map(_tensor, (q, k, v)), _pointer(first), _tensor(out),
        _pointer(log_sums), _tensor(gradient), *map(_tensor, made),
    )  # fmt: skip
    return made


@native_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, first: Tensor | None) -> tuple[Tensor, Tensor]:
    return _empty(q), q.new_empty(q.shape[:3], dtype=torch.float32)


@_native_backward.register_fake
def _(
    gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, first: Tensor | None, out: Tensor, log_sums: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return _empty(q), _empty(k), _empty(v)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*inputs, *output)


def _backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return (*_native_backward(gradient, *ctx.saved_tensors), None)


native_attention.register_autograd(_backward, setup_context=_keep)
