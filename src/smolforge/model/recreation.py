"""The architecture `recreation`: the seed's own variant of SmolLM2-135M, which is not a Llama.

What differs from `llama.py`: LayerNorm without bias in place of RMSNorm; each of the H query heads has its own
key/value head, a third as wide (w = 21 for d = 64), padded with zeros to the width of a query; and only the first w
columns of queries and keys are rotated. A score is therefore a product of 21 numbers divided by sqrt(64), and the later
columns of a query and of a head's output do not reach the logits: their rows in `q_proj` and columns in `o_proj` never
get a gradient. The parameter names are the seed's. Attention and cache see K = H heads of width d, zeros included.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smolforge.config import ModelConfig
from smolforge.errors import BadInput
from smolforge.model.architecture import Architecture, CausalLM, ComputeOptions, Decoder, KeyValueCache, register
from smolforge.model.dropout import branches_of
from smolforge.model.llama import LlamaAttention, LlamaMLP, in_own_precision, rotary_angles


def key_value_width(config: ModelConfig) -> int:
    """Width w of one key/value head as it is projected: a third of head_dim, rounded down (64 → 21)."""
    return config.head_dim // 3


class LayerNorm(nn.LayerNorm):
    """(x - mean) / std * weight, without bias (Ba et al. 2016, arXiv:1607.06450)."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__(width, eps, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        with in_own_precision(x):
            return F.layer_norm(x, x.shape[-1:], self.weight.to(x.dtype), None, self.eps)

    def extra_repr(self) -> str:
        return f"{self.normalized_shape}, eps={self.eps}, bias=False"


def rotate_odd(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The seed's half-rotation of an odd width w: x cos + (-x[w//2:], x[:w//2]) sin, shapes as of `rotate`.

    Column i is mixed with column i + w//2 in the first half and with column i - w//2 - 1 in the second, so scores
    depend on more than the distance of query and key. An even width is rotated as in a Llama.
    """
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), dim=-1) * sin


class RecreationAttention(LlamaAttention):
    """Attention with narrow, zero-padded keys and values; its output is zero after the w-th column."""

    key_value_width = staticmethod(key_value_width)

    def place(self, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Only the first w columns are rotated; keys and values, (B, H, T, w), become (B, H, T, d)."""
        q = torch.cat((rotate_odd(q[..., : self.kv_dim], cos, sin), q[..., self.kv_dim :]), dim=-1)
        padding = (0, self.head_dim - self.kv_dim)
        return q, F.pad(rotate_odd(k, cos, sin), padding), F.pad(v, padding)


class RecreationBlock(nn.Module):
    """One block of the residual stream."""

    def __init__(self, config: ModelConfig, options: ComputeOptions, layer: int) -> None:
        super().__init__()
        self.dropout, self.branches = options.dropout, branches_of(layer)
        self.ln_1 = LayerNorm(config.hidden_size, config.rms_norm_eps)
        self.attn = RecreationAttention(config, options, layer)
        self.ln_2 = LayerNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = LlamaMLP(config)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, cache: KeyValueCache | None = None
    ) -> Tensor:
        x = x + self.dropout(self.attn(self.ln_1(x), cos, sin, mask, cache), self.branches, 0)
        return x + self.dropout(self.mlp(self.ln_2(x)), self.branches, 1)


class RecreationModel(Decoder):
    """Tokens to the last hidden states."""

    def __init__(self, config: ModelConfig, options: ComputeOptions) -> None:
        super().__init__(options)
        sparse = options.sparse_embedding and config.tie_word_embeddings
        self.wte = nn.Embedding(config.vocab_size, config.hidden_size, sparse=sparse)
        self.h = nn.ModuleList(RecreationBlock(config, options, layer) for layer in range(config.num_hidden_layers))
        self.ln_f = LayerNorm(config.hidden_size, config.rms_norm_eps)
        self.kv_dim, self.rope_theta = key_value_width(config), config.rope_theta

    # The seed's names, under those that `Decoder` asks for.
    embed_tokens = property(lambda self: self.wte)  # pyright: ignore[reportAssignmentType]
    layers = property(lambda self: self.h)  # pyright: ignore[reportAssignmentType]
    norm = property(lambda self: self.ln_f)  # pyright: ignore[reportAssignmentType]

    def rotation(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        # An odd width has one frequency too many; the table is cut to the width.
        cos, sin = rotary_angles(positions, self.kv_dim, self.rope_theta)
        return cos[..., : self.kv_dim], sin[..., : self.kv_dim]


class SmollmV2Recreation(CausalLM):
    """The recreation with its head."""

    decoder_class, decoder_name = RecreationModel, "transformer"


def _check(config: ModelConfig) -> None:
    if config.num_key_value_heads != config.num_attention_heads:
        problem = "the recreation has one narrow key/value head for each query head, so it must be"
        numbers = f"{config.num_attention_heads}, not {config.num_key_value_heads}"
        raise BadInput(f"{problem} {numbers}", field="model.num_key_value_heads")
    if config.head_dim < 6:
        problem = f"the recreation's key/value heads are a third as wide, so {config.head_dim} leaves no pair to rotate"
        raise BadInput(f"{problem}; it must be at least 6", field="model.head_dim")


register(
    Architecture(
        name="recreation",
        label="recreated-SmolLM2",
        model_type="smolforge_recreation",  # of its own, so that no library takes it for a Llama
        class_name="SmollmV2Recreation",
        build=SmollmV2Recreation,
        check=_check,
        note="**This is not a Llama.** It is the recreated SmolLM2 variant of smolforge (`model_type: "
        "smolforge_recreation`:\nLayerNorm without bias, narrow key/value heads padded with zeros, a partial "
        "rotation). transformers, vLLM and llama.cpp\ndo not know this architecture; smolforge loads it.",
    )
)
