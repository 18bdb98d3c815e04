"""Dropout: its rate, what it depends on and what not, and that every architecture has it, in training only."""

from typing import Any

import pytest
import torch

from smolforge.config import ModelConfig
from smolforge.model.architecture import architectures, build_model
from smolforge.model.dropout import Dropout, branches_of, kept, sequence_keys

SHAPE = torch.Size((64, 96))


def model_config(name: str) -> ModelConfig:
    interval: Any = {"no_rope_layer_interval": 2} if name == "smollm3" else {}
    return ModelConfig(
        architecture=name, vocab_size=50, hidden_size=24, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=32, **interval,
    )  # fmt: skip


def test_a_share_of_the_entries_is_dropped_and_the_rest_keeps_the_mean() -> None:
    keys, branch = sequence_keys(0, 0, torch.arange(64)), branches_of(3)[1]
    stays = kept(keys, branch, SHAPE, 0.2).double()
    count = stays.numel()
    assert abs(stays.mean() - 0.8) < 5 * (0.16 / count) ** 0.5
    for dims in ((0, 1), (0, 2), (1, 2)):  # of each column, position and sequence
        shares = stays.mean(dims)
        assert 0.7 < shares.std() / (0.16 * len(shares) / count) ** 0.5 < 1.4
    others = [
        kept(keys, branches_of(3)[0], SHAPE, 0.2),
        kept(sequence_keys(1, 0, torch.arange(64)), branch, SHAPE, 0.2),
    ]
    for other in others:  # another branch, another seed
        correlation = ((stays - 0.8) * (other.double() - 0.8)).mean() / 0.16
        assert abs(correlation) < 5 / count**0.5
    dropout = Dropout(0.2)
    dropout.keys = keys
    dropped = dropout(torch.ones(64, *SHAPE), branches_of(3), 1)
    assert sorted(dropped.unique().tolist()) == pytest.approx([0, 1.25]) and abs(dropped.mean() - 1) < 0.01


def test_what_is_dropped_depends_on_the_sequence_alone() -> None:
    whole = kept(sequence_keys(5, 40, torch.arange(8)), branches_of(0)[0], SHAPE, 0.5)
    assert torch.equal(whole[[6, 2]], kept(sequence_keys(5, 42, torch.tensor([4, 0])), branches_of(0)[0], SHAPE, 0.5))
    assert not torch.equal(whole[0], whole[1])


@pytest.mark.parametrize("name", sorted(architectures()))
def test_every_architecture_drops_in_training_only(name: str) -> None:
    ids = torch.randint(50, (2, 17), generator=torch.Generator().manual_seed(0))
    inputs, targets = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
    losses, gradients = [], []
    for trains, recompute in ((False, False), (True, False), (True, True)):
        model = build_model(model_config(name), dropout=0.3, recompute=recompute)
        model.options.dropout.keys = sequence_keys(0, 0, torch.arange(2)) if trains else None
        loss, _ = model.loss(inputs, targets, scale=1 / 32)
        loss.backward()
        losses.append(float(loss.detach()))
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert losses[0] != losses[1] == losses[2]
    assert all(torch.equal(a, b) for a, b in zip(*gradients[1:], strict=True) if a is not None and b is not None)
    plain = build_model(model_config(name)).loss(inputs, targets, scale=1 / 32)[0]
    assert float(plain.detach()) == losses[0]
