"""The fast path on torch's own kernels, where no compiler can build the native step.

The query heads that share a key head are rows of one attention, over the cache cut to its length: that is eight
times faster for one token than masking, or than `enable_gqa`. bf16 runs oneDNN on weights that it ordered for itself,
int8 `_weight_int8pack_mm`, which wants bf16 activations, and int4 `_weight_int4pack_mm_for_cpu`; prompts unpack the
layer to bf16 first, since those kernels are made for few rows. What is shared with the path of GPUs is in `fused.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from smolforge.config import ModelConfig
from smolforge.generation.cache import TensorCache
from smolforge.generation.fused import FusedLlama, Kernels, Linear, attend_piece, piece_mask, unpacking
from smolforge.generation.quantize import Int4, Int8, Precision, Weight
from smolforge.generation.scheduler import Piece

FEW_ROWS = 32  # above this many rows, unpacking the weights costs less than the packed kernels lose


class StockRunner:
    """Runs pieces through fused torch operations.

    Args:
        module: a Llama of `model/llama.py` on the CPU.
        precision: of the weights.
    """

    batch_invariant = False  # the kernels choose their blocking by the number of rows

    def __init__(self, module: Any, precision: Precision) -> None:
        self.config: ModelConfig = module.config
        self.name = f"torch's kernels, {precision}, {torch.get_num_threads()} threads"
        self._fused = FusedLlama(module, precision, _Packed())
        self.weight_bytes = self._fused.weight_bytes

    def cache_bytes(self, capacity: int) -> int:
        """Bytes of a cache for `capacity` positions."""
        return self._fused.position_bytes * capacity

    def new_cache(self, capacity: int) -> TensorCache:
        """An empty cache."""
        return TensorCache(self.config, capacity, self._fused.dtype, torch.device("cpu"))

    @torch.no_grad()
    def forward(self, pieces: Sequence[Piece]) -> Tensor:
        """Run all rows of all pieces together; attention goes piece by piece."""
        spans, wanted, rows = [], [], 0
        for piece in pieces:
            count = len(piece.tokens)
            spans.append((piece.cache, rows, rows + count, piece_mask(piece.start, count, self._fused.device)))
            rows += count
            wanted += range(rows - piece.logits, rows)
            assert isinstance(piece.cache, TensorCache)
            piece.cache.length = piece.start
        ids = torch.tensor([token for piece in pieces for token in piece.tokens])
        positions = torch.cat([torch.arange(p.start, p.start + len(p.tokens)) for p in pieces])
        turn = self._fused.rotary.at(positions)

        def attend(layer: int, qkv: Tensor) -> Tensor:
            q, k, v = turn(qkv)
            mixed = []
            for cache, a, b, mask in spans:
                keys, values = cache.update(layer, k[a:b].transpose(0, 1)[None], v[a:b].transpose(0, 1)[None])
                mixed.append(attend_piece(q[a:b], keys, values, mask))
            return mixed[0] if len(mixed) == 1 else torch.cat(mixed)

        x = self._fused.hidden(ids, attend)
        if not wanted:
            return torch.empty(0, self.config.vocab_size)
        return self._fused.logits(x if len(wanted) == rows else x[wanted])


class _Packed(Kernels):
    """torch's packed products, which are for CPUs."""

    def linear(self, weight: Weight) -> Linear:
        if isinstance(weight, Tensor) and weight.dtype == torch.bfloat16 and _multiplies_bf16():
            packed = torch.ops.mkldnn._reorder_linear_weight(weight, 1)
            return lambda x: torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")
        return self.shared(weight)

    def shared(self, weight: Weight) -> Linear:
        if isinstance(weight, Int8):
            return _int8(weight)
        if isinstance(weight, Int4):
            return _int4(weight)
        return super().linear(weight)

    def add_norm(self, x: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        if delta is not None:
            x = x + delta
        # torch's own norm is a dozen operations, of microseconds each; their number is what one row costs.
        width = x.shape[-1]
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        return x, (x * length.square_().div_(width).add_(eps).rsqrt_() * weight).to(x.dtype)


def _multiplies_bf16() -> bool:
    """Whether oneDNN does, as torch's compiler asks it."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def _int8(weight: Int8) -> Linear:
    values, scales, unpacked = weight.values, weight.scales.bfloat16(), unpacking(weight)
    few = FEW_ROWS if values.shape[1] % 32 == 0 else 0  # torch's kernel reads whole vectors, past the end of others

    def linear(x: Tensor) -> Tensor:
        if x.shape[0] > few:
            return unpacked(x)
        return torch.ops.aten._weight_int8pack_mm(x, values, scales)

    return linear


def _int4(weight: Int4) -> Linear:
    n, k = weight.values.shape
    if n % 16 or k % weight.group:  # a shape that torch's kernel does not have
        whole = weight.dequantize().bfloat16()
        return lambda x: F.linear(F.pad(x, (0, k - x.shape[1])), whole)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(weight.values.int(), 1)
    scales = weight.scales.t()
    with_zeros = torch.stack((scales, torch.zeros_like(scales)), -1).contiguous()  # (K / group, N, 2)

    def linear(x: Tensor) -> Tensor:
        x = F.pad(x, (0, k - x.shape[1])) if x.shape[1] < k else x
        return torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, weight.group, with_zeros)

    return linear
