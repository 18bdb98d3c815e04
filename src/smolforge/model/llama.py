"""The architecture: exactly transformers' `LlamaForCausalLM`, in the order things happen.

tokens → embedding → L × (norm, attention, add, norm, SwiGLU, add) → norm → head. Module and parameter names are
Hugging Face's, so a state dict of ours is one of theirs. The logits equal transformers' (tests/model/test_llama.py).
This is the only forward pass for training, evaluation and prefill.

Shapes: B sequences, T positions, S keys (S >= T with a cache), D hidden, H query heads, K key/value heads, d head_dim.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smolforge.config import ModelConfig
from smolforge.model.attention import Attend, causal_mask, sdpa


class KeyValueCache(Protocol):
    """What attention asks of a cache: keep the new keys and values, give back all that may be seen."""

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """k, v: (B, K, T, d) after rotation → all keys and values so far, (B, K, S, d)."""
        ...


class LlamaRMSNorm(nn.Module):
    """x / rms(x) * weight, the mean square in fp32 (Zhang & Sennrich 2019, arXiv:1910.07467)."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        # The weight takes x's precision: under autocast an fp32 weight would lift the whole stream to fp32.
        return F.rms_norm(x, x.shape[-1:], self.weight.to(x.dtype), self.eps)

    def extra_repr(self) -> str:
        return f"({self.weight.numel()},), eps={self.eps}"


def rotary_angles(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin of the rotary embedding (Su et al. 2021, arXiv:2104.09864), half-rotation layout.

    Args:
        positions: (..., T) integers.

    Returns:
        Two fp32 tensors (..., T, d); frequency i of d/2 stands at columns i and i + d/2.
    """
    exponents = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim
    angles = positions[..., None].float() * (1.0 / theta**exponents)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (x[i], x[i + d/2]) by its angle. x: (B, heads, T, d); cos, sin: (B or 1, 1, T, d)."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class LlamaAttention(nn.Module):
    """Grouped-query attention (Ainslie et al. 2023, arXiv:2305.13245): H / K query heads share one key/value head."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_dim
        width, heads, kv_heads = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
        self.q_proj = nn.Linear(width, heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(width, kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(width, kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(heads * self.head_dim, width, bias=False)
        self.attend: Attend = sdpa

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, cache: KeyValueCache | None) -> Tensor:
        split = (*x.shape[:2], -1, self.head_dim)
        q = self.q_proj(x).view(split).transpose(1, 2)  # (B, H, T, d)
        k = self.k_proj(x).view(split).transpose(1, 2)  # (B, K, T, d)
        v = self.v_proj(x).view(split).transpose(1, 2)
        cos, sin = cos.to(q.dtype), sin.to(q.dtype)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if cache is not None:
            k, v = cache.update(self.layer, k, v)
        y = self.attend(q, k, v, mask)  # (B, H, T, d)
        return self.o_proj(y.transpose(1, 2).flatten(2))


class LlamaMLP(nn.Module):
    """SwiGLU (Shazeer 2020, arXiv:2002.05202): down(silu(gate(x)) * up(x))."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class LlamaDecoderLayer(nn.Module):
    """One block of the residual stream. All layers share this code, so compiling one compiles all."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.self_attn = LlamaAttention(config, layer)
        self.mlp = LlamaMLP(config)
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, cache: KeyValueCache | None = None
    ) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class LlamaModel(nn.Module):
    """Tokens to the last hidden states."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(LlamaDecoderLayer(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.head_dim, self.rope_theta = config.head_dim, config.rope_theta
        # Runs one layer; training replaces it to recompute activations in the backward pass.
        self.run_layer: Callable[..., Tensor] = _plain

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor | None = None,
        document_ids: Tensor | None = None,
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        """Hidden states after the last norm, (B, T, D).

        Args:
            input_ids: (B, T).
            positions: (B, T) or (T,); 0 .. T-1 unless given.
            document_ids: (B, T); where given, attention stops at document borders.
            cache: keys and values of earlier positions.
        """
        x = self.embed_tokens(input_ids)
        device = x.device.type
        if torch.is_autocast_enabled(device):
            # Autocast leaves embeddings in fp32, which would keep the whole residual stream there.
            x = x.to(torch.get_autocast_dtype(device))
        if positions is None:
            positions = torch.arange(input_ids.shape[1], device=x.device)
        cos, sin = rotary_angles(positions, self.head_dim, self.rope_theta)
        # (T, d) or (B, T, d) → (1 or B, 1, T, d): one angle for all heads.
        cos, sin = (c.view(-1, 1, *c.shape[-2:]) for c in (cos, sin))
        mask = None if document_ids is None else causal_mask(document_ids)
        for layer in self.layers:
            x = self.run_layer(layer, x, cos, sin, mask, cache)
        return self.norm(x)


class TiedHead(nn.Module):
    """Stands where an untied model has its `lm_head`; holds nothing, for the head is the embedding itself."""

    def __init__(self, config: ModelConfig, embedding: str = "embed_tokens.weight") -> None:
        super().__init__()
        self.shape, self.embedding = (config.hidden_size, config.vocab_size), embedding

    def extra_repr(self) -> str:
        return f"in_features={self.shape[0]}, out_features={self.shape[1]}, bias=False, weight={self.embedding}"


class LlamaForCausalLM(nn.Module):
    """A Llama with its head. Tying is a property of the model: when tied there is one tensor, under one name."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = LlamaModel(config)
        tied = config.tie_word_embeddings
        self.lm_head = TiedHead(config) if tied else nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def output_weight(self) -> Tensor:
        """The matrix of the head, (V, D)."""
        return self.model.embed_tokens.weight if isinstance(self.lm_head, TiedHead) else self.lm_head.weight

    def head(self, hidden: Tensor) -> Tensor:
        """Logits (..., V) of hidden states (..., D)."""
        return F.linear(hidden, self.output_weight)

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor | None = None,
        document_ids: Tensor | None = None,
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        """Logits (B, T, V); arguments as of `LlamaModel.forward`."""
        return self.head(self.model(input_ids, positions, document_ids, cache))

    def set_attention(self, attend: Attend) -> None:
        """Use another exact implementation of attention in all layers."""
        for module in self.modules():
            if isinstance(module, LlamaAttention):
                module.attend = attend


def _plain(layer: nn.Module, *args: object) -> Tensor:
    return layer(*args)
