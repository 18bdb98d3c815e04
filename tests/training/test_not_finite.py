"""Losses and gradients that are not finite: skipped on the device, rolled back from, and given up with a report."""

import json
import math

import pytest
import torch
from launch import finish, start_ranks
from tiny import steps_of, tiny_file, weights_of

from smolforge import cli
from smolforge.checkpoint import commit
from smolforge.checkpoint.state import load_state
from smolforge.config import OptimizerConfig
from smolforge.distributed import DistributedContext
from smolforge.errors import RunFailed
from smolforge.metrics_log import read_metrics
from smolforge.model.architecture import CausalLM
from smolforge.run import Run
from smolforge.training.optim import build_optimizer, optimizer_step
from smolforge.training.train import Trainer

TRAINING = {"steps": 12, "micro_batch": 8}


@pytest.fixture
def poison(monkeypatch):
    """Makes the loss of the batches with these addresses not finite, wherever in a run they come up."""
    poisoned: set[int] = set()
    at = {"address": -1}
    step, loss = Trainer._step, CausalLM.loss

    def watched(self, batch):
        at["address"] = batch.step
        step(self, batch)

    def spoiled(self, *args, **settings):
        value, nats = loss(self, *args, **settings)
        if torch.is_grad_enabled() and at["address"] in poisoned:
            return value * math.nan, nats * math.nan
        return value, nats

    monkeypatch.setattr(Trainer, "_step", watched)
    monkeypatch.setattr(CausalLM, "loss", spoiled)
    return poisoned


def events(run: Run, kind: str) -> list[dict]:
    return [row for row in read_metrics(run) if row.get("event") == kind]


def test_one_bad_step_touches_nothing(make_run, poison) -> None:
    short = make_run("short", training={**TRAINING, "steps": 5}, schedule={"name": "constant", "warmup": 0})
    poison.add(5)
    run = make_run("run", training={**TRAINING, "steps": 6}, schedule={"name": "constant", "warmup": 0})
    assert weights_of(run) == weights_of(short)
    before, after = (load_state(r.checkpoints_path / "last" / "training")["optimizer"] for r in (short, run))
    for name, state in before.items():
        for key, value in state.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(after[name][key])), (name, key)
    skipped = events(run, "skipped")
    assert [row["step"] for row in skipped] == [6] and skipped[0]["address"] == 5
    assert steps_of(run)[-1][1] is None
    # The documents that are named are those that the stream itself names.
    named = skipped[0]["documents"]
    assert cli.run(["data", "which", str(run.path), "--step", "6", "--json"]) == 0
    assert len(named) > 0


def test_documents_named_are_those_of_the_step(make_run, poison, capsys) -> None:
    poison.add(3)
    run = make_run(training=TRAINING)
    capsys.readouterr()
    assert cli.run(["data", "which", str(run.path), "--step", "4", "--json"]) == 0
    named = [d["row"] for d in json.loads(capsys.readouterr().out)["documents"]]
    told = events(run, "skipped")[0]["documents"]
    assert [str(row) in text for row, text in zip(named, told, strict=True)] == [True] * len(named)


def test_three_in_a_row_roll_back_and_leave_the_data_out(make_run, poison) -> None:
    poison.update({7, 8, 9})
    run = make_run(training=TRAINING, checkpoint={"every": 4})
    back = events(run, "rollback")
    assert [(row["step"], row["skipped"]) for row in back] == [(4, [7, 10])]
    rows = steps_of(run)
    assert [step for step, _, _ in rows] == list(range(1, 13))
    assert all(loss is not None for _, loss, _ in rows)
    # It ends as a run that was told from the start to leave that range out.
    poison.clear()
    told = make_run("told", training=TRAINING, checkpoint={"every": 4}, request={"skip": [(8, 11)]})
    assert steps_of(told) == rows and weights_of(told) == weights_of(run)


def test_too_many_roll_backs_end_the_run_with_a_report(make_run, poison, tmp_path) -> None:
    poison.update(range(6, 1000))
    with pytest.raises(RunFailed, match="after 2 roll-backs") as caught:
        make_run(training={**TRAINING, "steps": 40, "rollbacks": 2}, checkpoint={"every": 4})
    assert "optimizer.lr" in str(caught.value)
    run = Run(tmp_path / "run")
    assert commit.newest_whole(run.checkpoints_path) is not None
    assert all(math.isfinite(loss) for step, loss, _ in steps_of(run) if step <= 4)


def test_bad_from_the_start_is_said(make_run, poison) -> None:
    poison.update(range(1000))
    with pytest.raises(RunFailed, match="before the first checkpoint"):
        make_run(training=TRAINING, checkpoint={"every": 4})


@pytest.mark.parametrize("scale, gives_up", [(65536.0, False), (1.0, True)])
def test_a_gradient_scaler_skips_what_overflows_and_reports_what_no_scale_mends(scale, gives_up) -> None:
    """The loss is finite, the gradients are NaN: at a large scale it may be an overflow, at 1 it is not."""
    model = torch.nn.Linear(4, 4)
    optimizer = build_optimizer(model, OptimizerConfig())
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    before = model.weight.clone()
    scaler.scale(model(torch.ones(2, 4)).sum()).backward()
    assert model.weight.grad is not None
    model.weight.grad[0, 0] = math.nan
    nats = torch.ones(())
    _, skipped = optimizer_step(model, optimizer, nats, lr=1e-3, clip=1.0, ranks=DistributedContext(), scaler=scaler)
    assert bool(skipped) == gives_up and torch.equal(model.weight, before)


SEEN_BY_ONE_RANK = """
import os, torch
from smolforge.training import train
inner = train.train_step
def train_step(*args, ranks, **options):
    nats, norm, skipped = inner(*args, ranks=ranks, **options)
    train_step.calls += 1
    seen = ranks.rank == 1 and train_step.calls in (7, 8, 9)
    return nats, norm, skipped | torch.tensor(seen)
train_step.calls = 0
train.train_step = train_step
"""


def test_ranks_roll_back_together_though_only_one_saw_a_reason(tmp_path) -> None:
    words = [tiny_file(tmp_path), "--out", str(tmp_path / "run"), "--steps", "12", "--set", "checkpoint.every=4"]
    for process in start_ranks(words, 2, first=SEEN_BY_ONE_RANK):
        finish(process)
    run = Run(tmp_path / "run")
    assert [(row["step"], row["skipped"]) for row in events(run, "rollback")] == [(4, [6, 9])]
    assert [step for step, _, _ in steps_of(run)] == list(range(1, 13))
