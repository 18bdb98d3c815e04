"""The seed's recreated architecture: its shape, its peculiarities, and the interface it shares with the Llama."""

import math

import pytest
import torch
from torch import Tensor

from smolforge.config import ModelConfig
from smolforge.errors import BadInput
from smolforge.generation.kv_cache import TensorCache
from smolforge.model.architecture import build_model
from smolforge.model.attention import sdpa
from smolforge.model.recreation import key_value_width, rotate_odd

FULL = ModelConfig(architecture="recreation", num_key_value_heads=9, rope_theta=10_000.0)
SMALL = ModelConfig(architecture="recreation", vocab_size=97, hidden_size=48, intermediate_size=64, num_hidden_layers=2,
                    num_attention_heads=3, num_key_value_heads=3, rope_theta=10_000.0)  # fmt: skip
NARROW = key_value_width(SMALL)


def tokens(batch: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(SMALL.vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))


def test_full_size_counts() -> None:
    model = build_model(FULL, device="meta", seed=None)
    assert sum(p.numel() for p in model.parameters()) == 134_411_328
    assert len(model.state_dict()) == 272
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert shapes["transformer.h.29.attn.k_proj.weight"] == (189, 576)
    assert shapes["transformer.h.0.mlp.down_proj.weight"] == (576, 1536)
    assert not any(name.endswith("bias") for name in shapes)


def test_width_of_keys_and_values_is_derived() -> None:
    assert (FULL.head_dim, key_value_width(FULL)) == (64, 21)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [({"num_key_value_heads": 3}, "it must be 9, not 3"), ({"num_key_value_heads": 9, "head_dim": 5}, "at least 6")],
)
def test_shapes_that_it_cannot_have_are_refused(wrong: dict[str, int], words: str) -> None:
    with pytest.raises(BadInput, match=words):
        build_model(ModelConfig(architecture="recreation", **wrong), device="meta", seed=None)


def test_half_rotation_of_an_odd_width() -> None:
    x = torch.arange(21.0).view(1, 1, 1, 21)
    swapped = rotate_odd(x, torch.zeros(21), torch.ones(21))[0, 0, 0]
    assert swapped.tolist() == [-float(i) for i in range(10, 21)] + [float(i) for i in range(10)]
    assert torch.equal(rotate_odd(x, torch.ones(21), torch.zeros(21)), x)


def test_attention_and_cache_see_padded_heads() -> None:
    seen: list[tuple[Tensor, ...]] = []

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        seen.append((q, k, v))
        return sdpa(q, k, v, mask)

    model = build_model(SMALL)
    expected = model(tokens(2, 7))
    model = build_model(SMALL, attention=attend)
    assert torch.equal(model(tokens(2, 7)), expected)
    assert len(seen) == SMALL.num_hidden_layers
    for q, k, v in seen:
        assert q.shape == k.shape == v.shape == (2, 3, 7, SMALL.head_dim)
        assert not k[..., NARROW:].any() and not v[..., NARROW:].any()
        assert k[..., :NARROW].all() and q[..., NARROW:].all()


@pytest.mark.parametrize("pieces", [[1] * 9, [4, 5], [3, 1, 1, 4]])
def test_the_engines_cache_changes_nothing(pieces: list[int]) -> None:
    model, ids = build_model(SMALL, seed=1), tokens(1, 9)
    cache, parts = TensorCache(SMALL, 9, torch.float32, torch.device("cpu")), []
    with torch.no_grad():
        for length in pieces:
            positions = torch.arange(cache.length, cache.length + length)
            hidden = model.decoder(ids[:, positions], positions=positions, cache=cache)
            parts.append(model.head(hidden))
            cache.length += length
        assert torch.allclose(torch.cat(parts, 1), model(ids), atol=1e-5)


def test_attention_stops_at_document_borders() -> None:
    model, first, second = build_model(SMALL, seed=1), tokens(1, 6), tokens(1, 9, seed=1)
    together = model(
        torch.cat((first, second), 1),
        positions=torch.cat((torch.arange(6), torch.arange(9)))[None],
        document_ids=torch.tensor([[0] * 6 + [1] * 9]),
    )
    assert torch.allclose(together[:, :6], model(first), atol=1e-5)
    assert torch.allclose(together[:, 6:], model(second), atol=1e-5)


