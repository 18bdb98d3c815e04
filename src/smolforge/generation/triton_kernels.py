"""Kernels for decoding on a GPU, in Triton, where the plain formulation would start five for one.

Between two matrix products of a decoded token there is little to compute, and each kernel costs microseconds to
start, even in a graph. So adding and normalizing are one kernel, rotation and writing to the pages another; int8
weights are multiplied as they lie in memory; and attention reads the pages where they are, several programs for one
sequence where it is long and alone (Dao et al. 2023, flash-decoding).

Activations are bf16, sums fp32. Under TRITON_INTERPRET=1 all of it runs on a CPU, in fp32: the interpreter knows
no bf16 products. Importing this file needs `triton`, which torch brings along where it has CUDA.

Shapes: as in static.py.
"""

# pyright: reportMissingImports=false, reportIndexIssue=false, reportArgumentType=false
# ruff: noqa: N803 - Triton's constants are written large

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from smolforge.generation.fused import Attend, Linear, Rotary, unpacking
from smolforge.generation.paged_attention import PagedKernels
from smolforge.generation.pages import PAGE
from smolforge.generation.quantize import Int8, Weight

FEW_ROWS = 64  # above this many rows a product is limited by arithmetic, which cuBLAS does better
MOST_SPLITS = 32  # programs that share one sequence's keys
PROGRAMS = 256  # that a large GPU runs at once: about two for each multiprocessor


@triton.jit
def _dot(a, b, WIDE: tl.constexpr):
    if WIDE:
        product = tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    else:
        product = tl.dot(a.to(tl.bfloat16), b.to(tl.bfloat16))
    return product


