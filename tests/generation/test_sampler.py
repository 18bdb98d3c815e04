"""Draws follow their distribution, and depend on nothing but their address."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from oracle import filtered

from smolforge.errors import BadInput
from smolforge.generation.sampler import Sampler, describe, draw, uniform
from smolforge.generation.sampling_params import SamplingParams

DRAWS = 100_000


def chi_square_limit(degrees: int) -> float:
    """The 1 - 1e-4 quantile of chi-square (Wilson & Hilferty 1931)."""
    return degrees * (1 - 2 / (9 * degrees) + 3.719 * math.sqrt(2 / (9 * degrees))) ** 3


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingParams(temperature=1.0, top_p=1.0),
        SamplingParams(temperature=0.7, top_p=0.8),
        SamplingParams(temperature=1.5, top_p=1.0, top_k=12),
        SamplingParams(temperature=1.0, top_p=1.0, min_p=0.05),
        SamplingParams(temperature=1.0, top_p=1.0, typical_p=0.7),
        SamplingParams(temperature=0.9, top_p=0.95, repetition_penalty=1.5, logit_bias={4: 2.0}),
    ],
)
def test_chi_square(sampling):
    scores = torch.randn(90, generator=torch.Generator().manual_seed(3)) * 2
    sampler = Sampler(sampling, [1, 2, 3], seed=11)
    # The expected distribution is taken the plain way: every filter on the whole vocabulary, in float64.
    expected = filtered(sampler.penalize(scores, 0).double(), sampling).softmax(0).numpy()
    ids, weights = sampler.weights(sampler.penalize(scores, 0))
    counts = np.bincount([draw(ids, weights, uniform(11, 0, i)) for i in range(DRAWS)], minlength=len(expected))
    assert counts[expected == 0].sum() == 0
    likely = expected * DRAWS >= 5
    observed = np.append(counts[likely], counts[~likely].sum())
    wanted = np.append(expected[likely], expected[~likely].sum()) * DRAWS
    observed, wanted = observed[wanted > 0], wanted[wanted > 0]
    statistic = ((observed - wanted) ** 2 / wanted).sum()
    assert statistic < chi_square_limit(max(len(wanted) - 1, 1))


def test_uniforms_are_uniform_and_independent_of_order():
    values = np.array([uniform(5, c, t) for c in range(10) for t in range(10_000)])
    counts = np.histogram(values, bins=100, range=(0, 1))[0]
    assert ((counts - 1000) ** 2 / 1000).sum() < chi_square_limit(99)
    assert uniform(5, 3, 777) == values[3 * 10_000 + 777]
    assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 0.015
    assert values.min() >= 0 and values.max() < 1


def test_negative_seeds_are_seeds():
    assert uniform(-1, 0, 0) != uniform(1, 0, 0)


def test_draw_at_the_borders():
    ids, probabilities = np.array([3, 8]), np.array([0.25, 0.75])
    assert draw(ids, probabilities, 0.0) == 3
    assert draw(ids, probabilities, 0.25) == 8
    assert draw(ids, probabilities, 1 - 2**-53) == 8
    assert draw(ids, np.array([1.0, 0.0]), 1 - 2**-53) == 3


def test_logprobs_are_the_models_own():
    logits = torch.randn(50, generator=torch.Generator().manual_seed(0))
    picked = Sampler(SamplingParams(logprobs=5, temperature=0.1, logit_bias={7: 100.0}), [0], seed=0).sample(logits, 0)
    assert picked.token_id == 7
    logs = logits.log_softmax(0)
    assert picked.logprob == pytest.approx(float(logs[7]), abs=1e-5)
    assert [i for i, _ in picked.top_logprobs] == logits.topk(5).indices.tolist()
    assert describe(logits, 3, 0).top_logprobs == ()


@pytest.mark.parametrize("temperature", [0, 5e-324, 1e-46, 1e-38, 1e-9, 1e-6])
def test_the_lowest_temperatures_take_the_likeliest_token(temperature):
    """Divided by them, logits of any size stay finite: none of them draws by chance, or NaN."""
    logits = torch.randn(400, generator=torch.Generator().manual_seed(0)) * 3e4
    picked = Sampler(SamplingParams(temperature=temperature, top_p=1.0), [0], seed=0).sample(logits, 0)
    assert picked.token_id == int(logits.argmax())


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1), ("temperature", 1e39), ("temperature", float("nan")), ("temperature", "hot"), ("temperature", True),
        ("top_p", 0), ("top_p", 1.01), ("min_p", -0.1), ("typical_p", 0), ("top_k", -1), ("top_k", 2.5),
        ("max_tokens", -1), ("max_tokens", True), ("n", 0), ("n", 10_000), ("repetition_penalty", 0),
        ("repetition_penalty", 5e-324),
        ("frequency_penalty", 3), ("presence_penalty", float("inf")), ("stop", ("",)), ("stop", (3,)),
        ("stop_token_ids", (-1,)), ("logit_bias", {1: 101}), ("logit_bias", {"a": 1}), ("seed", 1.5), ("seed", 2**64),
        ("logprobs", 21), ("logprobs", True), ("min_tokens", 101), ("echo", 1),
    ],
)  # fmt: skip
def test_bad_settings_name_their_field(field, value):
    with pytest.raises(BadInput) as caught:
        SamplingParams(**{field: value})
    assert caught.value.field == field


def test_a_lone_stop_string_is_one_stop():
    assert SamplingParams(stop="end").stop == ("end",)