def test_no_token_sees_a_later_one() -> None:
    model, ids = build_model(SMALL), tokens(1, 8)
    changed = ids.clone()
    changed[0, 5] = (changed[0, 5] + 1) % SMALL.vocab_size
    before, after = model(ids), model(changed)
    assert torch.equal(before[:, :5], after[:, :5]) and not torch.allclose(before[:, 5:], after[:, 5:])


def test_two_thirds_of_queries_and_outputs_never_learn() -> None:
    """What docs/seed.md says of the zeros behind the narrow heads."""
    model = build_model(SMALL)
    model(tokens(2, 12)).logsumexp(-1).sum().backward()
    for layer in model.decoder.layers:
        queries, outputs = layer.attn.q_proj.weight.grad, layer.attn.o_proj.weight.grad
        queries = queries.view(3, SMALL.head_dim, -1)  # (heads, d, D)
        outputs = outputs.view(-1, 3, SMALL.head_dim)
        narrow = NARROW
        assert queries[:, :narrow].any(-1).all() and not queries[:, narrow:].any()
        assert outputs[..., :narrow].any(0).all() and not outputs[..., narrow:].any()


def test_it_depends_on_more_than_distance() -> None:
    """Shifting all positions changes nothing in a Llama; the odd half-rotation is none, so here it does."""
    llama = build_model(ModelConfig(**{**SMALL.model_dump(), "architecture": "llama", "head_dim": 16}))
    for model, moved in ((llama, False), (build_model(SMALL), True)):
        weights = {name: 8 * p if "_proj" in name and p.dim() > 1 else p for name, p in model.state_dict().items()}
        model.load_state_dict(weights)  # sharp attention, so that positions count
        here, there = model(tokens(1, 16)), model(tokens(1, 16), positions=torch.arange(100, 116))
        assert torch.allclose(here, there, atol=1e-3) != moved


def test_new_weights_are_scaled_and_begin_near_the_logarithm_of_the_vocabulary() -> None:
    config = ModelConfig(**{**SMALL.model_dump(), "vocab_size": 2048, "hidden_size": 192, "head_dim": 64,
                            "num_hidden_layers": 8, "initializer_range": 0.02})  # fmt: skip
    model = build_model(config)
    block = model.decoder.layers[0]
    ratio = float((block.attn.o_proj.weight.std() / block.attn.q_proj.weight.std()).detach())
    assert abs(ratio - 1 / math.sqrt(2 * 8)) < 0.01
    ids = torch.randint(2048, (4, 65), generator=torch.Generator().manual_seed(0))
    loss = torch.nn.functional.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
    assert abs(loss.item() - (math.log(2048) + 0.02**2 * 192 / 2)) < 0.05


def test_it_learns() -> None:
    model, ids = build_model(SMALL), tokens(4, 17)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(40):
        loss = torch.nn.functional.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 4 and losses[-1] < 0.5


def test_autocast_keeps_the_stream_and_the_head_in_its_precision() -> None:
    """An fp32 norm must not lift what follows it: the head would run in fp32."""
    model, kinds = build_model(SMALL), []
    for block in model.decoder.layers:
        block.register_forward_hook(lambda module, inputs, output: kinds.append(output.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        kinds.append(model.decoder(tokens(2, 8)).dtype)
    assert kinds == [torch.bfloat16] * (SMALL.num_hidden_layers + 1)


def test_it_is_one_graph() -> None:
    """As compiling for a GPU demands; the eager backend traces without a compiler."""
    model, ids = build_model(SMALL), tokens(2, 8)
    expected = model(ids)
    model.compile(dynamic=False, fullgraph=True, backend="eager")
    assert torch.allclose(model(ids), expected, atol=1e-5)


def test_untied_head_is_a_tensor_of_its_own() -> None:
    model = build_model(ModelConfig(**{**SMALL.model_dump(), "tie_word_embeddings": False}))
    assert "lm_head.weight" in model.state_dict()
    assert model.output_weight is model.lm_head.weight