@triton.jit
def _int8_linear(
    x, w, scales, y, M, N, K,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    total = tl.zeros([BM, BN], tl.float32)
    for start in range(0, K, BK):
        k = start + tl.arange(0, BK)
        rows = tl.load(x + m[:, None] * K + k[None, :], mask=(m < M)[:, None] & (k < K)[None, :], other=0.0)
        # A head of 49,152 rows and more than 43,690 columns would overflow 32 bits; addresses are 64 bits wide.
        at = n.to(tl.int64)[None, :] * K + k[:, None]
        weights = tl.load(w + at, mask=(n < N)[None, :] & (k < K)[:, None], other=0)
        total += _dot(rows, weights, WIDE)
    total *= tl.load(scales + n, mask=n < N, other=0.0)[None, :]
    at = m.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(y + at, total.to(y.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :])


@triton.jit
def _add_norm(x, delta, weight, added, y, D, eps, ADDS: tl.constexpr, BD: tl.constexpr):
    at, column = tl.program_id(0).to(tl.int64) * D, tl.arange(0, BD)
    inside = column < D
    row = tl.load(x + at + column, mask=inside, other=0.0).to(tl.float32)
    if ADDS:
        row += tl.load(delta + at + column, mask=inside, other=0.0).to(tl.float32)
        # The norm is of what the residual stream holds, which is rounded.
        rounded = row.to(x.dtype.element_ty)
        tl.store(added + at + column, rounded, mask=inside)
        row = rounded.to(tl.float32)
    row *= 1 / tl.sqrt(tl.sum(row * row, 0) / D + eps)
    row *= tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + at + column, row.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _swiglu(gate_up, y, I, BI: tl.constexpr):  # noqa: E741 - the width inside the MLP
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BI + tl.arange(0, BI)
    inside = column < I
    gate = tl.load(gate_up + row * 2 * I + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * I + I + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + row * I + column, (gate / (1 + tl.exp(-gate)) * up).to(y.dtype.element_ty), mask=inside)


@triton.jit
def _rotate_and_write(
    qkv, cos, sin, inputs, q, memory,
    P: tl.constexpr, PAGE: tl.constexpr, H: tl.constexpr, K: tl.constexpr, D: tl.constexpr, BHALF: tl.constexpr,
):  # fmt: skip
    """One head of one row: a query goes to q (B, H, d), a key or value to its place in the pages."""
    row, head = tl.program_id(0), tl.program_id(1)
    i, half = tl.arange(0, BHALF), D // 2
    inside, which = i < half, head + 0 * i  # a block, as masks are
    at = qkv + (row * (H + 2 * K) + head) * D + i
    first = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(at + half, mask=inside, other=0.0).to(tl.float32)
    position = tl.load(inputs + row * (2 + P) + 1)
    turns = inside & (which < H + K)  # values do not
    c = tl.load(cos + position * D + i, mask=turns, other=1.0).to(tl.float32)
    s = tl.load(sin + position * D + i, mask=turns, other=0.0).to(tl.float32)
    turned, other = first * c - second * s, second * c + first * s
    to = q + (row * H + head) * D + i
    tl.store(to, turned.to(q.dtype.element_ty), mask=inside & (which < H))
    tl.store(to + half, other.to(q.dtype.element_ty), mask=inside & (which < H))
    page = tl.load(inputs + row * (2 + P) + 2 + position // PAGE)
    # Keys and values of a position lie one after the other, (2, K, d), as they do in the joint product.
    to = memory + ((page * PAGE + position % PAGE) * 2 * K + (head - H)) * D + i
    tl.store(to, turned.to(memory.dtype.element_ty), mask=inside & (which >= H))
    tl.store(to + half, other.to(memory.dtype.element_ty), mask=inside & (which >= H))


@triton.jit
def _attend(
    q, memory, inputs, out, parts, peaks, weights, scale,
    P: tl.constexpr, PAGE: tl.constexpr, SPLITS: tl.constexpr, K: tl.constexpr, G: tl.constexpr, D: tl.constexpr,
    BG: tl.constexpr, BD: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """The heads of one group of one row over one share of its pages, with a running softmax."""
    row, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    g, d, place = tl.arange(0, BG), tl.arange(0, BD), tl.arange(0, PAGE)
    position = tl.load(inputs + row * (2 + P) + 1).to(tl.int32)
    held = (g < G)[:, None] & (d < D)[None, :]
    asked = tl.load(q + ((row * K + head) * G + g[:, None]) * D + d[None, :], mask=held, other=0.0)
    peak = tl.full([BG], float("-inf"), tl.float32)
    weight = tl.zeros([BG], tl.float32)
    mixed = tl.zeros([BG, BD], tl.float32)
    share = P // SPLITS
    start = split * share
    for page in range(start, tl.minimum(start + share, position // PAGE + 1)):
        number = tl.load(inputs + row * (2 + P) + 2 + page)
        at = memory + ((number * PAGE + place) * 2 * K + head) * D
        keys = tl.load(at[None, :] + d[:, None], mask=(d < D)[:, None], other=0.0)  # (d, PAGE)
        scores = _dot(asked, keys, WIDE) * scale
        scores = tl.where((page * PAGE + place)[None, :] <= position, scores, float("-inf"))
        higher = tl.maximum(peak, tl.max(scores, 1))  # finite: the first place of each of these pages is seen
        shrunk, scores = tl.exp(peak - higher), tl.exp(scores - higher[:, None])
        values = tl.load(at[:, None] + K * D + d[None, :], mask=(d < D)[None, :], other=0.0)  # (PAGE, d)
        mixed = mixed * shrunk[:, None] + _dot(scores, values, WIDE)
        weight = weight * shrunk + tl.sum(scores, 1)
        peak = higher
    if SPLITS == 1:
        to = out + ((row * K + head) * G + g[:, None]) * D + d[None, :]
        tl.store(to, (mixed / weight[:, None]).to(out.dtype.element_ty), mask=held)
    else:
        part = ((row * K + head) * G + g) * SPLITS + split
        tl.store(parts + part[:, None] * D + d[None, :], mixed, mask=held)
        tl.store(peaks + part, peak, mask=g < G)
        tl.store(weights + part, weight, mask=g < G)


@triton.jit
def _join(out, parts, peaks, weights, SPLITS: tl.constexpr, D: tl.constexpr, BD: tl.constexpr):
    """One head of one row: the shares of its pages, weighted by what each saw."""
    head, split, d = tl.program_id(0), tl.arange(0, SPLITS), tl.arange(0, BD)
    part = head * SPLITS + split
    peak = tl.load(peaks + part)
    share = tl.exp(peak - tl.max(peak, 0))  # 0 for shares beyond the end
    weight = tl.sum(tl.load(weights + part) * share, 0)
    mixed = tl.load(parts + part[:, None] * D + d[None, :], mask=(d < D)[None, :], other=0.0)
    mixed = tl.sum(mixed * share[:, None], 0) / weight
    tl.store(out + head * D + d, mixed.to(out.dtype.element_ty), mask=d < D)


class TritonKernels(PagedKernels):
    """See the head of this file.

    Args:
        wide: multiply in fp32, as the interpreter must.
    """

    name = "Triton"

    def __init__(self, *, wide: bool = False) -> None:
        self._wide = wide

    def linear(self, weight: Weight) -> Linear:
        """int8 as it lies in memory for few rows; the plain product for all else."""
        if not isinstance(weight, Int8):
            return super().linear(weight)
        values, scales, unpacked = weight.values, weight.scales, unpacking(weight)
        n, k = values.shape
        # Narrow blocks where a matrix is small, so that all of the GPU has some.
        wide_block, deep_block = (64, 64) if n >= 64 * PROGRAMS else (16, 128)

        def linear(x: Tensor) -> Tensor:
            rows = x.shape[0]
            if rows > FEW_ROWS:
                return unpacked(x)
            x, y = x.contiguous(), x.new_empty(rows, n)
            high = max(16, triton.next_power_of_2(rows))  # tensor cores take 16 rows at least
            grid = triton.cdiv(n, wide_block), triton.cdiv(rows, high)
            _int8_linear[grid](x, values, scales, y, rows, n, k, BM=high, BN=wide_block, BK=deep_block, WIDE=self._wide)
            return y

        return linear

    def add_norm(self, x: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """x + delta and its norm in one kernel."""
        x, y = x.contiguous(), torch.empty_like(x, memory_format=torch.contiguous_format)
        added = x if delta is None else torch.empty_like(y)
        width = x.shape[1]
        _add_norm[(len(x),)](
            x, x if delta is None else delta.contiguous(), weight, added, y, width, eps,
            ADDS=delta is not None, BD=triton.next_power_of_2(width),
        )  # fmt: skip
        return added, y

    def swiglu(self, gate_up: Tensor) -> Tensor:
        """silu(gate) * up in one kernel."""
        rows, width = gate_up.shape[0], gate_up.shape[1] // 2
        y = gate_up.new_empty(rows, width)
        _swiglu[(rows, triton.cdiv(width, 512))](gate_up.contiguous(), y, width, BI=512)
        return y

    def over_pages(self, rotary: Rotary, memories: list[Tensor], inputs: Tensor) -> Attend:
        """Rotation and writing in one kernel, attention in one or two; the pages are not gathered."""
        c, batch, pages = rotary.config, inputs.shape[0], inputs.shape[1] - 2
        heads, kv_heads, dim = c.num_attention_heads, c.num_key_value_heads, c.head_dim
        group, inputs = heads // kv_heads, inputs.contiguous()
        splits = triton.next_power_of_2(triton.cdiv(PROGRAMS, batch * kv_heads))
        splits = min(splits, pages & -pages, MOST_SPLITS)  # it divides the pages, which are a power of two
        block = max(16, triton.next_power_of_2(dim))

        def attend(layer: int, qkv: Tensor) -> Tensor:
            memory, qkv = memories[layer], qkv.contiguous()
            q, out = (qkv.new_empty(batch, heads * dim) for _ in range(2))
            _rotate_and_write[(batch, heads + 2 * kv_heads)](
                qkv, rotary.cos, rotary.sin, inputs, q, memory,
                P=pages, PAGE=PAGE, H=heads, K=kv_heads, D=dim, BHALF=triton.next_power_of_2(dim // 2),
            )  # fmt: skip
            parts = torch.empty(batch * heads * splits, dim + 2, dtype=torch.float32, device=qkv.device).view(-1)
            mixed, peaks, weights = parts.split((batch * heads * splits * dim, *[batch * heads * splits] * 2))
            _attend[(batch, kv_heads, splits)](
                q, memory, inputs, out, mixed, peaks, weights, dim**-0.5,
                P=pages, PAGE=PAGE, SPLITS=splits, K=kv_heads, G=group, D=dim,
                BG=max(16, triton.next_power_of_2(group)), BD=block, WIDE=self._wide,
            )  # fmt: skip
            if splits > 1:
                _join[(batch * heads,)](out, mixed, peaks, weights, SPLITS=splits, D=dim, BD=block)
            return out

        return attend
