"""The recipe: what the configuration leaves open follows from the model's size and the length of the run."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from tiny import TINY, steps_of, undo_after, weights_of

from smolforge.config import OptimizerConfig, RunConfig, build_config
from smolforge.model.architecture import build_model
from smolforge.training.dry_run import rehearse
from smolforge.training.optim import parameter_groups
from smolforge.training.plan import memory_of
from smolforge.training.precision import choose_precision
from smolforge.training.recipe import (
    adapter_peak,
    best_batch,
    best_peak,
    count_body,
    muon_peak,
    resolve_batch,
    resolve_recipe,
)
from smolforge.training.setup import TrainRequest
from smolforge.training.train import run_training

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SHAPE = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
         "num_attention_heads": 2, "num_key_value_heads": 1}  # fmt: skip


def config_with(**sections: Any) -> RunConfig:
    return RunConfig.model_validate({"model": SHAPE, "data": {"sequence_length": 128}, **sections})


def test_step_law_gives_the_papers_values() -> None:
    """At a billion parameters and 100 billion tokens, worked out by hand from the formulas."""
    assert best_peak(10**9, 1e11) == pytest.approx(1.78 * 10 ** (-0.712 * 9 + 0.307 * 11), rel=1e-9)
    assert best_batch(1e11) == pytest.approx(0.573 * 10 ** (0.571 * 11), rel=1e-9)


def test_peaks_stay_where_they_were_measured() -> None:
    """Muon's follows the sweeps of docs/recipes.md, whatever the length; AdamW's does not leave what models bear."""
    swept = {885_696: (0.009, 0.016), 1_452_160: (0.008, 0.016), 4_723_392: (0.005, 0.01), 106_203_456: (0.003, 0.006)}
    for parameters, (low, high) in swept.items():
        assert low <= muon_peak(parameters) <= high
        for tokens in (10**6, 10**12):
            config = config_with(optimizer={"name": "muon"}, training={"tokens": tokens})
            assert resolve_recipe(resolve_batch(config, CUDA))[0].optimizer.lr == pytest.approx(
                muon_peak(count_body(config)), rel=0.05
            )
            assert best_peak(parameters, tokens) <= 0.01


def test_the_body_is_all_but_embedding_and_head() -> None:
    tied, untied = config_with(), config_with(model={**SHAPE, "tie_word_embeddings": False})
    assert count_body(tied) == count_body(untied) == 2 * (64 * 64 * 2 + 2 * 64 * 32 + 3 * 64 * 128 + 2 * 64) + 64


@given(st.integers(1, 10**6), st.sampled_from(["muon", "adamw"]))
def test_decay_of_the_run_follows_its_rule_at_any_length(steps: int, name: str) -> None:
    config, _ = resolve_recipe(config_with(optimizer={"name": name}, training={"steps": steps}))
    o, whole = config.optimizer, 2.5
    if name == "adamw":  # the root of the tokens per parameter
        whole = math.sqrt(steps * config.tokens_per_step / count_body(config))
    assert o.lr * o.weight_decay * steps == pytest.approx(min(whole, 0.01 * steps), rel=0.06)
    assert 0.8 <= o.betas[0] <= 0.9 < 0.95 <= o.betas[1] <= 0.999


def test_what_is_given_stays_and_every_other_value_is_told() -> None:
    given_values = {"name": "adamw", "lr": 1e-3, "betas": (0.8, 0.9), "weight_decay": 0.3}
    schedule = {"name": "cosine"}
    config, lines = resolve_recipe(config_with(optimizer=given_values, schedule=schedule))
    assert lines == []
    assert config == config_with(optimizer=given_values, schedule=schedule)
    config, lines = resolve_recipe(config_with())
    assert config.optimizer.name == "muon" and config.schedule.decay == 0.7
    told = "\n".join(lines)
    for value in (config.optimizer.lr, *config.optimizer.betas, config.optimizer.weight_decay):
        assert f"{value:g}" in told
    assert "muon" in told and "arXiv" in told


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_norms_have_a_rate_of_their_own_in_short_runs(name: str) -> None:
    """20 / steps and at most 0.04, which fades to that of all others; not where rate or groups are given."""

    def resolved(steps: int, **optimizer: Any) -> OptimizerConfig:
        config = config_with(model=model, optimizer={"name": name, **optimizer}, training={"steps": steps})
        return resolve_recipe(config)[0].optimizer

    model = {**SHAPE, "hidden_size": 256, "intermediate_size": 512}

    for steps, peak in ((100, 0.04), (500, 0.04), (1000, 0.02), (1500, 0.0133)):
        config = resolved(steps)
        groups = parameter_groups(build_model(config_with(model=model).model), config)
        rates = {group["factor"] * config.lr: {len(one.shape) for one in group["params"]} for group in groups}
        whole, norms = sorted(rates)
        assert rates[whole] == {2} and whole == config.lr
        assert rates[norms] == {1} and norms == pytest.approx(max(peak, whole), rel=0.01)
    for config in (resolved(100_000), resolved(100, groups={}), resolved(100, lr=1e-3)):
        assert config.groups == {}


def test_momentum_of_muon_is_shorter_in_short_runs() -> None:
    found = [resolve_recipe(config_with(training={"steps": steps}))[0].optimizer for steps in (100, 1000, 1500, 9000)]
    assert [one.momentum for one in found] == pytest.approx([0.9, 0.9, 0.933, 0.95], abs=1e-3)
    adamw = config_with(optimizer={"name": "adamw"})
    assert resolve_recipe(adamw)[0].optimizer.momentum == adamw.optimizer.momentum


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_betas_follow_from_steps_and_batch(name: str) -> None:
    """The mean of the gradient from the steps, as Muon's momentum; that of its square spans the same tokens."""

    def resolved(steps: int, tokens_per_step: int) -> tuple[float, float]:
        training = {"steps": steps, "tokens_per_step": tokens_per_step}
        return resolve_recipe(config_with(optimizer={"name": name}, training=training))[0].optimizer.betas

    firsts = [resolved(steps, 1 << 19)[0] for steps in (100, 1000, 1500, 9000)]
    assert firsts == pytest.approx([0.8, 0.8, 0.867, 0.9], abs=1e-3)
    seconds = {tokens: resolved(100, tokens)[1] for tokens in (1 << 9, 1 << 16, 1 << 18, 1 << 19, 1 << 22)}
    assert list(seconds.values()) == pytest.approx([0.999, 1 - 0.05 / 8, 0.975, 0.95, 0.95], abs=1e-4)


