"""The architecture against transformers' own."""

import math

import pytest
import torch
from transformers import LlamaConfig
from transformers import LlamaForCausalLM as Oracle

from smolforge.config import ModelConfig
from smolforge.model.architecture import build_model


def random_config(seed: int) -> ModelConfig:
    generator = torch.Generator().manual_seed(seed)

    def pick(*options: int) -> int:
        return options[int(torch.randint(len(options), (), generator=generator))]

    kv_heads, group, head_dim = pick(1, 2, 3), pick(1, 2, 3), pick(4, 8, 16)
    return ModelConfig(
        vocab_size=pick(97, 256, 500),
        hidden_size=kv_heads * group * head_dim,
        intermediate_size=pick(24, 64, 100),
        num_hidden_layers=pick(1, 2, 4),
        num_attention_heads=kv_heads * group,
        num_key_value_heads=kv_heads,
        max_position_embeddings=pick(64, 128),
        rope_theta=float(pick(10_000, 100_000)),
        tie_word_embeddings=bool(pick(0, 1)),
    )


def oracle_of(config: ModelConfig) -> Oracle:
    return Oracle(
        LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            max_position_embeddings=config.max_position_embeddings,
            rms_norm_eps=config.rms_norm_eps,
            tie_word_embeddings=config.tie_word_embeddings,
            rope_theta=config.rope_theta,  # transformers 4
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        )
    )


@pytest.mark.parametrize("seed", range(20))
def test_logits_and_gradients_equal_transformers(seed: int) -> None:
    config = random_config(seed)
    ours = build_model(config, seed=seed)
    theirs = oracle_of(config)
    missing, unexpected = theirs.load_state_dict(ours.state_dict(), strict=False)
    assert not unexpected
    assert set(missing) <= ({"lm_head.weight"} if config.tie_word_embeddings else set())
    theirs.tie_weights()
    ids = torch.randint(config.vocab_size, (3, 37), generator=torch.Generator().manual_seed(seed))
    logits, expected = ours(ids), theirs(ids).logits
    assert (logits - expected).abs().max() < 1e-5
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids.flatten()).backward()
    torch.nn.functional.cross_entropy(expected.flatten(0, 1), ids.flatten()).backward()
    for name, parameter in theirs.named_parameters():
        mine = ours.get_parameter(name).grad
        assert mine is not None and parameter.grad is not None
        assert (mine - parameter.grad).norm() <= 1e-4 * parameter.grad.norm(), name


def test_smollm2_135m_counts() -> None:
    model = build_model(ModelConfig(), device="meta", seed=None)
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert len(model.state_dict()) == 272
    with torch.device("meta"):
        theirs = oracle_of(ModelConfig())
    assert theirs.num_parameters() == 134_515_008
    assert set(model.state_dict()) == {name for name, _ in theirs.named_parameters()}


class GrowingCache:
    mask = None

    def __init__(self) -> None:
        self.kept: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def update(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if layer in self.kept:
            k, v = torch.cat((self.kept[layer][0], k), 2), torch.cat((self.kept[layer][1], v), 2)
        self.kept[layer] = (k, v)
        return k, v


@pytest.mark.parametrize("pieces", [[1] * 12, [5, 7], [4, 1, 3, 4], [12]])
def test_a_cache_changes_nothing(pieces: list[int]) -> None:
    config = random_config(3)
    model = build_model(config, seed=1)
    ids = torch.randint(config.vocab_size, (2, 12))
    cache, start, parts = GrowingCache(), 0, []
    for length in pieces:
        positions = torch.arange(start, start + length)
        parts.append(model(ids[:, start : start + length], positions=positions, cache=cache))
        start += length
    assert torch.allclose(torch.cat(parts, 1), model(ids), atol=1e-5)


def test_attention_stops_at_document_borders() -> None:
    config = random_config(5)
    model = build_model(config, seed=1)
    first, second = torch.randint(config.vocab_size, (1, 6)), torch.randint(config.vocab_size, (1, 9))
    together = model(
        torch.cat((first, second), 1),
        positions=torch.cat((torch.arange(6), torch.arange(9)))[None],
        document_ids=torch.tensor([[0] * 6 + [1] * 9]),
    )
    assert torch.allclose(together[:, :6], model(first), atol=1e-5)
    assert torch.allclose(together[:, 6:], model(second), atol=1e-5)


def test_first_loss_is_near_the_logarithm_of_the_vocabulary() -> None:
    # Logits of normed hidden states are normal with variance std^2 D, which adds half of it to ln V.
    # (Residual projections of zero would give sqrt(D) more: the input token would predict itself.)
    config = ModelConfig(vocab_size=4096, hidden_size=128, intermediate_size=256, num_hidden_layers=12,
                         num_attention_heads=4, num_key_value_heads=2, initializer_range=0.02)  # fmt: skip
    model = build_model(config, seed=0)
    ids = torch.randint(4096, (4, 65), generator=torch.Generator().manual_seed(0))
    loss = torch.nn.functional.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
    assert abs(loss.item() - (math.log(4096) + 0.02**2 * 128 / 2)) < 0.05


def test_residual_projections_start_smaller() -> None:
    config = ModelConfig(vocab_size=512, hidden_size=256, intermediate_size=512, num_hidden_layers=8,
                         num_attention_heads=4, num_key_value_heads=2)  # fmt: skip
    layer = build_model(config, seed=0).model.layers[0]
    ratio = layer.self_attn.o_proj.weight.std() / layer.self_attn.q_proj.weight.std()
    assert abs(float(ratio) - 0.25) < 0.01
