"""What writes is scored as what trains is."""

from __future__ import annotations

import pytest

from smolforge.config import ModelConfig
from smolforge.evaluation import evaluate, evaluate_runner, tokenize_eval_set
from smolforge.generation.runners import select_runner
from smolforge.generation.runners.module import ModuleRunner
from smolforge.model.architecture import build_model
from smolforge.tokenizer import Tokenizer

TEXTS = ["a fox met an owl.", "The owl and the fox went a long way, " * 12, "", "ende 🙂"]


@pytest.fixture(scope="module")
def model_and_slice():
    tokenizer = Tokenizer.train(TEXTS * 5, 300)
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
    )  # fmt: skip
    model = build_model(config, seed=3)
    for parameter in model.parameters():
        parameter.data *= 3  # far from uniform, so that a wrong context would be seen
    return model, tokenize_eval_set(TEXTS, tokenizer)


@pytest.mark.parametrize("length", [16, 64, 500])
def test_a_runner_in_fp32_has_the_score_of_the_model(model_and_slice, length):
    model, piece = model_and_slice
    expected = evaluate(model, piece, length=length)
    for runner in (ModuleRunner(model), select_runner(model, "fp32")[0]):
        score = evaluate_runner(runner, piece, length=length)
        assert score.loss == pytest.approx(expected.loss, rel=1e-5)
        assert (score.tokens, score.n_bytes, score.documents) == (expected.tokens, expected.n_bytes, expected.documents)


def test_fewer_bits_cost_something_but_little(model_and_slice):
    model, piece = model_and_slice
    expected = evaluate(model, piece, length=64).bits_per_byte
    prices = {
        precision: abs(
            evaluate_runner(select_runner(model, precision)[0], piece, length=64).bits_per_byte / expected - 1
        )
        for precision in ("bf16", "int8", "int4")
    }
    assert 0 < prices["int8"] < 0.05
    assert 0 < prices["bf16"] < 0.05
    assert 0 < prices["int4"] < 0.5
