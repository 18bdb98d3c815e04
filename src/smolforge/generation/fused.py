"""A Llama with its products joined, as the runner of GPUs (`static.py`) has it; `stock.py` shares the lower half.

Query, key and value are one product, gate and up another; activations are bf16 unless the weights are fp32. What
differs between machines is handed in: `Kernels` multiplies and does the small work between the products, and
the runner's own `attend` does attention, for only a runner knows how its caches lie.

Shapes: M rows (of any sequences), D hidden, H query heads, K key/value heads, d head_dim, S keys, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from smolforge.config import ModelConfig
from smolforge.generation.quantize import Int8, Precision, Weight, quantize
from smolforge.model.llama import rotary_angles, rotate

Linear = Callable[[Tensor], Tensor]
# (layer, the joint product (M, (H + 2 K) d) before rotation) → the mixed values (M, H d)
Attend = Callable[[int, Tensor], Tensor]


class Kernels:
    """The plain formulation, right on any device; subclasses replace what their machine does better."""

    def linear(self, weight: Weight) -> Linear:
        """The product with a weight. Packed weights are unpacked whole, one matrix at a time, when they are used."""
        if isinstance(weight, Tensor):
            return lambda x: F.linear(x, weight)
        assert isinstance(weight, Int8), "only a CPU has products for int4"
        return unpacking(weight)

    def add_norm(self, x: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """x + delta and its root-mean-square norm, both (M, D)."""
        if delta is not None:
            x = x + delta
        return x, F.rms_norm(x, x.shape[-1:], weight, eps)

    def swiglu(self, gate_up: Tensor) -> Tensor:
        """silu(gate) * up of the joint product (M, 2 I) → (M, I)."""
        gate, up = gate_up.chunk(2, -1)
        return F.silu(gate) * up


class Rotary:
    """Heads out of the joint product, turned by their positions.

    Attributes:
        cos: (positions, d), and sin alike.
    """

    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> None:
        self.config = config
        positions = torch.arange(config.max_position_embeddings, device=device)
        self.cos, self.sin = (a.to(dtype) for a in rotary_angles(positions, config.head_dim, config.rope_theta))

    def at(self, positions: Tensor) -> Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]:
        """For rows at some positions (M,): joint product → query (M, H, d), key and value (M, K, d)."""
        heads, dim = (self.config.num_attention_heads, self.config.num_key_value_heads), self.config.head_dim
        cos, sin = self.cos[positions, None], self.sin[positions, None]  # (M, 1, d)

        def turn(qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            turning, v = qkv.unflatten(1, (-1, dim)).split((sum(heads), heads[1]), 1)
            q, k = rotate(turning, cos, sin).split(heads, 1)
            return q, k, v

        return turn


class FusedLlama:
    """Weights of a Llama as they are now, packed, on the module's device.

    Args:
        module: a Llama of `model/llama.py`; nothing of it is kept but weights that are already as wanted.
        precision: of the weights.
        kernels: what multiplies.

    Attributes:
        dtype: of the activations, and of what a cache holds.
        weight_bytes: of all weights and tables.
    """

    def __init__(self, module: Any, precision: Precision, kernels: Kernels) -> None:
        config: ModelConfig = module.config
        self.config, self.device = config, module.model.norm.weight.device
        self.dtype = torch.float32 if precision == "fp32" else torch.bfloat16
        self.weight_bytes = 0
        self._kernels = kernels
        self._layers = [self._layer(layer, precision) for layer in module.model.layers]
        embedding = quantize(module.model.embed_tokens.weight.detach(), precision, head=True)
        self._embed = self._lookup(embedding)
        tied = config.tie_word_embeddings
        head = embedding if tied else quantize(module.output_weight.detach(), precision, head=True)
        self._head = self._linear(head)
        self.weight_bytes += 0 if tied else _bytes(embedding)
        self._norm = self._vector(module.model.norm.weight)
        self.rotary = Rotary(config, self.dtype, self.device)
        self.weight_bytes += self.rotary.cos.nbytes + self.rotary.sin.nbytes

    def hidden(self, ids: Tensor, attend: Attend) -> Tensor:
        """Hidden states (M, D) before the last norm, of tokens (M,)."""
        x, delta, eps = self._embed(ids), None, self.config.rms_norm_eps
        for index, (norm1, qkv, o, norm2, gate_up, down) in enumerate(self._layers):
            x, y = self._kernels.add_norm(x, delta, norm1, eps)
            x, y = self._kernels.add_norm(x, o(attend(index, qkv(y))), norm2, eps)
            delta = down(self._kernels.swiglu(gate_up(y)))
        assert delta is not None
        return x + delta

    def logits(self, hidden: Tensor) -> Tensor:
        """fp32 logits (rows, V) of hidden states (rows, D)."""
        return self._head(self._kernels.add_norm(hidden, None, self._norm, self.config.rms_norm_eps)[1]).float()

    def _layer(self, layer: Any, precision: Precision) -> tuple[Any, ...]:
        linears = [self._linear(quantize(weight, precision)) for weight in joined_weights(layer)]
        norms = self._vector(layer.input_layernorm.weight), self._vector(layer.post_attention_layernorm.weight)
        return norms[0], linears[0], linears[1], norms[1], linears[2], linears[3]

    def _vector(self, weight: Tensor) -> Tensor:
        vector = weight.detach().to(self.dtype)
        self.weight_bytes += vector.nbytes
        return vector

    def _linear(self, weight: Weight) -> Linear:
        self.weight_bytes += _bytes(weight)
        return self._kernels.linear(weight)

    def _lookup(self, weight: Weight) -> Callable[[Tensor], Tensor]:
        if isinstance(weight, Int8):
            return lambda ids: (weight.values[ids].float() * weight.scales[ids, None]).to(self.dtype)
        assert isinstance(weight, Tensor)  # int4 leaves the embedding at int8
        return lambda ids: weight[ids]


def joined_weights(layer: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of a block of `model/llama.py`: query, key and value; output; gate and up; down."""
    a, m = layer.self_attn, layer.mlp
    qkv = torch.cat([p.weight.detach() for p in (a.q_proj, a.k_proj, a.v_proj)])
    gate_up = torch.cat([p.weight.detach() for p in (m.gate_proj, m.up_proj)])
    return qkv, a.o_proj.weight.detach(), gate_up, m.down_proj.weight.detach()


