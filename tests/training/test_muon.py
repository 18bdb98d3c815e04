"""Muon: orthogonal updates, torch's own as an oracle, an update skipped on the device, and exact resuming."""

import copy
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import steps_of, undo_after, weights_of
from torch import nn
from torch.nn.utils import parameters_to_vector

from smolforge.config import ModelConfig, OptimizerConfig
from smolforge.errors import BadInput
from smolforge.model.architecture import build_model
from smolforge.training import optim
from smolforge.training.optim import muon
from smolforge.training.optim.muon import Muon, even_neurons, orthogonalize

SHAPE = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip
CONFIG = OptimizerConfig(name="muon", lr=0.01, weight_decay=0.1)


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**31), st.floats(1e-4, 1e4))
@settings(max_examples=60, deadline=None)
def test_singular_values_come_near_one_and_directions_stay(rows: int, columns: int, seed: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    u, _ = torch.linalg.qr(torch.randn(rows, min(rows, columns), generator=generator))
    v, _ = torch.linalg.qr(torch.randn(columns, min(rows, columns), generator=generator))
    values = 0.05 + 0.95 * torch.rand(min(rows, columns), generator=generator)
    found = orthogonalize((scale * (u * values) @ v.T)[None])[0]
    inner = u.T @ found @ v
    assert ((inner.diagonal() > 0.6) & (inner.diagonal() < 1.3)).all()
    torch.testing.assert_close((u * inner.diagonal()) @ v.T, found, atol=2e-3, rtol=0)


def test_fp16_holds_small_gradients() -> None:
    """A T4 has no bf16, and a gradient of 1e-9 is 0 in fp16 unless it is scaled to size 1 before."""
    matrices = 1e-9 * torch.randn(2, 24, 40, generator=torch.Generator().manual_seed(0))
    exact = orthogonalize(matrices)
    found = orthogonalize(matrices, torch.float16)
    assert found.dtype == torch.float16
    torch.testing.assert_close(found.float(), exact, atol=0.02, rtol=0)


@given(st.integers(1, 40), st.integers(1, 40), st.sampled_from([torch.float32, torch.float16]), st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_neurons_of_the_longer_side_move_equally_far(rows: int, columns: int, dtype: torch.dtype, seed: int) -> None:
    updates = torch.randn(2, rows, columns, generator=torch.Generator().manual_seed(seed)).to(dtype)
    side = -1 if rows >= columns else -2
    shown = updates if side == -1 else updates.mT
    shown[0, 0] = 0  # a neuron that had no gradient
    found = even_neurons(updates)
    assert found.dtype == dtype and not (found if side == -1 else found.mT)[0, 0].any()
    lengths, before = (x.double().norm(dim=side) for x in (found, updates))
    near = {"rtol": 0.02 if dtype == torch.float16 else 1e-4, "atol": 1e-6}
    whole = before.square().mean(-1, keepdim=True).sqrt()
    moved = before > 0.02 * whole  # a factor of 100 is the most
    torch.testing.assert_close(lengths[moved], whole.expand_as(lengths)[moved], **near)
    cosines = (found.double() * updates.double()).sum(side) - lengths * before
    assert cosines.abs().max() <= 0.01 * before.max() * lengths.max() + 1e-9
    assert not even_neurons(torch.zeros(1, rows, columns)).any()


def test_a_run_in_bf16_orthogonalizes_in_bf16(monkeypatch) -> None:
    """Twice as fast where the processor multiplies bf16; a run in fp32 stays exact."""
    seen = []

    def watch(matrices: torch.Tensor, precision: torch.dtype) -> torch.Tensor:
        seen.append(precision)
        return orthogonalize(matrices, precision)

    monkeypatch.setattr(muon, "orthogonalize", watch)
    updates = []
    for products in (torch.float32, torch.bfloat16):
        model, optimizer = model_and_optimizer(products=products)
        before = parameters_to_vector(model.parameters()).detach()
        give_gradients(model, seed=1)
        optimizer.step()
        assert set(seen) == {products} and not seen.clear()
        updates.append(parameters_to_vector(model.parameters()).detach() - before)
    exact, rounded = updates
    assert 0 < torch.dist(rounded, exact) < 0.02 * exact.norm()


def model_and_optimizer(config: OptimizerConfig = CONFIG, **options: Any) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = build_model(ModelConfig(**SHAPE), seed=1)  # type: ignore[arg-type]
    optimizer = optim.build_optimizer(model, config, **options)
    optim.set_learning_rate(optimizer, config.lr)
    return model, optimizer


def give_gradients(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def test_hidden_matrices_follow_torchs_muon_and_all_else_follows_adamw() -> None:
    model, ours = model_and_optimizer()
    other = copy.deepcopy(model)
    hidden = [p for n, p in other.named_parameters() if "proj" in n]
    rest = [p for n, p in other.named_parameters() if "proj" not in n]
    theirs = torch.optim.Muon(hidden, lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(
        [{"params": [p for p in rest if p.ndim > 1]}, {"params": [p for p in rest if p.ndim == 1], "weight_decay": 0}],
        lr=0.01, betas=CONFIG.betas, eps=CONFIG.eps, weight_decay=0.1,
    )  # fmt: skip
    before = copy.deepcopy(model)
    for seed in range(3):
        for each in (model, other):
            give_gradients(each, seed)
        ours.step()
        theirs.step()
        adamw.step()
    for (name, a), b, start_value in zip(
        model.named_parameters(), other.parameters(), before.parameters(), strict=True
    ):
        if "proj" in name:
            # The same directions; their lengths lie between 0.7 and 1.2 in one iteration and in the other.
            moved = b - start_value
            assert (a - b).norm() < 0.35 * moved.norm(), name
            assert ((a - start_value) * moved).sum() > 0.95 * (a - start_value).norm() * moved.norm(), name
            # Three updates of the size that AdamW's have, the directions of which differ.
            assert 0.2 * 0.01 < (a - start_value).square().mean().sqrt() < 3 * 1.2 * 0.2 * 0.01
        else:
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)


def test_what_is_not_finite_changes_nothing() -> None:
    model, optimizer = model_and_optimizer()
    give_gradients(model, 0)
    optimizer.step()
    before = copy.deepcopy(model.state_dict())
    moments = copy.deepcopy({k: dict(s) for k, s in enumerate(optimizer.state.values())})
    give_gradients(model, 1)
    for parameter in model.parameters():
        assert parameter.grad is not None
        parameter.grad.view(-1)[0] = torch.nan
    optimizer.found_inf = torch.tensor(1.0)  # type: ignore[attr-defined]
    optimizer.step()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    for number, state in enumerate(optimizer.state.values()):
        for key, value in state.items():
            assert torch.equal(value, moments[number][key]), key
    optimizer.found_inf = torch.tensor(0.0)  # type: ignore[attr-defined]
    give_gradients(model, 2)
    optimizer.step()
    assert not torch.equal(
        model.state_dict()["model.layers.0.mlp.up_proj.weight"], before["model.layers.0.mlp.up_proj.weight"]
    )


def test_groups_scale_the_rate_of_hidden_matrices_too() -> None:
    config = CONFIG.model_copy(update={"groups": {"up_proj": {"lr": 0.0}}})
    model, optimizer = model_and_optimizer(config)
    assert isinstance(optimizer, Muon)
    before = copy.deepcopy(model.state_dict())
    give_gradients(model, 0)
    optimizer.step()
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert not any("up_proj" in name for name in moved) and any("down_proj" in name for name in moved)


def test_bf16_weights_are_refused() -> None:
    try:
        optim.build_optimizer(build_model(ModelConfig(**SHAPE), dtype=torch.bfloat16), CONFIG)  # type: ignore[arg-type]
    except BadInput as error:
        assert "fp32" in str(error) and error.field == "optimizer.name"
    else:
        raise AssertionError


def test_a_run_resumes_bit_for_bit(make_run) -> None:
    changes = {"optimizer": {"name": "muon"}, "training": {"steps": 12}}
    whole, part = make_run("whole", **changes), make_run("part", **changes)
    undo_after(part, 5)
    again = make_run("part", **changes)
    assert steps_of(again) == steps_of(whole) and weights_of(again) == weights_of(whole)
    losses = [loss for _, loss, _ in steps_of(whole)]
    assert losses[-1] < losses[0] - 0.2
