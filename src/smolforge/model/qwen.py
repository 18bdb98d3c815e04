"""The architectures `qwen2` and `qwen3`: transformers' `Qwen2ForCausalLM` and `Qwen3ForCausalLM` with full attention.

Both are Llamas but for attention: Qwen2's queries, keys and values have biases, where the output has none; Qwen3
norms each query and key head before it is rotated (as ViT-22B did, arXiv:2302.05442).
"""

from __future__ import annotations

from functools import partial

from torch import Tensor

from smolforge.config import ModelConfig
from smolforge.errors import BadInput
from smolforge.model import hf_config
from smolforge.model.architecture import Architecture, ComputeOptions, register
from smolforge.model.llama import LlamaAttention, LlamaForCausalLM, LlamaModel, LlamaRMSNorm, check_rotation


class Qwen2Attention(LlamaAttention):
    """Grouped-query attention with biases of queries, keys and values."""

    input_bias = True


class Qwen3Attention(LlamaAttention):
    """Grouped-query attention with norms of query and key heads."""

    def __init__(self, config: ModelConfig, options: ComputeOptions, layer: int) -> None:
        super().__init__(config, options, layer)
        self.q_norm = LlamaRMSNorm(config.head_dim, config.rms_norm_eps)
        self.k_norm = LlamaRMSNorm(config.head_dim, config.rms_norm_eps)

    def place(self, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return super().place(self.q_norm(q), self.k_norm(k), v, cos, sin)


class Qwen2ForCausalLM(LlamaForCausalLM):
    """Qwen2 with its head."""

    decoder_class = partial(LlamaModel, attention=Qwen2Attention)


class Qwen3ForCausalLM(LlamaForCausalLM):
    """Qwen3 with its head."""

    decoder_class = partial(LlamaModel, attention=Qwen3Attention)


def _check_qwen2(config: ModelConfig) -> None:
    check_rotation(config)
    for key in ("attention_bias", "mlp_bias"):
        if getattr(config, key):
            raise BadInput("Qwen2 has its own biases; leave this out", field=f"model.{key}")


def _check_qwen3(config: ModelConfig) -> None:
    check_rotation(config)
    if config.mlp_bias:
        raise BadInput("Qwen3's MLP has no biases", field="model.mlp_bias")


register(
    Architecture(
        "qwen2", "Qwen2", model_type="qwen2", class_name="Qwen2ForCausalLM", build=Qwen2ForCausalLM, check=_check_qwen2,
        from_hf=hf_config.full_attention_fields, in_transformers=True, gguf="qwen2", fast_decoding=True,
    )
)  # fmt: skip
register(
    Architecture(
        "qwen3", "Qwen3", model_type="qwen3", class_name="Qwen3ForCausalLM", build=Qwen3ForCausalLM, check=_check_qwen3,
        from_hf=lambda values: hf_config.full_attention_fields(values, head_dim=128), in_transformers=True,
        gguf="qwen3", fast_decoding=True,
    )
)  # fmt: skip
