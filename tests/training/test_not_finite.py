"""Losses and gradients that are not finite: skipped on the device, rolled back from, and given up with a report."""

import json
import math

import pytest
import torch
from tiny import steps_of, weights_of

from smolforge import cli
from smolforge.checkpoint import commit
from smolforge.checkpoint.state import load_state
from smolforge.errors import RunFailed
from smolforge.metrics_log import read_metrics
from smolforge.model.architecture import CausalLM
from smolforge.run import Run
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
    told = make_run("told", training=TRAINING, checkpoint={"every": 4}, request={"skip": [(7, 10)]})
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
