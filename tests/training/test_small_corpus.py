"""Dropout and averaged weights in runs: exact resuming, the second checkpoint, and the defaults of a repeated text."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from tiny import make_run, steps_of, undo_after, weights_of  # noqa: F401

from smolforge.checkpoint import commit
from smolforge.checkpoint.locate import load_model
from smolforge.checkpoint.state import load_state
from smolforge.checkpoint.weights import read_weights
from smolforge.config import RunConfig, build_config
from smolforge.metrics_log import read_metrics
from smolforge.model.summary import estimate_memory
from smolforge.run import Run
from smolforge.training.recipe import count_body
from smolforge.training.small_corpus import resolve_small_corpus
from training.test_own_text import sentences

BOTH = {"dropout": 0.2, "ema": 8}


def averages_of(run: Run) -> list[tuple[int, float, float]]:
    """(step, loss of the weights, loss of their average) of all validations."""
    rows = [row for row in read_metrics(run) if "validation" in row]
    return [(row["step"], row["validation"]["loss"], row["average"]["loss"]) for row in rows]


def test_a_resumed_run_and_other_micro_batches_drop_and_average_the_same(make_run: Callable[..., Run]) -> None:  # noqa: F811
    often = {"checkpoint": {"every": 5, "keep": 9}, "evaluation": {"every": 4}}
    settings = {"training": {**BOTH, "steps": 12}, **often}
    whole = make_run("whole", **settings)
    run = make_run("resumed", **settings)
    undo_after(run, 5)
    make_run("resumed", **settings)
    assert steps_of(run) == steps_of(whole) and averages_of(run) == averages_of(whole)
    assert weights_of(run) == weights_of(whole)
    states = [load_state(each.checkpoints_path / "last" / "training")["average"] for each in (run, whole)]
    assert states[0]["count"] == states[1]["count"] == 12
    for name, tensor in states[0]["weights"].items():
        assert torch.equal(tensor, states[1]["weights"][name])
    small = make_run("small", training={**BOTH, "steps": 12, "micro_batch": 2})
    without = make_run("without", training={"steps": 1})
    ours, theirs, plain = ([loss for _, loss, _ in steps_of(each)] for each in (small, whole, without))
    assert ours == pytest.approx(theirs, abs=2e-5)
    assert abs(plain[0] - theirs[0]) > 1e-4


def test_the_average_is_the_mean_of_the_first_weights_then_exponential(make_run: Callable[..., Run]) -> None:  # noqa: F811
    run = make_run(training={"ema": 4, "steps": 9}, checkpoint={"every": 1, "keep": 99})
    averages: dict[str, torch.Tensor] = {}
    for step in range(1, 10):
        place = run.checkpoints_path / commit.step_name(step)
        for name, weight in read_weights(place).items():
            before, share = averages.get(name, weight.double()), max(1 / 4, 1 / step)
            averages[name] = before + share * (weight.double() - before)
    state = load_state(run.checkpoints_path / "last" / "training")["average"]
    assert state["weights"].keys() == averages.keys()
    for name, average in state["weights"].items():
        torch.testing.assert_close(average.double(), averages[name], rtol=1e-5, atol=1e-6)


def test_the_average_is_a_second_checkpoint_exactly_while_it_is_best(
    make_run: Callable[..., Run], caplog: pytest.LogCaptureFixture  # noqa: F811
) -> None:  # fmt: skip
    caplog.set_level("INFO", logger="smolforge")
    # At a rate that is too high the weights move around, and their mean is better.
    noisy = make_run(
        "noisy", training={"ema": 0.5, "steps": 40}, optimizer={"lr": 0.1}, schedule={"name": "constant"},
        evaluation={"every": 10},
    )  # fmt: skip
    scores = averages_of(noisy)
    best = min(scores, key=lambda row: row[2])
    assert best[2] < min(own for _, own, _ in scores)
    assert commit.steps(noisy.average_path) == [best[0]]
    assert caplog.messages[-1] == f"generate:   smolforge generate {noisy.average_path}"
    assert "averaged weights" in noisy.report_path.read_text()
    kept, _, _ = load_model(noisy.average_path)
    last, _, _ = load_model(noisy.path)
    assert not torch.equal(kept.output_weight, last.output_weight)
    # Weights that still fall fast are ahead of their mean.
    early = make_run("early", training={"ema": 0.9, "steps": 8})
    assert all(own < average for _, own, average in averages_of(early)) and not early.average_path.exists()
    assert caplog.messages[-1] == f"generate:   smolforge generate {early.path}"


def test_an_average_may_begin_in_the_middle_of_a_run(make_run: Callable[..., Run]) -> None:  # noqa: F811
    run = make_run(training={"steps": 3})
    make_run(training={"steps": 7, "ema": 5})
    assert load_state(run.checkpoints_path / "last" / "training")["average"]["count"] == 4


def test_a_text_that_is_read_many_times_changes_what_is_not_given(
    make_run: Callable[..., Run], tmp_path: Path, caplog: pytest.LogCaptureFixture  # noqa: F811
) -> None:  # fmt: skip
    caplog.set_level("INFO", logger="smolforge")
    (tmp_path / "texts").mkdir()
    for i in range(20):
        (tmp_path / "texts" / f"{i}.txt").write_text(sentences(6, i))
    data = {"sources": {str(tmp_path / "texts"): 1.0}}

    def train(name: str, **training: float) -> tuple[str, RunConfig]:
        caplog.clear()
        run = make_run(name, data=data, training=training)
        told = " ".join(message for message in caplog.messages if message.startswith("small corpus"))
        return told, build_config(str(run.config_path))

    told, config = train("often", epochs=7)
    assert "7 readings" in told and "training.dropout=0.1, training.ema=0.1" in told
    assert (config.training.dropout, config.training.ema) == (0.1, 0.1)
    assert "weight_decay" not in told, "it was given"
    told, config = train("given", epochs=7, dropout=0.0)
    assert "dropout" not in told and config.training.dropout == 0 and config.training.ema == 0.1
    told, config = train("thrice", epochs=3)
    assert "3 readings" in told and "dropout" not in told and config.training.dropout == 0
    told, config = train("once", epochs=1)
    assert not told and config.training.dropout == 0


def test_what_is_read_many_times_by_a_large_model_decays_more() -> None:
    free = RunConfig().with_keys("training", tokens_per_step=8192, steps=2000)
    body = count_body(free)
    assert resolve_small_corpus(free, free, 1.4) == (free, [])
    config, lines = resolve_small_corpus(free, free, 8.0)
    assert config.optimizer.weight_decay == pytest.approx(3 * free.optimizer.weight_decay)
    assert f"optimizer.weight_decay={config.optimizer.weight_decay:g}" in lines[0]
    shared, lines = resolve_small_corpus(free, free, 8.0, alone=False)
    assert shared.training.dropout and not shared.training.ema and "training.ema" not in lines[0]
    assert not resolve_small_corpus(free, free, 5.9)[0].training.dropout
    # Two and a half parameters for each token, which is read eight times, and then fewer.
    for tokens, applies in ((0.399 * body, True), (0.401 * body, False)):
        long = free.with_keys("training", steps=round(8 * tokens / 8192))
        assert bool(resolve_small_corpus(long, long, 8.0)[0].training.dropout) == applies
    continued = free.model_copy(update={"init": "smollm2"})
    assert resolve_small_corpus(continued, continued, 8.0)[0] == continued
    given = free.with_keys("optimizer", weight_decay=0.0)
    assert resolve_small_corpus(given, given, 8.0)[0].optimizer.weight_decay == 0


def test_the_estimate_counts_both() -> None:
    config = build_config("smollm2-135m").model
    estimate = partial(estimate_memory, config, sequences=1, length=512, save_copy=True)
    plain, dropped, averaged = estimate(), estimate(dropout=True), estimate(average=True)
    assert averaged.average == averaged.weights and averaged.total - plain.total == 2 * averaged.weights
    assert dropped.activations - plain.activations == 2 * 30 * 512 * 576
