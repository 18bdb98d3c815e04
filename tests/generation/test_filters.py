"""Every filter keeps what transformers' keeps, on random logits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import filtered
from transformers.generation import logits_process as theirs

from smolforge.generation.sampler import IMPOSSIBLE, Sampler
from smolforge.generation.sampling_params import SamplingParams


@pytest.mark.parametrize("penalty", [0.8, 1.3])
def test_repetition_penalty_equals_transformers(penalty):
    scores = torch.randn(1, 300, generator=torch.Generator().manual_seed(1)) * 3
    prompt = [5, 7, 7, 299, 0, 5]
    expected = theirs.RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([prompt]), scores.clone())
    ours = Sampler(SamplingParams(repetition_penalty=penalty), prompt, seed=0).penalize(scores[0], 0)
    assert torch.equal(ours, expected[0])


def test_frequency_and_presence_are_openais_formula():
    sampler = Sampler(SamplingParams(frequency_penalty=0.5, presence_penalty=0.25, temperature=0), [9], seed=0)
    for token_id in (3, 3, 4):
        sampler.observe(token_id)
    scores = torch.zeros(10)
    penalised = sampler.penalize(scores, 3)
    assert penalised[3] == -(2 * 0.5 + 0.25) and penalised[4] == -(0.5 + 0.25)
    assert penalised[9] == 0, "the prompt is not what was written"
    assert torch.equal(scores, torch.zeros(10)), "the model's logits must stay as they are"


def test_bias_and_min_tokens():
    sampler = Sampler(
        SamplingParams(logit_bias={2: 100.0}, min_tokens=2, temperature=0), [0], seed=0, stop_token_ids=[2]
    )
    scores = torch.zeros(5)
    assert sampler.sample(scores, 0).token_id != 2
    assert sampler.sample(scores, 2).token_id == 2


@settings(max_examples=150, deadline=None)
@given(
    st.integers(0, 2**31), st.sampled_from([0, 1, 5, 40, 63, 500]), st.sampled_from([0.05, 0.5, 0.9, 0.99, 1.0]),
    st.sampled_from([0.0, 0.02, 0.3]), st.sampled_from([1.0, 0.9, 0.2]), st.sampled_from([0.3, 0.8, 1.0, 2.5]),
    st.sampled_from([0.5, 3.0, 10.0]),
)  # fmt: skip
def test_keeps_what_transformers_keeps(seed, top_k, top_p, min_p, typical_p, temperature, scale):
    scores = torch.randn(3000, generator=torch.Generator().manual_seed(seed)) * scale
    params = SamplingParams(
        top_k=top_k, top_p=top_p, min_p=min_p, typical_p=typical_p, temperature=temperature
    )  # fmt: skip
    full = filtered(scores.double(), params)
    kept = torch.nonzero(full > IMPOSSIBLE).flatten()
    ids, weights = Sampler(params, [0], seed=0).weights(scores)
    assert ids.tolist() == kept.tolist()
    probabilities = torch.from_numpy(weights.astype(np.float64))
    torch.testing.assert_close(probabilities / probabilities.sum(), full[kept].softmax(-1), rtol=1e-4, atol=1e-12)


def test_ties_with_the_last_of_top_k_stay():
    ids, _ = Sampler(SamplingParams(top_k=5, top_p=1.0, temperature=1.0), [0], seed=0).weights(torch.zeros(5000))
    assert len(ids) == 5000


def test_top_p_of_equal_weights_keeps_its_share_and_no_more():
    ids, _ = Sampler(SamplingParams(top_p=0.25, temperature=1.0), [0], seed=0).weights(torch.zeros(4096))
    assert len(ids) == 1024


def test_the_forbidden_stay_out_of_a_nucleus_of_everything():
    scores = torch.randn(49152, generator=torch.Generator().manual_seed(0))
    scores[7] = IMPOSSIBLE
    ids, _ = Sampler(SamplingParams(top_p=0.999999999, temperature=1.0), [0], seed=0).weights(scores)
    assert 7 not in ids and len(ids) > 49000
