"""Every intermediate of one reference layer (transformers 4.40, fp32), reproduced by the layer that trains.

The layer itself runs; hooks look at what passes between its parts. Attention is looked into through its own
function: with one-hot values its output is its probabilities.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from smolforge.config import ModelConfig
from smolforge.model.architecture import ComputeOptions
from smolforge.model.attention import sdpa
from smolforge.model.llama import LlamaDecoderLayer, rotary_angles

TOLERANCE = 1e-6
WEIGHTS = {
    "input_layernorm.weight": "input_norm",
    "post_attention_layernorm.weight": "post_attention_norm",
    **{f"self_attn.{name}.weight": name for name in ("q_proj", "k_proj", "v_proj", "o_proj")},
    **{f"mlp.{name}.weight": name for name in ("gate_proj", "up_proj", "down_proj")},
}


class Recorder:
    """A cache that keeps what it is given."""

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        self.keys, self.values = k, v
        return k, v


@pytest.fixture(scope="module")
def seen(real_data: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Reference tensors, and ours under the same names; heads as (B, T, heads, d)."""
    reference = load_file(real_data / "reference" / "smollm2-tiny-layer-f32.safetensors")
    config = ModelConfig(hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2,
                         num_key_value_heads=1, max_position_embeddings=16, rope_theta=10_000.0)  # fmt: skip
    layer = LlamaDecoderLayer(config, ComputeOptions(), 0)
    layer.load_state_dict({ours: reference[f"weights.{theirs}"] for ours, theirs in WEIGHTS.items()})
    ours: dict[str, Tensor] = {}

    def keep(name: str):
        return lambda module, inputs, output: ours.__setitem__(name, output)

    def keep_input(name: str):
        return lambda module, inputs: ours.__setitem__(name, inputs[0])

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        ours["query_rope"], ours["key_rope"], ours["value"] = (x.transpose(1, 2) for x in (q, k, v))
        one_hot = torch.eye(k.shape[2], k.shape[3]).expand_as(k)
        ours["attention_probabilities"] = sdpa(q, k, one_hot, mask)[..., : k.shape[2]]
        y = sdpa(q, k, v, mask)
        ours["attention_heads"] = y.transpose(1, 2)
        return y

    layer.self_attn.attend = attend
    layer.input_layernorm.register_forward_hook(keep("input_norm"))
    layer.self_attn.register_forward_hook(keep("attention_projected"))
    layer.post_attention_layernorm.register_forward_pre_hook(keep_input("after_attention"))
    layer.post_attention_layernorm.register_forward_hook(keep("post_attention_norm"))
    layer.mlp.gate_proj.register_forward_hook(keep("gate"))
    layer.mlp.up_proj.register_forward_hook(keep("up"))
    layer.mlp.down_proj.register_forward_pre_hook(keep_input("swiglu"))
    layer.mlp.register_forward_hook(keep("mlp_down"))
    cache = Recorder()
    cos, sin = (c[:, None] for c in rotary_angles(reference["position_ids"], config.head_dim, config.rope_theta))
    with torch.no_grad():
        ours["after_mlp"] = layer(reference["input.hidden"], cos, sin, None, cache)
    ours["key_cache"], ours["value_cache"] = cache.keys.transpose(1, 2), cache.values.transpose(1, 2)
    return reference, ours


def valid_positions(reference: dict[str, Tensor]) -> Tensor:
    """(B, T): which tokens of the batch are there."""
    length = reference["position_ids"].shape[1]
    return torch.arange(length) < reference["context_lengths"][:, None]


def test_every_intermediate_is_compared(seen: tuple[dict[str, Tensor], dict[str, Tensor]]) -> None:
    reference, ours = seen
    expected = {name.removeprefix("expected.") for name in reference if name.startswith("expected.")}
    assert expected == set(ours) | {"attention_logits"}
    assert valid_positions(reference).any()


NAMES = (
    "input_norm", "query_rope", "key_rope", "value", "key_cache", "value_cache", "attention_heads",
    "attention_projected", "after_attention", "post_attention_norm", "gate", "up", "swiglu", "mlp_down", "after_mlp",
)  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_intermediate(seen: tuple[dict[str, Tensor], dict[str, Tensor]], name: str) -> None:
    reference, ours = seen
    valid = valid_positions(reference)
    expected = reference[f"expected.{name}"]
    assert ours[name].shape == expected.shape
    assert (ours[name] - expected)[valid].abs().max() <= TOLERANCE


def test_attention_probabilities(seen: tuple[dict[str, Tensor], dict[str, Tensor]]) -> None:
    reference, ours = seen
    expected, valid = reference["expected.attention_probabilities"], valid_positions(reference)
    difference = (ours["attention_probabilities"] - expected).transpose(1, 2)[valid]
    assert difference.abs().max() <= TOLERANCE


def test_attention_logits(seen: tuple[dict[str, Tensor], dict[str, Tensor]]) -> None:
    """Two ways: from the recorded queries and keys, and as the log-odds of the probabilities of the real function."""
    reference, ours = seen
    expected, valid = reference["expected.attention_logits"], valid_positions(reference)
    length = expected.shape[-1]
    visible = torch.ones(length, length, dtype=torch.bool).tril() & valid[:, None, :, None] & valid[:, None, None, :]
    visible = visible.expand_as(expected)
    q, k = ours["query_rope"].transpose(1, 2), ours["key_rope"].transpose(1, 2)
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    assert (scores - expected)[visible].abs().max() <= TOLERANCE
    log_odds = ours["attention_probabilities"].log() - ours["attention_probabilities"][..., :1].log()
    assert (log_odds - (expected - expected[..., :1]))[visible].abs().max() <= TOLERANCE
