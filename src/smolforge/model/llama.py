"""The architecture `llama`: exactly transformers' `LlamaForCausalLM`, in the order things happen.

tokens → embedding → L × (norm, attention, add, norm, SwiGLU, add) → norm → head. Module and parameter names are
Hugging Face's, so a state dict of ours is one of theirs, and the logits are equal. The walk through the layers, the
loss and the letters of the shapes are in `architecture.py`.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smolforge.config import ModelConfig
from smolforge.config.sections import RopeScaling
from smolforge.errors import BadInput
from smolforge.model.architecture import Architecture, CausalLM, ComputeOptions, Decoder, KeyValueCache, register
from smolforge.model.attention import choose_attention
from smolforge.model.dropout import branches_of


def in_own_precision(x: Tensor) -> AbstractContextManager[object]:
    """For norms: autocast on CUDA would keep an fp32 copy of their input, and make the residual stream fp32."""
    device = x.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


class LlamaRMSNorm(nn.RMSNorm):
    """x / rms(x) * weight, the mean square in fp32 (Zhang & Sennrich 2019, arXiv:1910.07467)."""

    def forward(self, x: Tensor) -> Tensor:
        # The weight takes x's precision: under autocast an fp32 weight would lift the whole stream to fp32.
        with in_own_precision(x):
            return F.rms_norm(x, x.shape[-1:], self.weight.to(x.dtype), self.eps)

    def extra_repr(self) -> str:
        return f"{self.normalized_shape}, eps={self.eps}"


def rotary_angles(
    positions: Tensor, head_dim: int, theta: float, scaling: RopeScaling | None = None
) -> tuple[Tensor, Tensor]:
    """cos and sin of the rotary embedding (Su et al. 2021, arXiv:2104.09864) at positions (..., T).

    Two fp32 tensors (..., T, d), half-rotation layout: frequency i of d/2 stands at columns i and i + d/2.
    """
    exponents = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim
    frequencies = 1.0 / theta**exponents
    if scaling is not None:
        frequencies = scale_frequencies(frequencies, scaling)
    angles = positions[..., None].float() * frequencies
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def scale_frequencies(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    """Llama 3's longer context: low frequencies are divided by the factor, high ones kept, those between mixed.

    As transformers' `rope_type` "llama3" (modeling_rope_utils.py).
    """
    turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)  # within the first context
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - smooth) * frequencies / scaling.factor + smooth * frequencies


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (x[i], x[i + d/2]) by its angle. x: (B, heads, T, d); cos, sin: (B or 1, 1, T, d)."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class LlamaAttention(nn.Module):
    """Grouped-query attention (Ainslie et al. 2023, arXiv:2305.13245): H / K query heads share one key/value head."""

    input_bias = False  # whether queries, keys and values have biases where the output has none

    def __init__(self, config: ModelConfig, options: ComputeOptions, layer: int) -> None:
        super().__init__()
        self.layer, self.head_dim, self.kv_dim = layer, config.head_dim, self.key_value_width(config)
        width, heads, kv_heads = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
        bias = config.attention_bias or self.input_bias
        self.q_proj = nn.Linear(width, heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(width, kv_heads * self.kv_dim, bias=bias)
        self.v_proj = nn.Linear(width, kv_heads * self.kv_dim, bias=bias)
        self.o_proj = nn.Linear(heads * self.head_dim, width, bias=config.attention_bias)
        self.attend = choose_attention(options.attention)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, cache: KeyValueCache | None) -> Tensor:
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        q = q.view(*x.shape[:2], -1, self.head_dim).transpose(1, 2)  # (B, H, T, d)
        k = k.view(*x.shape[:2], -1, self.kv_dim).transpose(1, 2)  # (B, K, T, d)
        v = v.view(*x.shape[:2], -1, self.kv_dim).transpose(1, 2)
        q, k, v = self.place(q, k, v, cos.to(q.dtype), sin.to(q.dtype))
        if cache is not None:
            k, v = cache.update(self.layer, k, v)
        y = self.attend(q, k, v, mask)  # (B, H, T, d)
        return self.o_proj(y.transpose(1, 2).flatten(2))

    @staticmethod
    def key_value_width(config: ModelConfig) -> int:
        """Width of one key/value head as it is projected."""
        return config.head_dim

    def place(self, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values as attention sees them: at their positions."""
        return rotate(q, cos, sin), rotate(k, cos, sin), v


class LlamaMLP(nn.Module):
    """SwiGLU (Shazeer 2020, arXiv:2002.05202): down(silu(gate(x)) * up(x))."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class LlamaDecoderLayer(nn.Module):
    """One block of the residual stream. All layers share this code, so compiling one compiles all."""

    def __init__(
        self, config: ModelConfig, options: ComputeOptions, layer: int, attention: type[LlamaAttention] = LlamaAttention
    ) -> None:
        super().__init__()
        self.dropout, self.branches = options.dropout, branches_of(layer)
        self.self_attn = attention(config, options, layer)
        self.mlp = LlamaMLP(config)
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, cache: KeyValueCache | None = None
    ) -> Tensor:
        x = x + self.dropout(self.self_attn(self.input_layernorm(x), cos, sin, mask, cache), self.branches, 0)
        return x + self.dropout(self.mlp(self.post_attention_layernorm(x)), self.branches, 1)


class LlamaModel(Decoder):
    """Tokens to the last hidden states; `attention` is that of the family's member."""

    def __init__(
        self, config: ModelConfig, options: ComputeOptions, attention: type[LlamaAttention] = LlamaAttention
    ) -> None:
        super().__init__(options)
        sparse = options.sparse_embedding and config.tie_word_embeddings
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, sparse=sparse)
        layers = range(config.num_hidden_layers)
        self.layers = nn.ModuleList(LlamaDecoderLayer(config, options, layer, attention) for layer in layers)
        self.norm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rope = config.head_dim, config.rope_theta, config.rope_scaling

    def rotation(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        return rotary_angles(positions, *self.rope)


class LlamaForCausalLM(CausalLM):
    """A Llama with its head."""

    decoder_class, decoder_name = LlamaModel, "model"


def check_rotation(config: ModelConfig) -> None:
    """Refuse a width of heads that cannot be rotated."""
    if config.head_dim % 2:
        raise BadInput(f"rotary embedding turns pairs, so {config.head_dim} must be even", field="model.head_dim")


def _check(config: ModelConfig) -> None:
    check_rotation(config)
    if config.no_rope_layer_interval:
        raise BadInput("every layer of a Llama is rotated", field="model.no_rope_layer_interval")


register(
    Architecture(
        "llama", "Llama", model_type="llama", class_name="LlamaForCausalLM", build=LlamaForCausalLM, check=_check,
        in_transformers=True, gguf="llama", fast_decoding=True,
    )
)  # fmt: skip
