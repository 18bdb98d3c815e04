"""The seed's recreated model: logits of the reference, reproduced by our code."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from smolforge.config import ModelConfig
from smolforge.model.architecture import build_model


@pytest.fixture(scope="module")
def reference(real_data: Path) -> dict[str, Any]:
    return json.loads((real_data / "reference" / "recreation_logits.json").read_text(encoding="utf-8"))


def fill(position: int, shape: list[int]) -> torch.Tensor:
    """The file's own formula, in float64: element i of parameter k from sin(0.7 i + k)."""
    wave = torch.sin(0.7 * torch.arange(math.prod(shape), dtype=torch.float64) + position)
    return (0.05 * wave if len(shape) > 1 else 1 + 0.1 * wave).float().view(shape)


@pytest.fixture(scope="module")
def model(reference: dict[str, Any]) -> torch.nn.Module:
    shape = reference["config"]
    config = ModelConfig(
        architecture="recreation",
        vocab_size=shape["vocab_size"],
        hidden_size=shape["n_embd"],
        intermediate_size=shape["mlp_hidden"],
        num_hidden_layers=shape["n_layer"],
        num_attention_heads=shape["n_head"],
        num_key_value_heads=shape["n_head"],
        rope_theta=shape["rope_base"],
        rms_norm_eps=shape["layer_norm_eps"],
        tie_word_embeddings=shape["tied"],
    )
    model = build_model(config, seed=None)
    weights = {name: fill(k, size) for k, (name, size) in enumerate(reference["parameters"])}
    model.load_state_dict(weights)  # strict: the names and shapes are the seed's own
    return model


def test_parameters_come_in_the_seeds_order(reference: dict[str, Any], model: torch.nn.Module) -> None:
    assert [[name, list(p.shape)] for name, p in model.named_parameters()] == reference["parameters"]


def test_logits_equal_the_reference(reference: dict[str, Any], model: torch.nn.Module) -> None:
    with torch.no_grad():
        logits = model(torch.tensor(reference["input_ids"]))
    expected = torch.tensor(reference["logits"])
    assert logits.shape == expected.shape
    # The file has six decimals and allows 2e-4; processors sum in other orders (2e-6 on one, 3e-6 on another); keys left
    # unrotated would be off by 0.11.
    assert (logits - expected).abs().max() < 1e-5
