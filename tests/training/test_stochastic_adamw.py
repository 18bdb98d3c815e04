"""bf16 weights under stochastic rounding: unbiased, exact when skipped or resumed, and as good as fp32 AdamW."""

import copy
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import steps_of, undo_after, weights_of

from smolforge import kernels
from smolforge.training.optim.adamw import StochasticAdamW, random_bits, round_stochastically


def test_rounding_is_unbiased_and_only_to_neighbours() -> None:
    n = 200_000
    for value in (1.003, -0.7701, 3e-5, 1234.5):
        x = torch.full((n,), value)
        rounded = round_stochastically(x, random_bits(torch.tensor([7], dtype=torch.int32), n)).float()
        low, high = rounded.min(), rounded.max()
        step = high - low
        assert len(rounded.unique()) == 2 and low < value < high
        # The share rounded up is a binomial mean: five of its standard deviations.
        share = (value - low) / step
        assert abs(((rounded - low) / step).mean() - share) < 5 * (share * (1 - share) / n) ** 0.5


@given(st.floats(width=32, allow_nan=False), st.integers(-(2**31), 2**31 - 1))
@settings(max_examples=200, deadline=None)
def test_what_bf16_holds_stays(value: float, bits: int) -> None:
    exact = torch.tensor([value]).bfloat16().float()
    assert torch.equal(round_stochastically(exact, torch.tensor([bits], dtype=torch.int32)).float(), exact)


def test_bits_differ_by_place_and_key() -> None:
    a, b = (random_bits(torch.tensor([k], dtype=torch.int32), 1 << 16) for k in (1, 1 << 20))
    for half in (0, 16):
        low = (a >> half) & 0xFFFF
        counts = torch.bincount((low >> 8).long(), minlength=256).double()
        chi_square = ((counts - 256) ** 2 / 256).sum()
        assert 160 < chi_square < 370  # 255 degrees of freedom: mean 255, five standard deviations of 22.6
    assert (a == b).float().mean() < 1e-3


def problem() -> tuple[torch.nn.Linear, torch.Tensor]:
    torch.manual_seed(0)
    return torch.nn.Linear(16, 8).bfloat16(), torch.randn(32, 16).bfloat16()


def advance(model: torch.nn.Module, optimizer: StochasticAdamW, x: torch.Tensor, steps: int) -> None:
    for _ in range(steps):
        (model(x) - x[:, :8]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def adam(model: torch.nn.Module, update: str = "torch") -> StochasticAdamW:
    groups = [{"params": list(model.parameters()), "weight_decay": 0.1}]
    return StochasticAdamW(groups, lr=1e-3, betas=(0.9, 0.99), eps=1e-8, update=update)


def test_small_updates_count() -> None:
    """Updates of 1/20 of a bf16 step move the mean of many weights; rounded to nearest they would be lost."""
    weight = torch.nn.Parameter(torch.ones(20_000, dtype=torch.bfloat16))
    optimizer = StochasticAdamW([{"params": [weight]}], lr=2e-4, betas=(0.0, 0.0), eps=0.0)
    for _ in range(20):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    assert abs(weight.float().mean().item() - (1 - 20 * 2e-4)) < 2e-4


@pytest.mark.parametrize("update", ["torch", "native"])
def test_found_inf_leaves_everything_as_it_is(update) -> None:
    if update == "native" and kernels.unavailable():
        pytest.skip("no C++ compiler to compile with")
    model, x = problem()
    optimizer = adam(model, update)
    advance(model, optimizer, x, 2)
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()["state"]))
    (model(x).sum() * torch.nan).backward()
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    after = (model.state_dict(), optimizer.state_dict()["state"])
    assert all(torch.equal(before[0][k], after[0][k]) for k in before[0])
    assert all(torch.equal(v, after[1][i][k]) for i, s in before[1].items() for k, v in s.items())


def test_equals_fp32_adamw_up_to_rounding() -> None:
    model, x = problem()
    twin = copy.deepcopy(model).float()
    optimizer = adam(model)
    reference = torch.optim.AdamW(twin.parameters(), lr=1e-3, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1)
    model(x).square().mean().backward()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        q.grad = p.grad.float()
    optimizer.step()
    reference.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert ((p.float() - q).abs() <= q.abs() * 2**-7 + 1e-9).all()
        assert optimizer.state[p]["exp_avg"].dtype == torch.bfloat16


@pytest.mark.skipif(not shutil.which("g++"), reason="no C++ compiler to compile with")
@pytest.mark.parametrize("way", ["compiled", "native"])
def test_compiled_updates_round_as_the_others_do(way) -> None:
    model, x = problem()
    twin = copy.deepcopy(model)
    plain, compiled = adam(model), adam(twin, way)
    advance(model, plain, x, 3)
    advance(twin, compiled, x, 3)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        # Sums may be contracted differently, and a last bit of fp32 can tip a rounding; hardly ever more.
        assert ((p != q).float().mean() < 0.02) and torch.allclose(p.float(), q.float(), rtol=2**-6, atol=1e-6)


def test_a_bf16_pure_run_resumes_bit_for_bit(make_run) -> None:
    pure = {"precision": "bf16-pure", "steps": 12}
    whole = make_run("whole", training=pure)
    part = make_run("part", training=pure)
    undo_after(part, 5)
    again = make_run("part", training=pure)
    assert steps_of(again) == steps_of(whole) and weights_of(again) == weights_of(whole)
    losses = [loss for _, loss, _ in steps_of(whole)]
    assert losses[-1] < losses[0] - 0.2
