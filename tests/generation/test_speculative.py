"""Guesses change how many steps a text takes, and nothing else."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_llama import drop_kept, make_model

from smolforge.generation import Engine, SamplingParams
from smolforge.generation.speculative import MOST_DRAFTED as MOST
from smolforge.generation.speculative import NgramDraft, worthwhile


@pytest.fixture(scope="module")
def engines(tokenizer):
    """The same model with guesses and without."""
    engines = [Engine.from_model(make_model(), tokenizer, quantize="int8", speculate=on) for on in (True, False)]
    if engines[0].speculation is None:
        pytest.skip("no native code here, and the plain module is not bitwise the same in a batch")
    return engines


def steps_of(engine, prompts, sampling):
    drop_kept(engine)
    return [
        (s.request, s.index, s.token_id, s.text, s.logprob, s.finish_reason) for s in engine.stream(prompts, sampling)
    ]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(1, 399), min_size=1, max_size=6), st.integers(1, 8), st.sampled_from([0.0, 0.3, 1.0]),
    st.integers(0, 2**31), st.sampled_from([1.0, 1.3]), st.integers(1, 60), st.sampled_from([1, 3]),
)  # fmt: skip
def test_the_text_is_the_same_to_the_last_bit(engines, unit, times, temperature, seed, penalty, tokens, n):
    sampling = SamplingParams(
        temperature=temperature, seed=seed, max_tokens=tokens, repetition_penalty=penalty, logprobs=1, n=n, stop=("qu",)
    )
    prompts = [unit * times, [7, *unit]]
    with_guesses, without = (steps_of(engine, prompts, sampling) for engine in engines)
    # Guesses let a choice run ahead of its mates, so only the order between choices may differ.
    assert sorted(with_guesses, key=lambda s: s[:2]) == sorted(without, key=lambda s: s[:2])
    assert engines[0].memory()["cache_reserved"] == 0


def test_a_text_that_repeats_takes_fewer_steps(engines):
    engine = engines[0]
    engine.speculation.proposed = engine.speculation.accepted = 0
    request = engine.add(
        [5, 6, 7, 8] * 6, SamplingParams(temperature=0, max_tokens=100, ignore_eos=True, logit_bias={9: 100.0})
    )
    steps = 0
    while not request.finished:
        engine.step()
        steps += 1
    assert request.written == 100
    assert steps < 35, "token 9 over and over is easy to guess"
    assert engine.speculation.accepted > 65
    assert engine.speculation.accepted <= engine.speculation.proposed


def test_what_cannot_be_guessed_is_soon_left_alone():
    tokens = [1, 2, 3, 4]
    lookup = NgramDraft(tokens)
    proposed = 0
    for turn in range(200):
        tokens += [1, 2, 3, 4, 100 + turn]  # the same beginning, never the same end
        tokens += [1, 2, 3, 4]
        guesses = lookup.propose(1, 5)
        proposed += len(guesses)
        if guesses:
            lookup.rate.learn(len(guesses), 0)
    assert 0 < proposed < 40


def test_guesses_follow_the_longest_agreement_and_go_round():
    assert NgramDraft([1, 2, 3, 9, 5, 2, 3, 8, 1, 2, 3]).propose(1, 5)[0] == 9
    assert NgramDraft([4, 7, 7, 7, 7]).propose(1, 2) == [7, 7]
    assert NgramDraft([1, 2, 3, 4]).propose(1, 5) == []
    assert NgramDraft([1, 2, 1, 2]).propose(1, 0) == []


@given(st.floats(0, 1), st.integers(1, 64))
def test_fewer_guesses_the_fuller_the_step(rate, running):
    assert 0 <= worthwhile(rate, running + 1) <= worthwhile(rate, running) <= MOST
    assert worthwhile(1.0, running) == MOST
    assert worthwhile(0.2, running) == 0
