"""One decoding step of a plain Llama in five Triton kernels a layer, six where texts are long.

A token of a small model is limited by starting its kernels, not by what they compute, so a layer's operations are
joined as far as no program needs what another one makes:

    queries, keys, values   norm, projections, rotation; keys and values go to the runner's memory
    attention               of one query per row; long texts are divided among programs and their results merged
    output                  projection, added to the residual stream
    inner                   norm, gate and up, silu(gate) * up
    down                    projection, added to the residual stream

Sums are fp32, and results are rounded where the module rounds them. Few rows are multiplied and summed, more are tiles
of `tl.dot`, whose sides have 16 elements or more. Nothing is packed: the kernels read the module's own weights.

Triton comes with torch for CUDA; without it this file can be imported, but `fused_step` finds nothing.

Shapes: B rows, D hidden, H query heads, K key/value heads, d head_dim, L positions of a slot, V vocabulary; in kernels
R rows, N outputs and C columns (elements of the sum) of a program's tile. These are constants and powers of two.
"""

# ruff: noqa: N803, N806, SIM108 (constants of a kernel are upper case; Triton compiles no ternary of two shapes)

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from smolforge.model.architecture import architecture_of
from smolforge.model.llama import LlamaAttention, LlamaDecoderLayer, LlamaModel, LlamaRMSNorm


def _unchanged(function: Callable[..., Any]) -> Any:
    """Stands for `triton.jit`; what it returns cannot be called."""
    return function


jit: Callable[[Callable[..., Any]], Any] = _unchanged
with contextlib.suppress(ImportError):
    import triton  # pyright: ignore[reportMissingImports]
    import triton.language as tl  # pyright: ignore[reportMissingImports]

    jit = triton.jit

DOT_ROWS = 2  # from so many rows on a projection uses `tl.dot`
VECTOR_OUTPUTS = 4  # of a program without `tl.dot`
VECTOR_TILE = 8192  # most products that such a program holds
KEYS = 64  # of an attention program's tile
SPLIT_FROM, SPLIT_KEYS = 512, 128  # from so many keys on attention is divided, in parts of at least so many keys
PROGRAMS = 264  # that fill a GPU: two for each multiprocessor of an H100


@jit
def _scales(x, rows, n_rows, eps, WIDTH: tl.constexpr, C: tl.constexpr):
    """1 / rms of the rows of x (B, WIDTH), (R,)."""
    squares = tl.zeros((rows.shape[0], C), tl.float32)
    for start in range(0, WIDTH, C):
        columns = start + tl.arange(0, C)
        mask = (rows < n_rows)[:, None] & (columns < WIDTH)[None, :]
        tile = tl.load(x + rows[:, None] * WIDTH + columns[None, :], mask=mask, other=0.0).to(tl.float32)
        squares += tile * tile
    return tl.rsqrt(tl.sum(squares, 1) / WIDTH + eps)


@jit
def _weights(w, outputs, inside, columns, WIDTH: tl.constexpr, DOT: tl.constexpr):
    """A tile of some rows of w (·, WIDTH): (C, N) for `tl.dot`, else (N, C)."""
    if DOT:
        mask = (columns < WIDTH)[:, None] & inside[None, :]
        tile = tl.load(w + outputs[None, :] * WIDTH + columns[:, None], mask=mask, other=0.0)
    else:
        mask = inside[:, None] & (columns < WIDTH)[None, :]
        tile = tl.load(w + outputs[:, None] * WIDTH + columns[None, :], mask=mask, other=0.0)
    return tile


@jit
def _multiply(total, x, tile, DOT: tl.constexpr):
    """total + x tile for x (R, C) and a tile of `_weights`: (R, N), or without DOT (R, N, C), not summed yet."""
    if DOT:
        total = tl.dot(x, tile, total, input_precision="ieee")
    else:
        total += x.to(tl.float32)[:, None, :] * tile.to(tl.float32)[None, :, :]
    return total


@jit
def _zeros(R: tl.constexpr, N: tl.constexpr, C: tl.constexpr, DOT: tl.constexpr):
    """What `_multiply` adds to."""
    if DOT:
        total = tl.zeros((R, N), tl.float32)
    else:
        total = tl.zeros((R, N, C), tl.float32)
    return total


@jit
def _finish(total, dtype: tl.constexpr, DOT: tl.constexpr):
    """The sums of `_multiply`, (R, N): fp32, rounded to the activations' precision."""
    if not DOT:
        total = tl.sum(total, 2)
    return total.to(dtype).to(tl.float32)