def unpacking(weight: Int8) -> Linear:
    """The product with int8 weights by unpacking the matrix to bf16: what every device can, and best for many rows."""
    values, scales = weight.values, weight.scales.bfloat16()
    return lambda x: F.linear(x, values.to(x.dtype)) * scales


def attend_piece(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    """Attention of T consecutive rows of one sequence: q (T, H, d), keys and values (1, K, S, d) → (T, H d).

    Args:
        mask: (T, S), true where a row may look; None where T is 1 or S.
    """
    count, heads = q.shape[0], q.shape[1]
    if count == 1:
        rows = q.view(1, keys.shape[1], -1, q.shape[2])  # the H / K heads of a group are rows: (1, K, H / K, d)
        return F.scaled_dot_product_attention(rows, keys, values).reshape(1, -1)
    y = F.scaled_dot_product_attention(
        q.transpose(0, 1)[None], keys, values, attn_mask=mask, is_causal=mask is None,
        enable_gqa=heads != keys.shape[1],
    )  # fmt: skip
    return y[0].transpose(0, 1).flatten(1)


def _bytes(weight: Weight) -> int:
    if isinstance(weight, Tensor):
        return weight.nbytes
    packed = weight.values.nbytes if isinstance(weight, Int8) else weight.values.nbytes // 2
    return packed + weight.scales.nbytes
