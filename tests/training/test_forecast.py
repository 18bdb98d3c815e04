"""A run on GPUs that are not here: the plan of a machine that has them, and figures that follow from shapes."""

from __future__ import annotations

import json

import pytest
import torch

from cards import CARDS, insert_cards
from smolforge import cli
from smolforge.config import build_config
from smolforge.devices import gpu_named
from smolforge.errors import BadInput
from smolforge.model.summary import count_parameters
from smolforge.training import bench
from smolforge.training.forecast import forecast, parse_gpus
from smolforge.training.plan import make_plan
from smolforge.training.recipe import resolve_batch

CUDA = torch.device("cuda")


@pytest.mark.parametrize("card", ["H100", "4090", "T4"])
@pytest.mark.parametrize("preset", ["smollm2-135m", "seed-recipe"])
def test_the_decisions_are_those_of_a_machine_with_that_card(
    card: str, preset: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = forecast(build_config(preset), *parse_gpus(card if card != "4090" else "rtx4090")).plan
    insert_cards([CARDS[card]], put=monkeypatch.setattr)
    there = make_plan(resolve_batch(build_config(preset), CUDA), CUDA, 1)
    for decided in ("precision", "micro_batch", "attention", "loss", "compile", "recompute"):
        assert getattr(found, decided) == getattr(there, decided), decided


def test_time_storage_network_and_cost_follow_from_the_shapes() -> None:
    config = build_config("smollm2-135m", training={"tokens": "1B"}, optimizer={"name": "adamw"})
    found = forecast(config, 8, gpu_named("H100"), mfu=0.5, price=3.0)
    parameters = count_parameters(config.model)
    # 6 N, the tied head among them, and attention over 2,048 positions: 12 L H d T.
    flops = 6 * (parameters - 35_136) + 12 * 30 * 9 * 64 * 2048
    assert found.tokens_per_second == pytest.approx(8 * 0.5 * 989e12 / flops)
    assert found.seconds * found.tokens_per_second == pytest.approx(found.tokens) and found.tokens >= 1e9
    assert found.checkpoint_bytes == 12 * parameters and found.step_bytes == pytest.approx(1.75 * 4 * parameters)
    assert found.as_dict()["cost"] == pytest.approx(found.seconds / 3600 * 24)
    one = forecast(config, 1, gpu_named("H100"), mfu=0.5)
    assert one.step_bytes == 0 and one.seconds == pytest.approx(8 * found.seconds)
    assert not any("network" in line or "cost" in line for line in one.lines())


# Sequences of 2,048 tokens in the one micro-batch of a step of SmolLM2-135M under AdamW, whether it is compiled, and what
# an H100 took: milliseconds and GB (docs/performance.md).
H100 = [(1, "off", 20.6, 5.10), (4, "off", 48.4, 12.03), (16, "off", 161.7, 26.97), (32, "off", 305.3, 46.88),
        (4, "on", 34.6, 9.80), (16, "on", 105.9, 21.37)]  # fmt: skip


@pytest.mark.parametrize(("sequences", "compiled", "milliseconds", "gigabytes"), H100)
def test_an_h100_took_what_is_planned(sequences, compiled, milliseconds, gigabytes) -> None:
    training = {"tokens_per_step": 2048 * sequences, "micro_batch": sequences, "compile": compiled, "steps": 1000}
    config = build_config("smollm2-135m", ["optimizer.name=adamw", "optimizer.lr=1e-3"], training=training)
    found = forecast(config, 1, gpu_named("H100"))
    assert 1e3 * found.seconds / found.config.total_steps == pytest.approx(milliseconds, rel=0.2)
    assert found.gpu_bytes / 1e9 == pytest.approx(gigabytes, rel=0.1)


def test_shards_where_a_copy_does_not_fit() -> None:
    config = build_config("smollm2-1.7b", ["optimizer.name=adamw"])
    parameters = count_parameters(config.model)
    one, four, many = (forecast(config, *parse_gpus(words)) for words in ("L4", "4xL4", "64xL4"))
    assert [found.plan.parallel for found in (one, four, many)] == ["single", "fsdp", "hsdp"]
    assert (four.plan.shards, many.plan.shards) == (4, 8)
    for found in (four, many):
        # A shard of 4 bytes for each weight, gradient and both moments; the checkpoint is as large as that of one GPU.
        assert found.memory.state == pytest.approx(16 * parameters / found.plan.shards, rel=1e-6)
        assert found.checkpoint_bytes == pytest.approx(one.checkpoint_bytes, rel=1e-6)
    # fsdp gathers parameters in bf16 twice in each pass and sums gradients in fp32; hsdp sums shards among 8 machines.
    passes = four.plan.sequences // four.plan.micro_batch
    assert four.step_bytes == pytest.approx(passes * 0.75 * 8 * parameters)
    assert many.step_bytes == pytest.approx(2 * 7 / 8 * 4 * parameters / 8, rel=1e-6)
    text = "\n".join(many.lines())
    assert "parallel: hsdp (one sequence takes about" in text and "written by each process" in text
    assert many.as_dict()["shards"] == 8


def test_what_does_not_fit_is_told() -> None:
    assert "THIS DOES NOT FIT" in forecast(build_config("smollm2-1.7b"), *parse_gpus("T4")).lines()[-1]
    assert "DOES NOT FIT" not in "\n".join(forecast(build_config("smollm2-1.7b"), *parse_gpus("H100")).lines())


def test_on_this_cpu_the_decisions_are_those_of_a_run_and_steps_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    config = build_config("pocket", training={"tokens": "50k", "tokens_per_step": 4096, "micro_batch": 2})
    parts = [{"forward": 9.0, "backward": 9.0, "update": 9.0}]  # the first step, which is left out
    parts += [{"forward": f, "backward": 2.0, "update": 0.5} for f in (1.0, 0.9, 7.0)]
    with monkeypatch.context() as patch:
        patch.setattr(bench, "_time_steps", lambda config, plan, sequences, length, steps: parts)
        found = forecast(config, *parse_gpus("CPU"), price=2.0)
    assert found.gpu is None and found.plan.device.type == "cpu" and found.plan.micro_batch == 2
    assert found.measured == 4 * (1.0 + 2.0) + 0.5 and found.seconds == pytest.approx(13 * 12.5)
    assert found.gpu_bytes == found.memory.total and found.cost == pytest.approx(found.seconds / 3600 * 2)
    lines = "\n".join(found.lines())
    assert "as some steps took here" in lines and "the peak" not in lines
    assert f"memory: about {found.memory.total / 1e9:.2f} of" in lines
    assert found.as_dict()["gpu"] is None
    timed = forecast(config, 1, None)
    assert timed.measured is not None and 0 < timed.measured < 100


def test_names_of_gpus() -> None:
    assert parse_gpus("8 x h100")[0] == 8 and parse_gpus("RTX 4070 ti super")[1].name == "RTX 4070 Ti SUPER"
    assert parse_gpus("4xA100-80GB")[1].memory == 80e9 > parse_gpus("a100")[1].memory
    assert not gpu_named("T4").has_bf16 and gpu_named("L4").has_bf16
    for wrong, said in (
        ("h1000", "unknown GPU 'h1000'"),
        ("0xH100", "names no GPUs"),
        ("", "unknown GPU|names no GPUs"),
    ):
        with pytest.raises(BadInput, match=said):
            parse_gpus(wrong)


def test_the_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["plan", "smollm2-360m", "--on", "2xL4", "--tokens", "10M", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (
        found["gpus"] == 2 and found["tokens"] >= 10e6 and found["gpu"]["name"] == "L4" and found["precision"] == "bf16"
    )
    assert cli.run(["plan", "pocket", "--on", "T4"]) == 0 and "at 27% of the peak" in capsys.readouterr().out
    assert cli.run(["plan", "pocket", "--on", "T4", "--mfu", "0.3"]) == 0 and "assumed 30%" in capsys.readouterr().out
    assert cli.run(["plan", "pocket", "--on", "T4", "--mfu", "40"]) == 2 and "--mfu" in capsys.readouterr().err
