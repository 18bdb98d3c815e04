"""The architecture `smollm3`: transformers' `SmolLM3ForCausalLM`, a Llama in which some layers have no rotation.

Every `no_rope_layer_interval`-th layer sees no positions (NoPE, arXiv:2305.19466; in this pattern arXiv:2501.18795).
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor

from smolforge.config import ModelConfig
from smolforge.errors import BadInput
from smolforge.model import hf_config
from smolforge.model.architecture import Architecture, ComputeOptions, register
from smolforge.model.llama import LlamaAttention, LlamaForCausalLM, LlamaModel, check_rotation


class SmolLM3Attention(LlamaAttention):
    """Grouped-query attention, rotated or not."""

    def __init__(self, config: ModelConfig, options: ComputeOptions, layer: int) -> None:
        super().__init__(config, options, layer)
        self.rotates = (layer + 1) % config.no_rope_layer_interval != 0

    def place(self, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return super().place(q, k, v, cos, sin) if self.rotates else (q, k, v)


class SmolLM3ForCausalLM(LlamaForCausalLM):
    """SmolLM3 with its head."""

    decoder_class = partial(LlamaModel, attention=SmolLM3Attention)


def _check(config: ModelConfig) -> None:
    check_rotation(config)
    if config.no_rope_layer_interval < 1:
        raise BadInput("SmolLM3 needs it; its own is 4", field="model.no_rope_layer_interval")


def _layers(config: ModelConfig) -> list[int]:
    interval = config.no_rope_layer_interval
    return [int((layer + 1) % interval != 0) for layer in range(config.num_hidden_layers)]


def _to_hf(config: ModelConfig) -> dict[str, Any]:
    own = {"no_rope_layer_interval": config.no_rope_layer_interval, "no_rope_layers": _layers(config)}
    return {**hf_config.llama_keys(config), **own, "use_sliding_window": False, "pad_token_id": None}


def _from_hf(values: dict[str, Any]) -> dict[str, Any]:
    fields = hf_config.full_attention_fields(values, tie_word_embeddings=True)
    interval, given = values.get("no_rope_layer_interval", 4), values.get("no_rope_layers")
    if type(interval) is not int or interval < 1:
        raise hf_config.unsupported("no_rope_layer_interval", interval, "Supported: a whole number from 1.")
    config = ModelConfig(architecture="smollm3", **fields, no_rope_layer_interval=interval)
    if given is not None and given != _layers(config):
        hint = f"Supported: no rotation in every layer whose number no_rope_layer_interval ({interval}) divides."
        raise hf_config.unsupported("no_rope_layers", given, hint)
    return {**fields, "no_rope_layer_interval": interval}


register(
    Architecture(
        "smollm3", "SmolLM3", model_type="smollm3", class_name="SmolLM3ForCausalLM", build=SmolLM3ForCausalLM,
        check=_check, to_hf=_to_hf, from_hf=_from_hf, in_transformers=True, gguf="smollm3", fast_decoding=True,
    )
)  # fmt: skip
