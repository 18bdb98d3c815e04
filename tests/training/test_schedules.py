"""Learning rates: pure, bounded, and equal to torch's where torch has the same."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from smolforge.config import ScheduleConfig
from smolforge.training.optim import schedule_factor as rate

NAMES = ("wsd", "cosine", "onecycle", "constant")


@given(
    name=st.sampled_from(NAMES),
    total=st.integers(1, 5000),
    warmup=st.one_of(st.floats(0, 0.9), st.integers(1, 300)),
    decay=st.floats(0, 0.9),
    floor=st.floats(0, 1),
    data=st.data(),
)
def test_bounds(name, total, warmup, decay, floor, data) -> None:
    config = ScheduleConfig(name=name, warmup=warmup, decay=decay, floor=floor)
    step = data.draw(st.integers(0, total - 1))
    value = rate(config, step, total)
    assert 0 <= value <= 1
    assert name == "onecycle" or floor == 0 or value > 0


def test_wsd_warms_stays_and_falls() -> None:
    config = ScheduleConfig(name="wsd", warmup=10, decay=20)
    values = [rate(config, step, 100) for step in range(100)]
    assert values[:10] == sorted(values[:10]) and 0 < values[0] < values[9] < 1
    assert set(values[10:80]) == {1.0}
    falls = [a - b for a, b in itertools.pairwise(values[80:])]
    assert falls == pytest.approx([falls[0]] * 19) and falls[0] > 0
    assert 0 < values[99] < 0.06


@pytest.mark.parametrize("anneal", ["linear", "cosine"])
@pytest.mark.parametrize("total", [50, 333])
def test_onecycle_equals_torch(anneal, total) -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    theirs = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=1.0, total_steps=total, pct_start=0.2, div_factor=25, final_div_factor=100,
        anneal_strategy="cos" if anneal == "cosine" else "linear",
    )  # fmt: skip
    config = ScheduleConfig(name="onecycle", warmup=0.2, start=1 / 25, floor=1 / 100, anneal=anneal)
    for step in range(total):
        # torch counts the warmup as share * total - 1 without rounding; for shares that fall on a step they agree.
        if (0.2 * total).is_integer():
            assert rate(config, step, total) == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-12)
        else:
            assert rate(config, step, total) == pytest.approx(optimizer.param_groups[0]["lr"], abs=0.02)
        optimizer.step()
        if step < total - 1:
            theirs.step()


def test_cosine_ends_near_its_floor() -> None:
    config = ScheduleConfig(name="cosine", warmup=0.1, floor=0.1)
    assert rate(config, 999, 1000) == pytest.approx(0.1, abs=1e-4)
    assert rate(config, 100, 1000) == 1.0
