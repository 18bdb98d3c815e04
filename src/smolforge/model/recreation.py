"""The seed's own variant of SmolLM2-135M, kept with its peculiarities: it is not a Llama.

What differs from `llama.py`: LayerNorm without bias in place of RMSNorm; each of the H query heads has a key/value
head of its own, a third as wide (64 → 21, nine of them 189), filled up with zeros to the width of a query; and only
the first 21 columns of queries and keys are rotated. A score is therefore a product of 21 numbers divided by
sqrt(64), and the columns of a query and of a head's output behind the 21st reach no logit: their rows in `q_proj` and
columns in `o_proj` never get a gradient (tests/model/test_recreation.py).

The interface is that of `LlamaForCausalLM`, the parameter names are the seed's. Attention and cache see K = H heads of
width d, zeros included. Shapes as in `llama.py`, with w = `config.kv_dim` for the narrow width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smolforge.config import ModelConfig
from smolforge.model.attention import Attend, causal_mask, sdpa
from smolforge.model.llama import KeyValueCache, LlamaMLP, TiedHead, rotary_angles


class LayerNorm(nn.Module):
    """(x - mean) / std * weight, without bias (Ba et al. 2016, arXiv:1607.06450)."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        # Autocast computes this in fp32 on a GPU; the stream and the head go on in the precision that came in.
        return F.layer_norm(x, x.shape[-1:], self.weight.to(x.dtype), None, self.eps).to(x.dtype)

    def extra_repr(self) -> str:
        return f"({self.weight.numel()},), eps={self.eps}, bias=False"


def rotate_odd(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The seed's half-rotation of an odd width w: x cos + (-x[w//2:], x[:w//2]) sin.

    Column i is mixed with column i + w//2 in the first half and with column i - w//2 - 1 in the second, so the two of
    a pair do not name each other. That is no rotation in the strict sense: a score depends on more than the distance
    of query and key. An even width is rotated as in a Llama.

    Args:
        x: (B, heads, T, w).
        cos, sin: (B or 1, 1, T, w).
    """
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), dim=-1) * sin


class RecreationAttention(nn.Module):
    """Attention with narrow, zero-padded keys and values."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.heads = layer, config.num_attention_heads
        self.head_dim, self.kv_dim = config.head_dim, config.kv_dim
        width = config.hidden_size
        self.q_proj = nn.Linear(width, self.heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(width, self.heads * self.kv_dim, bias=False)
        self.v_proj = nn.Linear(width, self.heads * self.kv_dim, bias=False)
        self.o_proj = nn.Linear(self.heads * self.head_dim, width, bias=False)
        self.attend: Attend = sdpa

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, cache: KeyValueCache | None) -> Tensor:
        split = (*x.shape[:2], self.heads, -1)
        q = self.q_proj(x).view(split).transpose(1, 2)  # (B, H, T, d)
        k = self.k_proj(x).view(split).transpose(1, 2)  # (B, H, T, w)
        v = self.v_proj(x).view(split).transpose(1, 2)
        cos, sin = cos.to(q.dtype), sin.to(q.dtype)
        q = torch.cat((rotate_odd(q[..., : self.kv_dim], cos, sin), q[..., self.kv_dim :]), dim=-1)
        padding = (0, self.head_dim - self.kv_dim)
        k, v = F.pad(rotate_odd(k, cos, sin), padding), F.pad(v, padding)  # (B, H, T, d)
        if cache is not None:
            k, v = cache.update(self.layer, k, v)
        y = self.attend(q, k, v, mask)  # (B, H, T, d), zero behind the w-th column
        return self.o_proj(y.transpose(1, 2).flatten(2))


class RecreationBlock(nn.Module):
    """One block of the residual stream."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.ln_1 = LayerNorm(config.hidden_size, config.rms_norm_eps)
        self.attn = RecreationAttention(config, layer)
        self.ln_2 = LayerNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = LlamaMLP(config)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, cache: KeyValueCache | None = None
    ) -> Tensor:
        x = x + self.attn(self.ln_1(x), cos, sin, mask, cache)
        return x + self.mlp(self.ln_2(x))


class RecreationModel(nn.Module):
    """Tokens to the last hidden states."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.wte = nn.Embedding(config.vocab_size, config.hidden_size)
        self.h = nn.ModuleList(RecreationBlock(config, layer) for layer in range(config.num_hidden_layers))
        self.ln_f = LayerNorm(config.hidden_size, config.rms_norm_eps)
        self.kv_dim, self.rope_theta = config.kv_dim, config.rope_theta
        # Runs one layer; training replaces it to recompute activations in the backward pass.
        self.run_layer: Callable[..., Tensor] = _plain

    @property
    def layers(self) -> nn.ModuleList:
        """The blocks, under the name that the other architecture gives them."""
        return self.h

    @property
    def embed_tokens(self) -> nn.Embedding:
        """The embedding, under the name that the other architecture gives it."""
        return self.wte

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor | None = None,
        document_ids: Tensor | None = None,
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        """Hidden states after the last norm, (B, T, D); arguments as of `LlamaModel.forward`."""
        x = self.wte(input_ids)
        device = x.device.type
        if torch.is_autocast_enabled(device):
            x = x.to(torch.get_autocast_dtype(device))
        if positions is None:
            positions = torch.arange(input_ids.shape[1], device=x.device)
        # An odd width has one frequency too many; the table is cut to the width.
        cos, sin = (c[..., : self.kv_dim] for c in rotary_angles(positions, self.kv_dim, self.rope_theta))
        cos, sin = (c.reshape(-1, 1, *c.shape[-2:]) for c in (cos, sin))  # (1 or B, 1, T, w)
        mask = None if document_ids is None else causal_mask(document_ids)
        for layer in self.h:
            x = self.run_layer(layer, x, cos, sin, mask, cache)
        return self.ln_f(x)


class SmollmV2Recreation(nn.Module):
    """The recreation with its head; the interface of `LlamaForCausalLM`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.transformer = RecreationModel(config)
        tied = config.tie_word_embeddings
        self.lm_head = (
            TiedHead(config, "wte.weight") if tied else nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        )

    @property
    def model(self) -> RecreationModel:
        """Everything below the head."""
        return self.transformer

    @property
    def output_weight(self) -> Tensor:
        """The matrix of the head, (V, D)."""
        return self.transformer.wte.weight if isinstance(self.lm_head, TiedHead) else self.lm_head.weight

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
        return self.head(self.transformer(input_ids, positions, document_ids, cache))

    def set_attention(self, attend: Attend) -> None:
        """Use another exact implementation of attention in all layers."""
        for module in self.modules():
            if isinstance(module, RecreationAttention):
                module.attend = attend


def _plain(layer: nn.Module, *args: object) -> Tensor:
    return layer(*args)