def test_a_run_decides_once(tmp_path) -> None:
    """Its configuration has every value, so a longer run keeps its peak and its decay."""
    config, _ = resolve_recipe(resolve_batch(config_with(training={"tokens": 1_000_000}), CPU))
    path = tmp_path / "config.yaml"
    path.write_text(config.to_yaml())
    again = build_config(str(path), ["training.tokens=50M"])
    resolved, lines = resolve_recipe(resolve_batch(again, CUDA))
    assert lines == [] and resolved == again
    assert resolved.optimizer == config.optimizer and resolved.tokens_per_step == config.tokens_per_step


@pytest.mark.parametrize("changes", [{"init": "smollm2"}, {"data": {"format": "chat", "sequence_length": 128}}])
def test_weights_that_others_trained_keep_the_defaults(changes: dict[str, Any]) -> None:
    config, lines = resolve_recipe(config_with(**changes))
    assert lines == [] and config.optimizer == RunConfig().optimizer


def test_weights_in_bf16_take_adamw() -> None:
    config, lines = resolve_recipe(config_with(training={"precision": "bf16-pure"}))
    assert config.optimizer.name == "adamw" and "bf16-pure" in lines[0]


@given(st.integers(1, 10**7))
def test_the_batch_of_so_many_steps_is_that_of_so_many_tokens(steps: int) -> None:
    one = resolve_batch(config_with(training={"steps": steps}), CUDA)
    other = resolve_batch(config_with(training={"tokens": one.total_steps * one.tokens_per_step}), CUDA)
    assert one.tokens_per_step == pytest.approx(other.tokens_per_step, rel=0.3, abs=128)
    law = best_batch(one.total_steps * one.tokens_per_step)
    assert one.tokens_per_step <= min(max(law * 1.3, 128), 1 << 19)


def test_batches_of_many_sequences_can_be_shared() -> None:
    big = resolve_batch(config_with(training={"tokens": 10**10}), CUDA)
    assert big.tokens_per_step == 2_048 * 128
    assert resolve_batch(config_with(training={"tokens": 10**10}), CPU).tokens_per_step == 8_192
    assert math.isclose(resolve_batch(config_with(), CPU).tokens_per_step, 8_192)


def test_a_run_of_the_default_recipe_resumes_exactly(tmp_path, caplog) -> None:
    """What follows from the length is told, kept in the run's configuration, and the same after a kill."""
    caplog.set_level("INFO", logger="smolforge")
    path = tmp_path / "free.yaml"
    path.write_text(yaml.safe_dump({key: TINY[key] for key in TINY if key not in ("optimizer", "schedule")}))
    whole, part = (run_training(TrainRequest(str(path), out=tmp_path / name))[0] for name in ("whole", "part"))
    assert "optimizer: muon" in caplog.text and "weight decay: " in caplog.text
    undo_after(part, 5)
    caplog.clear()
    run_training(TrainRequest(str(path), out=part.path))
    assert "weight decay: " not in caplog.text
    assert steps_of(part) == steps_of(whole) and weights_of(part) == weights_of(whole)
    kept = build_config(str(part.config_path))
    assert (kept.optimizer.name, kept.optimizer.weight_decay * kept.optimizer.lr) == (
        "muon",
        pytest.approx(0.01, rel=0.06),
    )


def test_the_memory_is_that_of_the_optimizer_which_the_recipe_takes(tmp_path) -> None:
    path = tmp_path / "free.yaml"
    path.write_text(yaml.safe_dump({key: TINY[key] for key in TINY if key not in ("optimizer", "schedule")}))
    config, _ = resolve_recipe(build_config(str(path)))
    needed = memory_of(config, CPU, choose_precision("fp32", CPU)[0], 1, recompute=True).total
    rehearse(TrainRequest(str(path), overrides=[f"training.memory={needed}"], out=tmp_path / "run"))


def test_the_peak_of_an_adapter_follows_from_the_width() -> None:
    """2e-3 for SmolLM2-135M; what is given, and what a run keeps in its configuration, stays."""
    settings = ["data.format=chat", "lora.r=4", "training.steps=5"]
    for preset, peak in (("smollm2-135m", 2e-3), ("smollm2-360m", 1.3e-3), ("smollm2-1.7b", 7.4e-4)):
        model = build_config(preset).model.model_dump(exclude_unset=True)
        config = build_config("lora", settings, model=model)
        found, lines = resolve_recipe(config)
        assert found.optimizer.lr == peak and len(lines) == 1 and f"{peak:g}" in lines[0]
        assert resolve_recipe(found) == (found, [])
    fixed = build_config("lora", [*settings, "optimizer.lr=1e-4"])
    assert resolve_recipe(fixed) == (fixed, [])
    assert adapter_peak(32) == 2e-3  # not on, to widths that nobody measured
