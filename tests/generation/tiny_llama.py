"""Tiny models with decided logits, for the tests of this room."""

from __future__ import annotations

import torch

from smolforge.config import ModelConfig
from smolforge.model.architecture import build_model

SHAPES = {
    "plain": {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2},
    "odd": {"hidden_size": 72, "intermediate_size": 100, "num_attention_heads": 9, "num_key_value_heads": 3,
            "tie_word_embeddings": False, "rope_theta": 10_000.0},
    "one-kv": {"hidden_size": 128, "intermediate_size": 320, "num_attention_heads": 2, "num_key_value_heads": 1},
}  # fmt: skip


def make_model(shape: str = "plain", *, seed: int = 0, vocab_size: int = 400, context: int = 256, gain: float = 0.3):
    """A model with random weights of size `gain`: the larger, the livelier its greedy text, and the more chaotic."""
    config = ModelConfig(
        vocab_size=vocab_size, num_hidden_layers=2, max_position_embeddings=context, **SHAPES[shape]
    )  # fmt: skip
    module = build_model(config, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.1 * noise if parameter.dim() == 1 else gain * noise)
        # Tied embeddings repeat their input unless the layers outweigh it in the residual stream.
        module.model.embed_tokens.weight.mul_(0.3)
    return module.eval()


def as_transformers(module):
    """The same weights in transformers' own LlamaForCausalLM."""
    from transformers import LlamaConfig, LlamaForCausalLM

    c = module.config
    config = LlamaConfig(
        vocab_size=c.vocab_size, hidden_size=c.hidden_size, intermediate_size=c.intermediate_size,
        num_hidden_layers=c.num_hidden_layers, num_attention_heads=c.num_attention_heads,
        num_key_value_heads=c.num_key_value_heads, max_position_embeddings=c.max_position_embeddings,
        rms_norm_eps=c.rms_norm_eps, rope_theta=c.rope_theta, tie_word_embeddings=c.tie_word_embeddings,
        bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    theirs = LlamaForCausalLM(config)
    missing, unexpected = theirs.load_state_dict(module.state_dict(), strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    return theirs.eval()


def drop_kept(engine):
    """Drop the caches that the engine keeps for reuse."""
    pool = engine.scheduler.pool
    while pool.kept:
        pool._drop_oldest()
