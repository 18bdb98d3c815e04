"""The fast path on torch's own kernels, where no compiler can build the native step.

Query, key and value are one product, gate and up another; activations are bf16 unless the weights are fp32. The
query heads that share a key head are rows of one attention, over the cache cut to its length: that is eight
times faster for one token than masking, or than `enable_gqa`. int8 runs `_weight_int8pack_mm`, which wants bf16
activations, and int4 `_weight_int4pack_mm_for_cpu`; prompts unpack the layer to bf16 first, since those kernels
are made for few rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from smolforge.config import ModelConfig
from smolforge.generation.cache import TensorCache
from smolforge.generation.quantize import Int4, Int8, Precision, Weight, quantize
from smolforge.generation.scheduler import Piece
from smolforge.model.llama import rotary_angles, rotate

FEW_ROWS = 32  # above this many rows, unpacking the weights costs less than the packed kernels lose
Linear = Callable[[Tensor], Tensor]


class StockRunner:
    """Runs pieces through fused torch operations.

    Args:
        module: a Llama of `model/llama.py` on the CPU.
        precision: of the weights.
    """

    batch_invariant = False  # the kernels choose their blocking by the number of rows

    def __init__(self, module: Any, precision: Precision) -> None:
        config: ModelConfig = module.config
        self.config = config
        self.name = f"torch's kernels, {precision}, {torch.get_num_threads()} threads"
        self._dtype = torch.float32 if precision == "fp32" else torch.bfloat16
        self.weight_bytes = 0
        self._layers = [self._layer(layer, precision) for layer in module.model.layers]
        embedding = quantize(module.model.embed_tokens.weight.detach(), precision, head=True)
        self._embed = self._lookup(embedding)
        tied = config.tie_word_embeddings
        head = embedding if tied else quantize(module.output_weight.detach(), precision, head=True)
        self._head = self._linear(head)
        self.weight_bytes += 0 if tied else _bytes(embedding)
        self._norm = self._vector(module.model.norm.weight)
        angles = rotary_angles(torch.arange(config.max_position_embeddings), config.dim, config.rope_theta)
        self._cos, self._sin = (angle.to(self._dtype) for angle in angles)
        self.weight_bytes += self._cos.nbytes + self._sin.nbytes

    def cache_bytes(self, capacity: int) -> int:
        """Bytes of a cache for `capacity` positions."""
        c = self.config
        return 2 * c.num_hidden_layers * c.num_key_value_heads * capacity * c.dim * self._dtype.itemsize

    def new_cache(self, capacity: int) -> TensorCache:
        """An empty cache."""
        return TensorCache(self.config, capacity, self._dtype, torch.device("cpu"))

    @torch.no_grad()
    def forward(self, pieces: Sequence[Piece]) -> Tensor:
        """Run all rows of all pieces together; attention goes piece by piece."""
        c, spans, wanted, rows = self.config, [], [], 0
        for piece in pieces:
            spans.append((piece, rows, rows + len(piece.tokens)))
            rows += len(piece.tokens)
            wanted += range(rows - piece.logits, rows)
            assert isinstance(piece.cache, TensorCache)
            piece.cache.length = piece.start
        x = self._embed(torch.tensor([token for piece in pieces for token in piece.tokens]))  # (M, D)
        positions = torch.cat([torch.arange(p.start, p.start + len(p.tokens)) for p in pieces])
        cos, sin = self._cos[positions, None], self._sin[positions, None]  # (M, 1, d)
        heads = c.num_attention_heads, c.num_key_value_heads, c.num_key_value_heads
        for index, (norm1, qkv, o, norm2, gate_up, down) in enumerate(self._layers):
            q, k, v = qkv(self._rms(x, norm1)).unflatten(1, (-1, c.dim)).split(heads, 1)  # (M, H or K, d)
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
            mixed = [_attend(index, piece, q[a:b], k[a:b], v[a:b]) for piece, a, b in spans]
            x = x + o(mixed[0] if len(mixed) == 1 else torch.cat(mixed))
            gate, up = gate_up(self._rms(x, norm2)).chunk(2, -1)
            x = x + down(F.silu(gate) * up)
        if not wanted:
            return torch.empty(0, c.vocab_size)
        last = x if len(wanted) == rows else x[wanted]
        return self._head(self._rms(last, self._norm)).float()

    def _rms(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], weight, self.config.rms_norm_eps)

    def _layer(self, layer: Any, precision: Precision) -> tuple[Any, ...]:
        a, m = layer.self_attn, layer.mlp
        qkv = torch.cat([p.weight.detach() for p in (a.q_proj, a.k_proj, a.v_proj)])
        gate_up = torch.cat([p.weight.detach() for p in (m.gate_proj, m.up_proj)])
        linears = [
            self._linear(quantize(weight, precision))
            for weight in (qkv, a.o_proj.weight.detach(), gate_up, m.down_proj.weight.detach())
        ]
        norms = self._vector(layer.input_layernorm.weight), self._vector(layer.post_attention_layernorm.weight)
        return norms[0], linears[0], linears[1], norms[1], linears[2], linears[3]

    def _vector(self, weight: Tensor) -> Tensor:
        vector = weight.detach().to(self._dtype)
        self.weight_bytes += vector.nbytes
        return vector

    def _linear(self, weight: Weight) -> Linear:
        self.weight_bytes += _bytes(weight)
        if isinstance(weight, Int8):
            return _int8(weight)
        if isinstance(weight, Int4):
            return _int4(weight)
        return lambda x: F.linear(x, weight)

    def _lookup(self, weight: Weight) -> Callable[[Tensor], Tensor]:
        if isinstance(weight, Int8):
            return lambda ids: (weight.values[ids].float() * weight.scales[ids, None]).to(self._dtype)
        assert isinstance(weight, Tensor)  # int4 leaves the embedding at int8
        return lambda ids: weight[ids]


def _attend(layer: int, piece: Piece, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of one piece, T rows: q (T, H, d), k and v (T, K, d) → (T, H * d)."""
    cache: Any = piece.cache
    count, heads = q.shape[0], q.shape[1]
    keys, values = cache.update(layer, k.transpose(0, 1)[None], v.transpose(0, 1)[None])  # (1, K, S, d)
    if count == 1:
        rows = q.view(1, keys.shape[1], -1, q.shape[2])  # the H / K heads of a group are rows: (1, K, H / K, d)
        return F.scaled_dot_product_attention(rows, keys, values).reshape(1, -1)
    mask = None
    if piece.start:
        mask = torch.ones(count, piece.start + count, dtype=torch.bool).tril(piece.start)
    y = F.scaled_dot_product_attention(
        q.transpose(0, 1)[None], keys, values, attn_mask=mask, is_causal=mask is None, enable_gqa=heads != k.shape[1]
    )
    return y[0].transpose(0, 1).flatten(1)


def _int8(weight: Int8) -> Linear:
    values, scales = weight.values, weight.scales.bfloat16()
    few = FEW_ROWS if values.shape[1] % 32 == 0 else 0  # torch's kernel reads whole vectors, past the end of others

    def linear(x: Tensor) -> Tensor:
        if x.shape[0] > few:
            return F.linear(x, values.bfloat16()) * scales
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


def _bytes(weight: Weight) -> int:
    if isinstance(weight, Tensor):
        return weight.nbytes
    packed = weight.values.nbytes if isinstance(weight, Int8) else weight.values.nbytes // 2
    return packed + weight.scales.nbytes