@jit
def _two_projections(
    x, norm, first_w, second_w, outputs, inside, rows, n_rows, eps,
    WIDTH: tl.constexpr, R: tl.constexpr, N: tl.constexpr, C: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """The same outputs of two matrices (·, WIDTH) for the normed rows of x (B, WIDTH), each (R, N)."""
    first, second = _zeros(R, N, C, DOT), _zeros(R, N, C, DOT)
    if WIDTH > C:
        scales = _scales(x, rows, n_rows, eps, WIDTH, C)
    for start in range(0, WIDTH, C):
        columns = start + tl.arange(0, C)
        # Before the scales where there is one tile: these loads take longest.
        first_tile = _weights(first_w, outputs, inside, columns, WIDTH, DOT)
        second_tile = _weights(second_w, outputs, inside, columns, WIDTH, DOT)
        mask = (rows < n_rows)[:, None] & (columns < WIDTH)[None, :]
        tile = tl.load(x + rows[:, None] * WIDTH + columns[None, :], mask=mask, other=0.0).to(tl.float32)
        weight = tl.load(norm + columns, mask=columns < WIDTH, other=0.0).to(tl.float32)
        if WIDTH <= C:
            scales = tl.rsqrt(tl.sum(tile * tile, 1) / WIDTH + eps)
        tile = (tile * scales[:, None] * weight[None, :]).to(x.dtype.element_ty)
        first, second = _multiply(first, tile, first_tile, DOT), _multiply(second, tile, second_tile, DOT)
    return _finish(first, x.dtype.element_ty, DOT), _finish(second, x.dtype.element_ty, DOT)


@jit
def _rotate(x, y, cos, sin, dtype: tl.constexpr):
    """x cos + y sin, each product rounded, (R, N)."""
    return (x * cos).to(dtype).to(tl.float32) + (y * sin).to(dtype).to(tl.float32)


@jit
def _qkv_kernel(
    x, norm, q_w, k_w, v_w, cosines, sines, positions, q, memory, slot_stride, n_rows, eps,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, LENGTH: tl.constexpr, WIDTH: tl.constexpr,
    R: tl.constexpr, N: tl.constexpr, C: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """q (B, H, d), and keys and values at their positions of memory (slots, ·, 2 K, L + 1, d), which is one layer's.

    A program has N columns of the first half of a head and the matching ones of the second. cosines, sines: (L + 1,
    d / 2).
    """
    HALF: tl.constexpr = HEAD_DIM // 2
    dtype: tl.constexpr = x.dtype.element_ty
    head, rows = tl.program_id(0), tl.program_id(2) * R + tl.arange(0, R)
    if head < HEADS:
        w = q_w + head * (HEAD_DIM * WIDTH)
    elif head < HEADS + KV_HEADS:
        w = k_w + (head - HEADS) * (HEAD_DIM * WIDTH)
    else:
        w = v_w + (head - HEADS - KV_HEADS) * (HEAD_DIM * WIDTH)
    columns = tl.program_id(1) * N + tl.arange(0, N)
    inside = columns < HALF
    first, second = _two_projections(
        x, norm, w, w + HALF * WIDTH, columns, inside, rows, n_rows, eps, WIDTH, R, N, C, DOT
    )
    mask = (rows < n_rows)[:, None] & inside[None, :]
    position = tl.load(positions + rows, mask=rows < n_rows, other=0)
    if head < HEADS + KV_HEADS:
        angles = position[:, None] * HALF + columns[None, :]
        cos = tl.load(cosines + angles, mask=mask, other=0.0).to(tl.float32)
        sin = tl.load(sines + angles, mask=mask, other=0.0).to(tl.float32)
        turned = _rotate(first, -second, cos, sin, dtype)
        second = _rotate(second, first, cos, sin, dtype)
        first = turned
    if head < HEADS:
        place = q + (rows * HEADS + head) * HEAD_DIM
    else:
        row = memory + rows.to(tl.int64) * slot_stride
        place = row + ((head - HEADS).to(tl.int64) * LENGTH + position) * HEAD_DIM
    place = place[:, None] + columns[None, :]
    tl.store(place, first.to(dtype), mask=mask)
    tl.store(place + HALF, second.to(dtype), mask=mask)


@jit
def _attention_kernel(
    q, memory, positions, y, partial, sums, slot_stride, scale,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, LENGTH: tl.constexpr, SPLITS: tl.constexpr,
    G: tl.constexpr, W: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    """y (B, H, d) of q (B, H, d) over the keys up to each row's position; zeros for rows without a sequence.

    A program has the G queries of one key/value head, and one of SPLITS parts of the keys. With more than one part
    it writes to partial (B, H, SPLITS, d) what `_merge_kernel` needs, and to sums (2, B, H, SPLITS) the maximum and
    the sum. `scale` is for exponents of 2.
    """
    row, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    position = tl.load(positions + row).to(tl.int32)
    end = tl.where(position < LENGTH - 1, position + 1, 0)
    share = (end + (SPLITS * S - 1)) // (SPLITS * S) * S
    stop = tl.minimum(split * share + share, end)
    group, columns = tl.arange(0, G), tl.arange(0, W)
    query = (row * KV_HEADS + head) * GROUP + group  # of all B H
    mask = (group < GROUP)[:, None] & (columns < HEAD_DIM)[None, :]
    queries = tl.load(q + query[:, None] * HEAD_DIM + columns[None, :], mask=mask, other=0.0)
    keys = memory + row.to(tl.int64) * slot_stride + head.to(tl.int64) * (LENGTH * HEAD_DIM)
    values = keys + KV_HEADS * LENGTH * HEAD_DIM
    highest, total = tl.full((G,), float("-inf"), tl.float32), tl.zeros((G,), tl.float32)
    result = tl.zeros((G, W), tl.float32)
    for start in range(split * share, stop, S):
        places = start + tl.arange(0, S)
        there, wide = places < stop, columns < HEAD_DIM
        places = places.to(tl.int64) * HEAD_DIM
        tile = tl.load(keys + places[None, :] + columns[:, None], mask=there[None, :] & wide[:, None], other=0.0)
        scores = tl.dot(queries, tile, input_precision="ieee") * scale
        scores = tl.where(there[None, :], scores, float("-inf"))
        new = tl.maximum(highest, tl.max(scores, 1))
        weights, fade = tl.exp2(scores - new[:, None]), tl.exp2(highest - new)
        total = total * fade + tl.sum(weights, 1)
        tile = tl.load(values + places[:, None] + columns[None, :], mask=there[:, None] & wide[None, :], other=0.0)
        result = result * fade[:, None] + tl.dot(weights.to(tile.dtype), tile, input_precision="ieee")
        highest = new
    if SPLITS == 1:
        result = result / tl.where(total == 0, 1.0, total)[:, None]
        tl.store(y + query[:, None] * HEAD_DIM + columns[None, :], result.to(y.dtype.element_ty), mask=mask)
    else:
        part, parts = query * SPLITS + split, tl.num_programs(0) * (KV_HEADS * GROUP * SPLITS)
        tl.store(partial + part[:, None] * HEAD_DIM + columns[None, :], result, mask=mask)
        tl.store(sums + part, highest, mask=group < GROUP)
        tl.store(sums + parts + part, total, mask=group < GROUP)


@jit
def _merge_kernel(partial, sums, y, HEAD_DIM: tl.constexpr, SPLITS: tl.constexpr, W: tl.constexpr):
    """y (B, H, d) of what `_attention_kernel` wrote; a program has one query."""
    query, columns = tl.program_id(0), tl.arange(0, W)
    part = query * SPLITS + tl.arange(0, SPLITS)
    highest = tl.load(sums + part)
    total = tl.load(sums + tl.num_programs(0) * SPLITS + part)
    inside = columns < HEAD_DIM
    results = tl.load(partial + part[:, None] * HEAD_DIM + columns[None, :], mask=inside[None, :], other=0.0)
    most = tl.max(highest, 0)
    fade = tl.exp2(highest - tl.where(most == float("-inf"), 0.0, most))
    total = tl.sum(total * fade, 0)
    result = tl.sum(results * fade[:, None], 0) / tl.where(total == 0, 1.0, total)
    tl.store(y + query * HEAD_DIM + columns, result.to(y.dtype.element_ty), mask=inside)


@jit
def _add_projection_kernel(
    x, y, w, n_rows, OUTPUTS: tl.constexpr, WIDTH: tl.constexpr,
    R: tl.constexpr, N: tl.constexpr, C: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """x (B, OUTPUTS) += y (B, WIDTH) wᵀ, w (OUTPUTS, WIDTH)."""
    outputs, rows = tl.program_id(0) * N + tl.arange(0, N), tl.program_id(1) * R + tl.arange(0, R)
    inside, total = outputs < OUTPUTS, _zeros(R, N, C, DOT)
    for start in range(0, WIDTH, C):
        columns = start + tl.arange(0, C)
        mask = (rows < n_rows)[:, None] & (columns < WIDTH)[None, :]
        tile = tl.load(y + rows[:, None] * WIDTH + columns[None, :], mask=mask, other=0.0)
        total = _multiply(total, tile, _weights(w, outputs, inside, columns, WIDTH, DOT), DOT)
    place, mask = x + rows[:, None] * OUTPUTS + outputs[None, :], (rows < n_rows)[:, None] & inside[None, :]
    total = _finish(total, x.dtype.element_ty, DOT) + tl.load(place, mask=mask, other=0.0).to(tl.float32)
    tl.store(place, total.to(x.dtype.element_ty), mask=mask)


@jit
def _inner_kernel(
    x, norm, gate_w, up_w, inner, n_rows, eps, INNER: tl.constexpr, WIDTH: tl.constexpr,
    R: tl.constexpr, N: tl.constexpr, C: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """inner (B, INNER) = silu(gate) * up of the normed x (B, WIDTH); gate_w, up_w: (INNER, WIDTH)."""
    outputs, rows = tl.program_id(0) * N + tl.arange(0, N), tl.program_id(1) * R + tl.arange(0, R)
    inside = outputs < INNER
    gate, up = _two_projections(x, norm, gate_w, up_w, outputs, inside, rows, n_rows, eps, WIDTH, R, N, C, DOT)
    result = (gate / (1 + tl.exp(-gate))).to(x.dtype.element_ty).to(tl.float32) * up
    mask = (rows < n_rows)[:, None] & inside[None, :]
    tl.store(inner + rows[:, None] * INNER + outputs[None, :], result.to(x.dtype.element_ty), mask=mask)


class FusedStep:
    """The logits of one new token in each row, from a module that `fused_step` accepts, whose weights it reads.

    Args:
        module: on the device, in one precision.
        positions: L, of a slot.
    """

    def __init__(self, module: Any, positions: int) -> None:
        self._module, self._layers, self._config = module, module.decoder.layers, module.config
        weight, half = module.decoder.embed_tokens.weight, module.config.head_dim // 2
        # (L + 1, d / 2): rows without a sequence have position L.
        angles = module.decoder.rotation(torch.arange(positions + 1, device=weight.device))
        self._angles = tuple(angle[:, :half].to(weight.dtype).contiguous() for angle in angles)

    def __call__(self, tokens: Tensor, positions: Tensor, memory: Tensor, keys: int) -> Tensor:
        """Write each token's keys and values to memory, and return the logits, (B, V).

        Args:
            tokens: ids, (B,).
            positions: of the tokens, (B,) int64; L for a row without a sequence, whose logits mean nothing.
            memory: (slots, layers, 2 K, L + 1, d), contiguous; row i is slot i.
            keys: more than any position in use; attention is divided as is good for so many.
        """
        c, rows = self._config, len(tokens)
        x = self._module.decoder.embed_tokens(tokens)  # (B, D), which the layers change
        q = x.new_empty(rows, c.num_attention_heads, c.head_dim)
        y, inner = torch.empty_like(q), x.new_empty(rows, c.intermediate_size)
        splits = _splits(rows * c.num_key_value_heads, keys)
        sizes = q.numel() * splits, 2 * rows * c.num_attention_heads * splits
        parts = [x.new_empty(size if splits > 1 else 1, dtype=torch.float32) for size in sizes]
        for index, layer in enumerate(self._layers):
            part = memory[:, index]
            self._qkv(layer, x, positions, q, part)
            self._attention(q, part, positions, y, parts, splits)
            _add_projection(x, y.view(rows, -1), layer.self_attn.o_proj.weight)
            self._inner(layer, x, inner)
            _add_projection(x, inner, layer.mlp.down_proj.weight)
        return self._module.head(self._module.decoder.norm(x))

    def _qkv(self, layer: Any, x: Tensor, positions: Tensor, q: Tensor, memory: Tensor) -> None:
        c, attention, norm = self._config, layer.self_attn, layer.input_layernorm
        tile, heads = _tile(x), c.num_attention_heads + 2 * c.num_key_value_heads
        grid = heads, triton.cdiv(c.head_dim // 2, tile["N"]), triton.cdiv(len(x), tile["R"])
        weights = attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight
        _start(
            _qkv_kernel, grid, x, norm.weight, *weights, *self._angles, positions, q, memory, memory.stride(0), len(x),
            norm.eps, c.num_attention_heads, c.num_key_value_heads, c.head_dim, memory.shape[2], x.shape[1], **tile,
        )  # fmt: skip

    def _attention(self, q: Tensor, memory: Tensor, positions: Tensor, y: Tensor, parts: Any, splits: int) -> None:
        c, (rows, heads, head_dim) = self._config, q.shape
        kv_heads, group = c.num_key_value_heads, heads // c.num_key_value_heads
        tall, width = (max(16, triton.next_power_of_2(side)) for side in (group, head_dim))
        _start(
            _attention_kernel, (rows, kv_heads, splits), q, memory, positions, y, *parts, memory.stride(0),
            math.log2(math.e) / math.sqrt(head_dim), kv_heads, group, head_dim, memory.shape[2], splits, tall, width,
            KEYS, num_warps=4, num_stages=3,
        )  # fmt: skip
        if splits > 1:
            _start(_merge_kernel, (rows * heads,), *parts, y, head_dim, splits, width, num_warps=2)

    def _inner(self, layer: Any, x: Tensor, inner: Tensor) -> None:
        norm, tile, outputs = layer.post_attention_layernorm, _tile(x), inner.shape[1]
        grid = triton.cdiv(outputs, tile["N"]), triton.cdiv(len(x), tile["R"])
        weights = layer.mlp.gate_proj.weight, layer.mlp.up_proj.weight
        _start(_inner_kernel, grid, x, norm.weight, *weights, inner, len(x), norm.eps, outputs, x.shape[1], **tile)


def _start(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Start a kernel's programs, on the current stream."""
    kernel[grid](*args, **options)


def _add_projection(x: Tensor, y: Tensor, w: Tensor) -> None:
    """x (B, D) += y (B, width) wᵀ, w (D, width)."""
    tile = _tile(y)
    grid = triton.cdiv(x.shape[1], tile["N"]), triton.cdiv(len(x), tile["R"])
    _start(_add_projection_kernel, grid, x, y, w, len(x), x.shape[1], y.shape[1], **tile)


def _tile(x: Tensor) -> dict[str, Any]:
    """The tile of a program that multiplies x (B, width) by a matrix, as options of its kernel."""
    (rows, width), whole = x.shape, x.dtype == torch.float32
    if rows >= DOT_ROWS:  # the fastest on an H200 (docs/performance.md), as far as shared memory has room for them
        n = 16 if rows <= 16 else 32
        r = 16 if rows <= 64 else 32 if rows <= 128 or whole else 64
        columns = 64 if whole or r > 16 else 4096 // n
        return {"R": r, "N": n, "C": columns, "DOT": True, "num_warps": 4, "num_stages": 3 if columns > 128 else 4}
    r = triton.next_power_of_2(rows)
    columns = min(triton.next_power_of_2(width), VECTOR_TILE // (r * VECTOR_OUTPUTS))
    return {"R": r, "N": VECTOR_OUTPUTS, "C": columns, "DOT": False, "num_warps": 4, "num_stages": 2}


def _splits(programs: int, keys: int) -> int:
    """Into how many parts attention divides so many keys, a power of two, where it has so many programs without."""
    most = min(PROGRAMS // programs, keys // SPLIT_KEYS) if keys >= SPLIT_FROM else 1
    return 1 << (max(most, 1).bit_length() - 1)


def fused_step(module: Any, positions: int) -> FusedStep | None:
    """The step for a module with L positions of a slot; None where the kernels do not compute what it computes."""
    if jit is _unchanged or not architecture_of(module.config).fast_decoding or not _is_plain(module):
        return None
    return FusedStep(module, positions)


def _is_plain(module: Any) -> bool:
    """Whether all is as in `model/llama.py`: no biases, no adapters, one precision."""
    decoder = module.decoder
    dtype = decoder.embed_tokens.weight.dtype
    if type(decoder) is not LlamaModel or dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return False
    for layer in decoder.layers:
        if type(layer) is not LlamaDecoderLayer or type(layer.self_attn) is not LlamaAttention:
            return False
        for part in layer.modules():
            plain = type(part) is LlamaRMSNorm or (type(part) is nn.Linear and part.bias is None)
            if not plain and any(True for _ in part.parameters(recurse=False)):
                return False
    return all(p.dtype == dtype and p.is_contiguous() for p in module.parameters())
